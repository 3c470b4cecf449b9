"""The tokenizer: a small sentencepiece model of the same kind as ChatGLM3's, trained on the captions."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import sentencepiece

from .captions import (
    CHINESE_BACKGROUNDS,
    CHINESE_COLOURS,
    CHINESE_SHAPES,
    DECORATIONS,
    EMPTY_CAPTIONS,
    EXTRA_COLOURS,
    EXTRA_SHAPES,
    LANGUAGES,
    SEEN,
    SYNONYMS,
    Combination,
    get_captions,
    get_open_captions,
    get_synonymous_captions,
)
from .shapes import BACKGROUNDS

VOCAB_SIZE = 560


def get_extra_combinations() -> list[Combination]:
    """Combinations with the words that only the text encoder learns, and a few of the UNet's beside them."""
    colours = ("red", "green", "blue", "yellow", "purple", "orange")
    shapes = ("circle", "square", "triangle", "star")
    pairs = [*product(EXTRA_SHAPES, colours + EXTRA_COLOURS), *product(shapes, EXTRA_COLOURS)]
    return [Combination(shape, colour, background) for (shape, colour) in pairs for background in BACKGROUNDS]


def get_corpus() -> list[str]:
    """Every caption of the combinations in training, in both languages, and what may stand around one."""
    corpus = []
    for combination in [*SEEN, *get_extra_combinations()]:
        for language in LANGUAGES:
            for choose_from in (get_captions, get_open_captions, get_synonymous_captions):
                corpus += choose_from(combination, language)
    other_words = [text.format("") for texts in DECORATIONS.values() for text in texts] + list(EMPTY_CAPTIONS)
    return corpus + other_words * 20


def train_tokenizer(path: Path) -> None:
    """Trains the sentencepiece model and writes it to `path`.

    The Chinese names of shapes, colours and backgrounds are fixed pieces: without spaces between words, plain
    byte-pair encoding would merge colour and shape into one piece, and then a combination held out of
    training is a piece the model has never seen. Case and full-width forms are folded; whatever else a user
    writes falls back to bytes, so that nothing is unknown (the unknown id is the pad id).
    """
    words = [*CHINESE_SHAPES.values(), *CHINESE_COLOURS.values(), *CHINESE_BACKGROUNDS.values(), "背景"]
    words += [other for word, others in SYNONYMS.items() if not word.isascii() for other in others]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(get_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        user_defined_symbols=sorted(set(words)),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
