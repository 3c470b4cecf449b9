"""A tiny UNet from the real class with seeded weights, and LoRAs for it."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet
from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.formats import Lora
from kolors_nodes.lora.names import get_unet_names

TINY_UNET = {
    **KOLORS_UNET_CONFIG,
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "encoder_hid_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


@pytest.fixture(scope="session")
def unet():
    """Shared by all tests; none may change it."""
    unet = build_unet(TINY_UNET)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(unet.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return unet.requires_grad_(False)


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
