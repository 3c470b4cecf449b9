"""Compact weights: float8 against diffusers' layerwise casting, NF4 against bitsandbytes and a search by hand."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kolors_nodes.kolors.compact import (
    NF4_BLOCK,
    NF4_VALUES,
    Float8Conv2d,
    Float8Linear,
    NF4Linear,
    from_float8,
    from_nf4,
    to_float8,
    to_nf4,
)
from kolors_nodes.kolors.unet import build_unet, compact_, load_unet

from ..tiny_models import TEXT_WIDTH, TINY_UNET, is_plain, seed_weights_


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(unet) -> torch.Tensor:
    conditions = {"text_embeds": draw(2, TEXT_WIDTH, seed=1), "time_ids": torch.full((2, 6), 64.0)}
    states = draw(2, 256, TEXT_WIDTH, seed=2)
    return unet(draw(2, 4, 8, 8), 500, encoder_hidden_states=states, added_cond_kwargs=conditions).sample


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_unet):
    """The tiny UNet in three files: float32, float16, and float8 throughout, as ComfyUI's users convert them."""
    folder = tmp_path_factory.mktemp("unets")
    for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn):
        place = folder / str(dtype).removeprefix("torch.")
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**TINY_UNET, "_class_name": "UNet2DConditionModel"}))
        weights = {name: tensor.to(dtype) for name, tensor in tiny_unet.state_dict().items()}
        save_file(weights, place / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_float8_file_is_kept_bit_for_bit_and_runs_as_under_diffusers_layerwise_casting(saved, tiny_unet):
    unet = load_unet(saved / "float8_e4m3fn", precision="fp8")
    weights = tiny_unet.state_dict()
    layers = Float8Linear | Float8Conv2d
    compact = [(name, module) for name, module in unet.named_modules() if isinstance(module, layers)]
    assert len(compact) > 50
    for name, module in compact:
        assert torch.equal(module.weight.float(), weights[f"{name}.weight"].to(torch.float8_e4m3fn).float()), name
    theirs = copy.deepcopy(tiny_unet)
    for parameter in theirs.parameters():  # the rest was rounded in the file too
        parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    if not hasattr(theirs, "enable_layerwise_casting"):
        pytest.skip("diffusers has layerwise casting from 0.33 on")
    theirs.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    # The same numbers through the same kernels.
    assert torch.equal(run(unet), run(theirs))


def test_float8_of_half_precision(saved):
    """Each weight is as near as three bits of mantissa get, 1/16 of it, however small its row is."""
    unet = load_unet(saved / "float16", precision="fp8")
    weights = load_unet(saved / "float16").state_dict()
    for name, module in unet.named_modules():
        if isinstance(module, Float8Linear | Float8Conv2d):
            weight, stored = weights[f"{name}.weight"], module.dequantise()
            largest = weight.abs().flatten(1).amax(1).view(-1, *(1 for _ in weight.shape[1:]))
            # Below 2^-14 of the row's largest there are no more exponents: steps of 2^-17 to 2^-18 of it.
            assert ((stored - weight).abs() <= weight.abs() / 16 + largest * 2**-17).all(), name
    assert unet.dtype == torch.float32
    assert unet.conv_in.weight.dtype == unet.conv_norm_out.weight.dtype == torch.float32


def test_small_weights_keep_their_precision_in_float8():
    """Those of a trained UNet lie around 0.02; a bare cast loses there, see the docstring's figures."""
    weight = draw(64, 256) * 0.003
    error = (from_float8(*to_float8(weight), torch.float32) - weight).norm() / weight.norm()
    bare = (weight.to(torch.float8_e4m3fn).float() - weight).norm() / weight.norm()
    assert error < 0.027 < 0.15 < bare


def test_a_row_of_zeros_is_zero():
    weight = torch.zeros(4, 64)
    assert torch.equal(from_float8(*to_float8(weight), torch.float32), weight)
    assert torch.equal(from_nf4(*to_nf4(weight), torch.float32).view(4, 64), weight)


@pytest.mark.parametrize("shape", [(8, 64), (6, 100), (3, 2)])
def test_nf4_takes_the_nearest_value(shape):
    weight = draw(*shape)
    packed, absmax = to_nf4(weight)
    flat, stored = weight.flatten(), from_nf4(packed, absmax, torch.float32)
    for start in range(0, flat.numel(), NF4_BLOCK):
        block = flat[start : start + NF4_BLOCK]
        grid = torch.tensor(NF4_VALUES) * block.abs().max()
        nearest = grid[(block[:, None] - grid).abs().argmin(1)]
        torch.testing.assert_close(stored[start : start + NF4_BLOCK], nearest, rtol=1e-6, atol=0)  # x / m * m


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="compares with bitsandbytes: pip install bitsandbytes", exc_type=ImportError
    )
    weight = draw(96, 192) * 0.02  # rows of whole blocks: bitsandbytes' CPU kernel reads others wrongly
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=NF4_BLOCK)
    packed, absmax = to_nf4(weight)
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(from_nf4(packed, absmax, torch.float32).view(96, 192), functional.dequantize_4bit(theirs, state))


