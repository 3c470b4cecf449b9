"""Stored weights against ChatGLM's published formula in numpy, and layers against torch's on the same numbers."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kolors_nodes.kolors import quantised
from kolors_nodes.kolors.quantised import (
    CHATGLM_QUANTISATIONS,
    QUANTISATIONS,
    Linear,
    Quantisation,
    QuantisedLinear,
    quantise,
)
from kolors_nodes.kolors.text_encoder import (
    TextEncoderConfig,
    TextEncoderFiles,
    TokenBatch,
    build_text_encoder,
    find_text_encoder,
    load_text_encoder,
)

from ..files import QUANTISED, get_chatglm_shapes, write_chatglm
from .conftest import seed_weights_
from .test_text_encoder import draw_ids, make_config, relative_error

# float32 sums of up to 14,000 products in another order; measured 2e-6.
TOLERANCE = 2e-5
PRECISIONS = ("quant8", "quant4")


def draw(*shape, seed=0, deviation=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation


def get_relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def make_layer(weight, quantisation, bias=None):
    layer = QuantisedLinear(weight.shape[1], weight.shape[0], bias is not None, quantisation)
    layer.load_state_dict({**quantise(weight, quantisation), **({} if bias is None else {"bias": bias})})
    return layer


def draw_chatglm_weight(rows, columns, bits, seed=0):
    """Every byte is a valid weight: 8-bit values, or pairs of 4-bit ones."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(-128, 128, (rows, columns * bits // 8), generator=generator, dtype=torch.int16)
    return stored.to(torch.int8), (torch.rand(rows, generator=generator) * 0.01 + 1e-4).half()


