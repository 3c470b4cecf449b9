"""Layers of our autoencoder against those of diffusers that they stand in for."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, build_autoencoder
from kolors_nodes.kolors.vae_layers import FoldedUpsample, GroupNorm, LastActivation, Residual, streamline_

from .conftest import seed_weights_

# float32: two or four weights are added before the product instead of after it.
TOLERANCE = 1e-5


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("batch", "channels", "out_channels", "height", "width"),
                         [(1, 8, 8, 5, 7), (2, 8, 12, 1, 1), (1, 4, 6, 16, 3)])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_doubling_equals_the_plain_way(batch, channels, out_channels, height, width, bias, layout):
    plain = seed_weights_(Upsample2D(channels, use_conv=True, out_channels=out_channels, bias=bias))
    rows = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    result = FoldedUpsample(plain.conv)(rows.contiguous(memory_format=layout))
    assert_close(result, plain(rows))
    if height > 1:  # else the layouts are one
        assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(1, 8, 512, 512), (1, 16, 33, 7), (2, 16, 64, 64)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_group_norm_is_exact_on_large_pictures(shape, layout):
    plain = seed_weights_(torch.nn.GroupNorm(2, shape[1]), std=1.0)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + 1
    expected = torch.nn.functional.group_norm(numbers.double(), 2, plain.weight.double(), plain.bias.double())
    result = GroupNorm(plain)(numbers.contiguous(memory_format=layout))
    assert result.is_contiguous(memory_format=layout)
    # Rounding; torch's own norm of the first shape, channels last, is off by more than ten times that.
    assert (result - expected).abs().max() <= 5e-7 * expected.abs().max()


@torch.no_grad()
def test_a_group_norm_in_half_precision_is_torch_s():
    plain = torch.nn.GroupNorm(2, 8).bfloat16()
    numbers = torch.randn(1, 8, 6, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    numbers = numbers.contiguous(memory_format=torch.channels_last)
    assert torch.equal(GroupNorm(plain)(numbers), plain(numbers))


@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_residual_block_equals_the_plain_way_and_leaves_its_input(out_channels, layout):
    plain = ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=None, groups=4, eps=1e-6)
    seed_weights_(plain.eval())
    ours = streamline_(torch.nn.ModuleList([plain]))[0]
    assert type(ours) is Residual and ours.state_dict().keys() == plain.state_dict().keys()
    rows = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    before = rows.clone()
    with torch.no_grad():
        assert_close(ours(rows), plain(rows, None))
    assert torch.equal(rows, before)


def test_gradients_are_the_plain_ones():
    plain = ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=None, groups=4, eps=1e-6)
    seed_weights_(plain.eval())
    gradients = []
    for block in (plain, Residual(plain)):
        rows = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        block(rows, None).square().sum().backward()
        gradients.append(rows.grad)
    assert_close(*gradients)


@pytest.mark.parametrize("size", [None, (11, 13)])
def test_the_ways_that_are_not_folded_equal_the_plain_one(size):
    """With gradients, and to a size that is no double."""
    plain = seed_weights_(Upsample2D(8, use_conv=True))
    rows = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(FoldedUpsample(plain.conv)(rows, size), plain(rows, size))


def test_only_doubling_with_a_convolution_is_replaced():
    kept = [Upsample2D(8), Upsample2D(8, use_conv_transpose=True), Upsample2D(8, use_conv=True, norm_type="ln_norm")]
    kept.append(Upsample2D(8, use_conv=True, kernel_size=1, padding=0))
    module = streamline_(torch.nn.ModuleList([*kept, Upsample2D(8, use_conv=True)]))
    assert [type(child) for child in module] == [Upsample2D] * len(kept) + [FoldedUpsample]


@pytest.mark.parametrize(
    "options",
    [{"temb_channels": 4}, {"dropout": 0.1}, {"output_scale_factor": 2.0}, {"non_linearity": "relu"}, {"up": True}],
)
def test_only_blocks_of_two_convolutions_are_replaced(options):
    sizes = {"in_channels": 8, "groups": 4, "temb_channels": None}
    module = streamline_(torch.nn.ModuleList([ResnetBlock2D(**{**sizes, **options})]))
    assert type(module[0]) is ResnetBlock2D


@torch.no_grad()
def test_our_autoencoder_decodes_as_diffusers_and_names_its_weights_likewise():
    from diffusers import AutoencoderKL

    config = {**SDXL_VAE_CONFIG, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
    plain = seed_weights_(AutoencoderKL.from_config(config)).eval()
    ours = build_autoencoder(config).eval()
    ours.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True)
    kinds = [type(module) for module in ours.modules()]
    assert [kinds.count(kind) for kind in (FoldedUpsample, LastActivation)] == [3, 2]
    assert kinds.count(Residual) == 2 * 2 + 4 * 2 + 4 * 3 and ResnetBlock2D not in kinds
    latents = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(2))
    assert_close(ours.decode(latents).sample, plain.decode(latents).sample)
    picture = torch.rand(1, 3, 48, 72, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert_close(ours.encode(picture).latent_dist.mode(), plain.encode(picture).latent_dist.mode())
