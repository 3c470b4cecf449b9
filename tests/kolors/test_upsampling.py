"""Doubling with a folded kernel against diffusers' Upsample2D, which convolves the copies."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from kolors_nodes.kolors.upsampling import FoldedUpsample, fold_upsampling_
from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, build_autoencoder

from .conftest import seed_weights_

# float32: two or four weights are added before the product instead of after it.
TOLERANCE = 1e-5


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("batch", "channels", "out_channels", "height", "width"),
                         [(1, 8, 8, 5, 7), (2, 8, 12, 1, 1), (1, 4, 6, 16, 3)])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_plain_way(batch, channels, out_channels, height, width, bias):
    plain = seed_weights_(Upsample2D(channels, use_conv=True, out_channels=out_channels, bias=bias))
    rows = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    assert_close(FoldedUpsample(plain.conv)(rows), plain(rows))


@pytest.mark.parametrize("size", [None, (11, 13)])
def test_the_ways_that_are_not_folded_equal_the_plain_one(size):
    """With gradients, and to a size that is no double."""
    plain = seed_weights_(Upsample2D(8, use_conv=True))
    rows = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(FoldedUpsample(plain.conv)(rows, size), plain(rows, size))


def test_only_doubling_with_a_convolution_is_replaced():
    kept = [Upsample2D(8), Upsample2D(8, use_conv_transpose=True), Upsample2D(8, use_conv=True, norm_type="ln_norm")]
    kept.append(Upsample2D(8, use_conv=True, kernel_size=1, padding=0))
    module = fold_upsampling_(torch.nn.ModuleList([*kept, Upsample2D(8, use_conv=True)]))
    assert [type(child) for child in module] == [Upsample2D] * len(kept) + [FoldedUpsample]


@torch.no_grad()
def test_our_autoencoder_decodes_as_diffusers_and_names_its_weights_likewise():
    from diffusers import AutoencoderKL

    config = {**SDXL_VAE_CONFIG, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
    plain = seed_weights_(AutoencoderKL.from_config(config)).eval()
    ours = build_autoencoder(config).eval()
    ours.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True)
    assert sum(isinstance(module, FoldedUpsample) for module in ours.modules()) == 3
    latents = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(2))
    assert_close(ours.decode(latents).sample, plain.decode(latents).sample)