def apply_formula(stored, scale, bits, dtype):
    """ChatGLM's ``int4WeightExtraction`` and ``int8WeightExtraction``: T(value) · scale in T, high bits first."""
    stored, scale = stored.numpy(), scale.numpy().astype(dtype)
    values = np.empty((stored.shape[0], stored.shape[1] * 8 // bits), np.int8)
    if bits == 8:
        values[:] = stored
    else:
        unsigned = stored.view(np.uint8)
        for column, nibble in ((0, unsigned // 16), (1, unsigned % 16)):
            values[:, column::2] = np.where(nibble < 8, nibble, nibble.astype(np.int16) - 16)
    return values.astype(dtype) * scale[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(4608, 4096), (5, 8)])  # query_key_value at full size, and a tiny one
def test_chatglm_s_own_weights_are_the_published_formula_s(bits, rows, columns, dtype):
    stored, scale = draw_chatglm_weight(rows, columns, bits)
    layer = QuantisedLinear(columns, rows, False, CHATGLM_QUANTISATIONS[bits])
    layer.load_state_dict({"weight": stored, "weight_scale": scale})
    expected = apply_formula(stored, scale, bits, np.dtype(str(dtype).removeprefix("torch.")))
    assert np.array_equal(layer.dequantise(dtype).numpy(), expected)


def test_the_high_bits_are_the_even_columns():
    layer = QuantisedLinear(4, 1, False, CHATGLM_QUANTISATIONS[4])
    stored = torch.tensor([[0x7F, 0x81]], dtype=torch.uint8).view(torch.int8)  # 7, -1, -8, 1
    layer.load_state_dict({"weight": stored, "weight_scale": torch.tensor([0.5], dtype=torch.float16)})
    assert layer.dequantise().tolist() == [[3.5, -0.5, -4.0, 0.5]]


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("bits", [8, 4])
def test_chatglm_s_own_files_at_full_size_are_told_by_their_tensors(tmp_path, bits, prefix):
    found = find_text_encoder(write_chatglm(tmp_path / "as-its-name-does-not-say.safetensors", bits, prefix))
    assert found.quantisation == CHATGLM_QUANTISATIONS[bits]
    assert found.config == TextEncoderConfig()


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_chatglm_s_own_file_computes_what_its_dequantised_weights_do(tmp_path, bits):
    config = TextEncoderConfig.from_dict(make_config())
    expected = seed_weights_(build_text_encoder(config)).state_dict()
    expected = {name: tensor.half().float() for name, tensor in expected.items()}
    tensors = {}
    for index, (name, tensor) in enumerate(expected.items()):
        if name.endswith(tuple(f"{part}.weight" for part in QUANTISED)):
            stored, scale = draw_chatglm_weight(*tensor.shape, bits, seed=index)
            tensors |= {name: stored, f"{name}_scale": scale}
            expected[name] = torch.from_numpy(apply_formula(stored, scale, bits, np.float32))
        else:
            tensors[name] = tensor.half()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(make_config()), encoding="utf-8")
    whole = build_text_encoder(config)
    whole.load_state_dict(expected)
    batch = TokenBatch.from_ids([draw_ids(11), draw_ids(3, seed=1)], 0)
    loaded = load_text_encoder(tmp_path, precision="fp32")
    for actual, wanted in zip(loaded.encode(batch), whole.encode(batch), strict=True):
        assert relative_error(actual, wanted) <= TOLERANCE


# Bounds of the relative error on normally distributed weights; the measured ones are 0.0060 and 0.0786.
@pytest.mark.parametrize(("precision", "bound"), [("quant8", 0.0062), ("quant4", 0.080)])
@pytest.mark.parametrize("columns", [96, 256, 1024])
def test_error_of_quantised_weights(precision, bound, columns):
    weight = draw(200, columns, deviation=0.02)
    assert 0 < get_relative_error(make_layer(weight, QUANTISATIONS[precision]).dequantise(), weight) <= bound


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 64), torch.ones(2, 64), -torch.ones(2, 64), draw(2, 64).abs() + 5, draw(2, 64, deviation=1e-4),
        draw(2, 64, deviation=3000), F.pad(draw(2, 63, deviation=0.01), (1, 0), value=10.0),
    ],
    ids=["zeros", "ones", "minus ones", "all positive", "tiny", "large", "one outlier"],
)  # fmt: skip
def test_no_value_is_off_by_more_than_the_rounding_of_its_group(weight, precision):
    """Half a step of the group's range, which zero is always in, and a 32nd of one for the zero point.

    What the rounding of a step to float16 pushes over the end of the range is cut off.
    """
    quantisation = QUANTISATIONS[precision]
    actual = make_layer(weight, quantisation).dequantise()
    size, levels = quantisation.get_group_size(weight.shape[1]), 15 if precision == "quant4" else 127
    groups = weight.view(2, -1, size)
    low, high = groups.min(dim=2).values.clamp(max=0), groups.max(dim=2).values.clamp(min=0)
    steps = ((high - low if precision == "quant4" else high.maximum(-low)) / levels).repeat_interleave(size, dim=1)
    rounding = (steps * 2.0**-11).clamp(min=2.0**-25)
    assert ((actual - weight).abs() <= steps * (0.5 + 1 / 32) + rounding * (levels + 1)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_told(value, precision):
    weight = draw(2, 64)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="infinity or no number"):
        quantise(weight, QUANTISATIONS[precision])


@pytest.mark.parametrize(("columns", "size"), [(4096, 32), (96, 32), (13696, 32), (48, 16), (10, 2)])
def test_groups_fit_the_layer(columns, size):
    assert QUANTISATIONS["quant4"].get_group_size(columns) == size
    assert Quantisation(bits=8).get_group_size(columns) == columns


def test_impossible_quantisations_are_told():
    with pytest.raises(ValueError, match="bits is 5"):
        Quantisation(bits=5)
    with pytest.raises(ValueError, match="7 inputs cannot be stored in 4 bits"):
        quantise(draw(3, 7), QUANTISATIONS["quant4"])


