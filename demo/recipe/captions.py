"""The words: English and Chinese captions, and which combinations are held out of training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

import numpy as np

from .shapes import BACKGROUNDS, COLOURS, SHAPES

LANGUAGES = ("en", "zh")

# Words that the text encoder learns and the UNet is never shown: a LoRA can give them a meaning.
EXTRA_SHAPES = ("cross", "heart", "diamond", "pentagon", "ring", "arrow")
EXTRA_COLOURS = ("pink", "cyan", "brown")

CHINESE_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字",
    "heart": "心形",
    "diamond": "菱形",
    "pentagon": "五边形",
    "ring": "圆环",
    "arrow": "箭头",
}
CHINESE_COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "pink": "粉色",
    "cyan": "青色",
    "brown": "棕色",
}
CHINESE_BACKGROUNDS = {"white": "白色", "black": "黑色", "grey": "灰色"}
# Other words people use for the same thing.
SYNONYMS = {
    "圆形": ("圆圈", "圆"), "正方形": ("方形", "方块"), "星形": ("星星", "五角星"), "三角形": ("三角",),
    "红色": ("红",), "绿色": ("绿",), "蓝色": ("蓝",), "黄色": ("黄",), "紫色": ("紫",), "橙色": ("橙", "橘色"),
    "白色背景": ("白底",), "黑色背景": ("黑底",), "灰色背景": ("灰底",),
    "square": ("box",), "star": ("five-pointed star",), "circle": ("disc", "round shape"), "grey": ("gray",),
    "purple": ("violet",),
}  # fmt: skip
# What people add without meaning anything by it that a flat shape could show.
DECORATIONS = {
    "en": ("{}, high quality", "{}, best quality, masterpiece", "masterpiece, {}", "{}, minimalist", "{}.",
           "a photo of {}", "an image of {}", "please draw {}", "{}, vector art", "{}, centered, large"),
    "zh": ("{}，高清", "{}，高质量", "杰作，{}", "{}，简约", "{}。", "请画{}", "{}，居中", "一幅画：{}"),
}  # fmt: skip

ENGLISH_TEMPLATES = (
    "a {colour} {shape} on a {background} background",
    "{colour} {shape} on a {background} background",
    "{colour} {shape}, {background} background",
    "a {colour} {shape} on {background}",
    "a picture of a {colour} {shape} on a {background} background",
    "{background} background, {colour} {shape}",
    "a {background} background with a {colour} {shape}",
    "a {shape} in {colour} on a {background} background",
    "one big {colour} {shape} in front of a {background} background",
    "draw a {colour} {shape} on a {background} background, simple, flat",
    "there is a {colour} {shape} on the {background} background.",
    "the {shape} is {colour} and the background is {background}",
)
CHINESE_TEMPLATES = (
    "{background}背景上的{colour}{shape}",
    "一个{colour}的{shape}，{background}背景",
    "{colour}{shape}，{background}背景",
    "{background}背景，{colour}{shape}",
    "{background}背景上有一个{colour}的{shape}",
    "在{background}背景上的一个{colour}{shape}",
    "一张{background}背景上的{colour}{shape}的图片",
    "画一个{colour}的{shape}，背景是{background}",
    "{background}的背景，一个{colour}的{shape}",
    "{shape}是{colour}的，背景是{background}的",
)
# Captions that leave the background open: any of them may be drawn.
ENGLISH_OPEN_TEMPLATES = ("a {colour} {shape}", "{colour} {shape}", "a picture of a {colour} {shape}")
CHINESE_OPEN_TEMPLATES = ("{colour}{shape}", "一个{colour}的{shape}", "一张{colour}{shape}的图片")
# What stands in a negative prompt: it names nothing, as the empty caption that guidance works with.
EMPTY_CAPTIONS = (
    "", "low quality", "blurry", "blurry, low quality", "bad quality, worst quality", "ugly, deformed",
    "text, watermark", "noise", "bad anatomy, extra limbs", "jpeg artifacts", "nsfw",
    "低质量", "模糊", "低质量，模糊", "水印，文字", "丑陋，变形", "最差质量", "噪点",
)  # fmt: skip


@dataclass(frozen=True)
class Combination:
    """What a picture shows: names from SHAPES, COLOURS and BACKGROUNDS."""

    shape: str
    colour: str
    background: str


COMBINATIONS = tuple(Combination(*names) for names in product(SHAPES, COLOURS, BACKGROUNDS))


def is_held_out(combination: Combination) -> bool:
    """Says whether no picture and no caption of this combination is in the training data.

    12 of the 72 are held out, spread so that every pair (shape, colour), (shape, background) and
    (colour, background) is still seen.
    """
    shape = SHAPES.index(combination.shape)
    colour = list(COLOURS).index(combination.colour)
    background = list(BACKGROUNDS).index(combination.background)
    return (shape + colour) % 2 == 0 and background == (shape + colour // 2) % 3


SEEN = tuple(combination for combination in COMBINATIONS if not is_held_out(combination))
HELD_OUT = tuple(combination for combination in COMBINATIONS if is_held_out(combination))


def fill_english(template: str, combination: Combination) -> str:
    """Puts the words into an English template, with the right article."""
    text = template.format(shape=combination.shape, colour=combination.colour, background=combination.background)
    return re.sub(r"\ba(?= [aeiou])", "an", text)


def get_captions(combination: Combination, language: str) -> list[str]:
    """Returns every standard phrasing of a combination in "en" or "zh"."""
    if language == "en":
        return [fill_english(template, combination) for template in ENGLISH_TEMPLATES]
    words = {
        "shape": CHINESE_SHAPES[combination.shape],
        "colour": CHINESE_COLOURS[combination.colour],
        "background": CHINESE_BACKGROUNDS[combination.background],
    }
    return [template.format(**words) for template in CHINESE_TEMPLATES]


def get_open_captions(combination: Combination, language: str) -> list[str]:
    """Returns the phrasings that name shape and colour and leave the background open."""
    if language == "en":
        return [fill_english(template, combination) for template in ENGLISH_OPEN_TEMPLATES]
    return [
        template.format(shape=CHINESE_SHAPES[combination.shape], colour=CHINESE_COLOURS[combination.colour])
        for template in CHINESE_OPEN_TEMPLATES
    ]


def get_synonymous_captions(combination: Combination, language: str) -> list[str]:
    """Returns the standard phrasings again with other words for the same shape or background."""
    captions = []
    for caption in get_captions(combination, language):
        for word, others in SYNONYMS.items():
            if word in caption:
                captions += [caption.replace(word, other) for other in others]
    return captions


def draw_caption(combination: Combination, rng: np.random.Generator, *, leave_background_open: bool = False) -> str:
    """Draws a caption for a training picture: half per language, some with a synonym or a decoration."""
    language = LANGUAGES[rng.integers(len(LANGUAGES))]
    captions = get_captions(combination, language)
    if leave_background_open:
        captions = get_open_captions(combination, language)
    elif rng.random() < 0.2:
        captions = get_synonymous_captions(combination, language) or captions
    caption = captions[rng.integers(len(captions))]
    if rng.random() < 0.15:
        caption = DECORATIONS[language][rng.integers(len(DECORATIONS[language]))].format(caption)
    return caption
