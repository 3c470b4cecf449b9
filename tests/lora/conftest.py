"""A tiny UNet from the real class with seeded weights, and LoRAs for it."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.unet import build_unet
from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.formats import Lora
from kolors_nodes.lora.names import get_unet_names

from ..tiny_models import TINY_UNET, seed_weights_


@pytest.fixture(scope="session")
def unet():
    """Shared by all tests; none may change it."""
    return seed_weights_(build_unet(TINY_UNET)).requires_grad_(False)


@pytest.fixture(scope="session")
def names(unet):
    return get_unet_names(unet)


def is_attention(module) -> bool:
    return module.is_attention


def is_matrix(module) -> bool:
    """Linear layers and convolutions, all that takes a low-rank change."""
    return len(module.shape) > 1


@pytest.fixture(scope="session")
def make_lora():
    """Makes a seeded LoRA whose changes are about as large as a trained one's, a few percent of the weights."""

    def make(names, *, rank=4, alpha=None, seed=0, chosen=is_attention, dtype=torch.float32, std=0.1) -> Lora:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return (torch.randn(shape, generator=generator) * std).to(dtype)

        adapters = {}
        for module in filter(chosen, names.modules):
            out_size, in_size, *kernel = module.shape
            adapters[f"{module.diffusers}.weight"] = LowRank(
                down=draw(rank, in_size, *kernel), up=draw(out_size, rank, *(1 for _ in kernel)), alpha=alpha
            )
        return Lora(names=names, adapters=adapters)

    return make
