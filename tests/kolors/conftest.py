"""Tiny models from the real classes, with seeded weights."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.prompts import PromptEmbeds
from kolors_nodes.kolors.unet import build_unet

from ..tiny_models import TEXT_WIDTH, TINY_UNET, seed_weights_


@pytest.fixture(scope="session")
def tiny_unet():
    return seed_weights_(build_unet(TINY_UNET)).requires_grad_(False)


@pytest.fixture(scope="session")
def make_embeds():
    def make(batch_size: int, seed: int = 0) -> PromptEmbeds:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        return PromptEmbeds(
            prompt_embeds=draw(batch_size, 256, TEXT_WIDTH),
            pooled_prompt_embeds=draw(batch_size, TEXT_WIDTH),
            negative_prompt_embeds=draw(batch_size, 256, TEXT_WIDTH),
            negative_pooled_prompt_embeds=draw(batch_size, TEXT_WIDTH),
        )

    return make
