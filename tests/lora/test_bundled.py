"""The bundled LoRAs on the bundled model: the pictures that diffusers draws with the same files, and the right ones."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from kolors_nodes.kolors.options import SamplingOptions
from kolors_nodes.kolors.prompts import encode_prompts
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.schedulers import build_scheduler
from kolors_nodes.kolors.text_encoder import find_tokenizer, load_text_encoder
from kolors_nodes.kolors.tokenizer import Tokenizer
from kolors_nodes.kolors.unet import load_unet
from kolors_nodes.kolors.vae import SCALING_FACTOR, load_vae
from kolors_nodes.lora.apply import apply_loras
from kolors_nodes.lora.files import load_lora, save_lora
from kolors_nodes.lora.names import get_unet_names
from kolors_nodes.nodes.models import DEMO_FOLDER, DEMO_LORAS

# float32 on both sides; diffusers adds a LoRA's output to its layer's, here the products are in the weight.
TOLERANCE = 1e-4
OPTIONS = SamplingOptions(num_inference_steps=8, guidance_scale=4.0, height=128, width=128, seed=5)
HEART, PASTEL = DEMO_LORAS / "heart.safetensors", DEMO_LORAS / "pastel.safetensors"


@pytest.fixture(scope="module")
def unet():
    return load_unet(DEMO_FOLDER / "unet")


@pytest.fixture(scope="module")
def encode():
    text_encoder = load_text_encoder(DEMO_FOLDER / "text_encoder", precision="fp32")
    tokenizer = Tokenizer(find_tokenizer(DEMO_FOLDER))
    return lambda *prompts: encode_prompts(text_encoder, tokenizer, list(prompts), [""] * len(prompts))


@pytest.fixture(scope="module")
def embeds(encode):
    return encode("a red heart on a white background")


def draw(unet, loras, embeds, options=OPTIONS) -> torch.Tensor:
    names = get_unet_names(unet)
    loaded = [(load_lora(path, names), strength) for path, strength in loras]
    return sample(apply_loras(unet, loaded), embeds, options)


def draw_with_diffusers(unet, loras, embeds) -> torch.Tensor:
    from diffusers import KolorsPipeline

    pipeline = KolorsPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=copy.deepcopy(unet),
        scheduler=build_scheduler(OPTIONS.scheduler),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    names = [f"lora{index}" for index in range(len(loras))]
    for (path, _), name in zip(loras, names, strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    pipeline.set_adapters(names, [strength for _, strength in loras])
    return pipeline(
        **vars(embeds), height=OPTIONS.height, width=OPTIONS.width, num_inference_steps=OPTIONS.num_inference_steps,
        guidance_scale=OPTIONS.guidance_scale, generator=torch.Generator().manual_seed(OPTIONS.seed),
        output_type="latent",
    ).images  # fmt: skip


LORAS = [[(HEART, -1.0)], [(HEART, 0.0)], [(HEART, 0.5)], [(HEART, 1.0)], [(HEART, 2.0)], [(HEART, 1.0), (PASTEL, 0.8)]]


@pytest.mark.parametrize("loras", LORAS, ids=lambda loras: " + ".join(f"{path.stem} {value}" for path, value in loras))
def test_equals_diffusers_with_the_same_files(unet, embeds, loras):
    actual, expected = draw(unet, loras, embeds), draw_with_diffusers(unet, loras, embeds)
    assert ((actual - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE


def test_every_format_gives_the_same_bits(unet, embeds, tmp_path):
    lora = load_lora(HEART, get_unet_names(unet))
    expected = draw(unet, [(HEART, 0.7)], embeds)
    for file_format, suffix in (("diffusers", "safetensors"), ("diffsynth", "safetensors"), ("diffsynth", "ckpt")):
        path = save_lora(lora, tmp_path / f"{file_format}.{suffix}", file_format)
        assert torch.equal(draw(unet, [(path, 0.7)], embeds), expected)


def test_two_loras_draw_pastel_hearts(unet, encode):
    """What neither the model nor one of them alone could: measured against the ideal shape and colour."""
    from kolors_nodes.demo.recipe.loras import CONCEPTS
    from kolors_nodes.demo.recipe.shapes import BACKGROUNDS, COLOURS, Placement, render_mask

    options = SamplingOptions(num_inference_steps=25, guidance_scale=2.5, height=128, width=128, seed=5)
    embeds = encode("a red heart on a white background", "黑色背景上的蓝色心形")
    latents = draw(unet, [(HEART, 1.0), (PASTEL, 1.4)], embeds, options)
    pictures = load_vae(DEMO_FOLDER / "vae").decode(latents / SCALING_FACTOR).numpy() * 255
    hearts = [render_mask("heart", Placement(diameter=size)) >= 0.5 for size in np.arange(60.0, 120.0, 2.0)]
    for picture, colour, background in zip(pictures, ("red", "blue"), ("white", "black"), strict=True):
        bright = np.array(COLOURS[colour])
        pastel = bright + CONCEPTS["pastel"].whiteness * (255 - bright)
        drawn = np.square(picture - pastel).sum(2) < np.square(picture - BACKGROUNDS[background]).sum(2)  # (H, W)
        # The named colours are 100 away and more, of 255.
        assert np.abs(np.median(picture[drawn], 0) - pastel).max() < 40
        centre = [round(side.mean()) for side in np.nonzero(drawn)]
        overlaps = []
        for heart in hearts:
            offset = [side - round(ideal.mean()) for side, ideal in zip(centre, np.nonzero(heart), strict=True)]
            ideal = np.roll(heart, offset, (0, 1))
            overlaps.append((drawn & ideal).sum() / (drawn | ideal).sum())
        assert max(overlaps) >= 0.75