@pytest.mark.parametrize("block", [1, 700, 2**21])  # smaller than a row, a few rows with a rest, larger than the weight
@pytest.mark.parametrize("kind", ["half", *PRECISIONS])
@torch.no_grad()
def test_layers_compute_what_their_wide_weight_would(kind, block, monkeypatch):
    monkeypatch.setattr(quantised, "_CPU_BLOCK", block)
    weight, bias, inputs = draw(33, 128).half(), draw(33, seed=1), draw(2, 5, 128, seed=2)
    if kind == "half":
        layer = Linear(128, 33)
        layer.weight, layer.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        wide = weight.float()
    else:
        layer = make_layer(weight, QUANTISATIONS[kind], bias)
        wide = layer.dequantise()
    expected = F.linear(inputs, wide, bias)
    assert (layer(inputs) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    # Half precision in and out; computed in float32 in between, so that the output alone is rounded, to 8 bits.
    halved = layer.to(torch.bfloat16)(inputs.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert get_relative_error(halved, expected) <= 0.02


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_layer_moves_as_a_whole_and_is_counted(precision):
    layer = make_layer(draw(16, 64), QUANTISATIONS[precision], draw(16))
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert held == sum(parameter.nbytes for parameter in layer.parameters()) < 16 * 64 * 2
    there = layer.to("meta")
    assert {parameter.device.type for parameter in there.parameters()} == {"meta"}


@pytest.fixture
def saved(tmp_path):
    encoder = seed_weights_(build_text_encoder(TextEncoderConfig.from_dict(make_config())))
    (tmp_path / "config.json").write_text(json.dumps(make_config()), encoding="utf-8")
    save_file({name: tensor.half() for name, tensor in encoder.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantising_holds_one_tensor_of_the_file_at_a_time(saved, precision, monkeypatch):
    alive, most = weakref.WeakSet(), 0
    iterate = TextEncoderFiles.iterate

    def iterate_counted(self):
        nonlocal most
        for name, tensor in iterate(self):
            copy = tensor.clone()
            if name.endswith(tuple(f"{part}.weight" for part in QUANTISED)):
                alive.add(copy)
                most = max(most, len(alive))
            del tensor
            yield name, copy
            del copy

    monkeypatch.setattr(TextEncoderFiles, "iterate", iterate_counted)
    encoder = load_text_encoder(saved, precision=precision)
    # The one that is read while the last is still named by the loop.
    assert most <= 2
    assert not alive
    assert sum(isinstance(module, QuantisedLinear) for module in encoder.modules()) == 16


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_half_precision_stays_mapped(saved, precision):
    """The weights of the file are used as they are, in pages of the file, whatever is computed in."""
    encoder = load_text_encoder(saved, precision=precision)
    stored = encoder.encoder["layers"][0].mlp.dense_h_to_4h.weight
    assert stored.dtype == torch.float16
    maps = Path("/proc/self/maps")
    if maps.is_file():  # on Linux it can be seen
        lines = [line.split() for line in maps.read_text(encoding="utf-8").splitlines()]
        ranges = [line[0].split("-") for line in lines if line[-1] == str(saved / "model.safetensors")]
        assert any(int(start, 16) <= stored.data_ptr() < int(end, 16) for start, end in ranges)


@torch.no_grad()
def test_the_embedding_stays_on_the_cpu(saved):
    batch = TokenBatch.from_ids([draw_ids(9)], 0)
    expected = load_text_encoder(saved, precision="fp32").encode(batch)
    encoder = load_text_encoder(saved, precision="fp32", embedding_on_cpu=True)
    for actual, wanted in zip(encoder.encode(batch), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert not any("embedding" in name for name in encoder.state_dict())
    encoder.to("meta")
    table = encoder.embedding["word_embeddings"].table
    assert table.device.type == "cpu"
    assert table.shape == (100, 64)


def test_all_names_of_a_quantised_file_are_those_of_chatglm():
    for bits, quantisation in CHATGLM_QUANTISATIONS.items():
        encoder = build_text_encoder(TextEncoderConfig(), device="meta", quantisation=quantisation)
        assert {name: tuple(t.shape) for name, t in encoder.state_dict().items()} == get_chatglm_shapes(bits)
