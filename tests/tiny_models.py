"""Sizes of tiny models of the real classes, and seeded weights for them."""

from __future__ import annotations

import torch
from torch import nn

from kolors_nodes.kolors.compact import CompactLayer
from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG

TEXT_WIDTH = 32

TINY_UNET = {
    **KOLORS_UNET_CONFIG,
    "sample_size": 8,
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "encoder_hid_dim": TEXT_WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
}


def seed_weights_(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Fills every parameter from a seeded generator; norms get weights near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator) * std
        parameter.data.copy_(values + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def is_plain(unet: nn.Module) -> bool:
    """Tells whether a UNet's layers are torch's own, with all weights on one device.

    Where they are not, weights must be used through the layers' forward passes alone: they are stored compactly, or
    come to the device block by block.
    """
    return not any(isinstance(module, CompactLayer) or hasattr(module, "_diffusers_hook") for module in unet.modules())