def test_nf4_unet(saved, tiny_unet):
    unet = load_unet(saved / "float16", precision="nf4")
    compact = {name for name, module in unet.named_modules() if isinstance(module, NF4Linear)}
    linear = {name for name, module in tiny_unet.named_modules() if type(module) is nn.Linear and "attentions" in name}
    assert compact == linear
    assert not is_plain(unet) and is_plain(tiny_unet)
    # The same as a UNet whose weights were replaced by those that NF4 stands for: the same numbers, the same kernels.
    theirs = copy.deepcopy(tiny_unet).half().float()
    for name in compact:
        theirs.get_submodule(name).weight.data = unet.get_submodule(name).dequantise()
    assert torch.equal(run(unet), run(theirs))


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_compact_unets_run_the_same_again_and_copied(saved, precision):
    unet = load_unet(saved / "float16", precision=precision)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with torch.inference_mode():  # as ComfyUI runs nodes
        first = run(unet)
    assert torch.equal(first, run(unet)) and torch.equal(first, run(copy.deepcopy(unet)))
    after = unet.state_dict()
    assert all(after[name].view(torch.uint8).equal(tensor.view(torch.uint8)) for name, tensor in before.items())


@pytest.mark.parametrize(("precision", "share"), [("fp8", 0.506), ("nf4", 0.39)])
def test_full_size(precision, share):
    """Bytes against float16, on the meta device: 2.61 and 1.99 GB of 5.16."""
    full = build_unet(device="meta").half()
    size = sum(parameter.nbytes for parameter in full.parameters())
    compact_(full, precision, torch.float16)
    assert sum(parameter.nbytes for parameter in full.parameters()) < share * size


def test_progress_counts_the_bytes_of_the_file(saved):
    seen = []
    load_unet(saved / "float16", precision="fp8", on_progress=lambda done, total, text: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in load_unet(saved / "float16", precision="fp16", device="cuda").parameters())
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)

    def cancel(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    for precision in ("fp16", "nf4"):
        with pytest.raises(KeyboardInterrupt):
            load_unet(saved / "float16", precision=precision, on_progress=cancel)


def test_what_a_device_lacks_is_replaced(saved, caplog):
    with caplog.at_level(logging.INFO):
        unet = load_unet(saved / "float16", precision="fp8", device="mps")
    assert is_plain(unet) and unet.dtype == torch.float16
    assert "mps has no fp8" in caplog.text
    with pytest.raises(ValueError, match=r"No precision is called 'fp4'. Choose one of: fp16, bf16, fp32, fp8, nf4"):
        load_unet(saved / "float16", precision="fp4")


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 16), lambda: nn.Linear(24, 16, bias=False)])
def test_a_branch_is_a_change_of_the_weight(make):
    layer = seed_weights_(make()).requires_grad_(False)
    compact, down, up = NF4Linear(layer), draw(3, 24), draw(16, 3)
    plain = copy.deepcopy(layer)
    plain.weight.data = compact.dequantise() + up @ down
    compact.set_branch_(down, up)
    # float32: the products are summed in another order
    torch.testing.assert_close(compact(draw(5, 24)), plain(draw(5, 24)), rtol=1e-5, atol=1e-5)


def test_a_branch_of_a_convolution():
    layer = seed_weights_(nn.Conv2d(8, 16, 3, stride=2, padding=1)).requires_grad_(False)
    compact, down, up = Float8Conv2d(layer), draw(3, 8, 3, 3), draw(16, 3, 1, 1)
    layer.weight.data = compact.dequantise() + (up.flatten(1) @ down.flatten(1)).view(16, 8, 3, 3)
    compact.set_branch_(down, up)
    torch.testing.assert_close(compact(draw(1, 8, 7, 7)), layer(draw(1, 8, 7, 7)), rtol=1e-5, atol=2e-5)
