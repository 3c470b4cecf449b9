"""Models to measure with: the bundled one, and random ones of Kolors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kolors_nodes.kolors.prompts import PromptEmbeds, encode_prompts
from kolors_nodes.kolors.text_encoder import expand_padding, find_tokenizer, load_text_encoder
from kolors_nodes.kolors.tokenizer import Tokenizer
from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet, load_unet

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "kolors-shapes"
# Half of Kolors' channels, full depth, the true text width: 739 M parameters, 2.8 GiB in float32.
POOL_SIZE = 1_000_003  # a prime, so that no two rows of a weight are equal
MID_SIZE_UNET: Mapping[str, Any] = {**KOLORS_UNET_CONFIG, "block_out_channels": (160, 320, 640)}


@torch.no_grad()
def fill_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills weights so that activations keep their size; norms start as they do.

    All take their numbers from one pool of a million, each from another place in it: that is read in a second where
    drawing anew takes ten.
    """
    parameters = list(module.named_parameters())
    device, dtype = parameters[0][1].device, parameters[0][1].dtype
    pool = torch.randn(POOL_SIZE, device=device, generator=torch.Generator(device).manual_seed(seed)).to(dtype)
    for index, (name, tensor) in enumerate(parameters):
        if tensor.dim() == 1:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        numbers = pool.roll(7919 * index)
        for part in tensor.view(-1).split(POOL_SIZE):
            part.copy_(numbers[: part.numel()])
        tensor.mul_(tensor[0].numel() ** -0.5)
    return module.requires_grad_(False).eval()


def build_random_unet(
    config: Mapping[str, Any], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Makes a UNet with random weights, on the device from the start."""
    return fill_(build_unet(config, device="meta").to(dtype).to_empty(device=device))


@cache
def get_mid_size_unet() -> UNet2DConditionModel:
    """Makes the mid-size UNet, once for all rows that need it."""
    return build_random_unet(MID_SIZE_UNET)


@cache
def get_bundled_unet() -> UNet2DConditionModel:
    """Loads the bundled UNet in float32."""
    return load_unet(DEMO_MODEL / "unet", precision="fp32")


def make_embeds(width: int, num_tokens: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Makes random text rows laid out as the text encoder gives them: equal pad rows, then the real tokens.

    Args:
        width: D.
        num_tokens: of the prompt; the negative prompt is empty, which is 2 tokens.
        device: of the result.
        dtype: of the result.
    """
    counts = torch.tensor([num_tokens, 2])
    compact = torch.randn(2, 1 + num_tokens, width, generator=torch.Generator().manual_seed(1))
    rows = expand_padding(compact, counts).to(device, dtype)
    pooled = torch.randn(2, width, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return PromptEmbeds(
        prompt_embeds=rows[:1],
        pooled_prompt_embeds=pooled[:1],
        negative_prompt_embeds=rows[1:],
        negative_pooled_prompt_embeds=pooled[1:],
    )


def encode_with_bundled_model(prompt: str) -> PromptEmbeds:
    """Encodes a prompt and an empty negative with the bundled text encoder."""
    encoder = load_text_encoder(DEMO_MODEL / "text_encoder", precision="fp32")
    return encode_prompts(encoder, Tokenizer(find_tokenizer(DEMO_MODEL)), [prompt], [""])
