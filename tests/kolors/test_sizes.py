"""Computed sizes against modules that were really loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kolors_nodes.kolors.checkpoint import read_json
from kolors_nodes.kolors.precision import TEXT_PRECISIONS, UNET_PRECISIONS
from kolors_nodes.kolors.sizes import get_streamed_bytes, get_text_encoder_bytes, get_unet_bytes, get_weight_bytes
from kolors_nodes.kolors.text_encoder import TextEncoderConfig, load_text_encoder
from kolors_nodes.kolors.unet import load_unet
from kolors_nodes.nodes.models import DEMO_FOLDER

from ..files import get_chatglm_shapes, get_unet_shapes

# Published by ComfyUI-KwaiKolorsWrapper for the text encoder, in GB: the note in its example workflows ("12", "8-9",
# "4-5", as observed) and its README ("~13", "~8", "~4").
PUBLISHED = {"fp16": (12, 13), "quant8": (8, 9, 8), "quant4": (4, 5, 4)}


def count(module: torch.nn.Module) -> int:
    """Bytes of the storages of everything that a module holds, found without its own lists."""
    storages = {}
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(storages.values())


@pytest.mark.parametrize("precision", UNET_PRECISIONS)
def test_a_loaded_unet(precision):
    folder = DEMO_FOLDER / "unet"
    computed = get_unet_bytes(read_json(folder / "config.json"), precision, "cpu")
    assert computed == count(load_unet(folder, precision=precision, device="cpu"))


@pytest.mark.parametrize("precision", TEXT_PRECISIONS)
def test_a_loaded_text_encoder(precision):
    folder = DEMO_FOLDER / "text_encoder"
    config = TextEncoderConfig.from_dict(read_json(folder / "config.json"))
    computed = get_text_encoder_bytes(config, precision, "cpu")
    assert computed == count(load_text_encoder(folder, precision=precision, device="cpu"))


def test_half_precision_is_what_the_published_files_hold():
    unet = sum(torch.Size(shape).numel() for shape in get_unet_shapes().values())
    assert get_weight_bytes("unet", "fp16") == 2 * unet
    head = "output_layer.weight"
    text = sum(torch.Size(shape).numel() for name, shape in get_chatglm_shapes().items() if name != head)
    assert get_weight_bytes("text_encoder", "fp16") == 2 * text
    folder = DEMO_FOLDER / "text_encoder"
    stored = load_file(folder / "model.safetensors")
    config = TextEncoderConfig.from_dict(read_json(folder / "config.json"))
    assert get_text_encoder_bytes(config, "fp16") == sum(
        tensor.nbytes for name, tensor in stored.items() if name != head
    )


@pytest.mark.parametrize("precision", PUBLISHED)
def test_less_than_the_existing_wrapper_in_every_row(precision):
    """Below the lowest published figure, with GB as 10^9 bytes; had they been GiB, the more so."""
    assert get_weight_bytes("text_encoder", precision) < min(PUBLISHED[precision]) * 1e9


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_s_table_is_computed(name):
    readme = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")

    def show(size: int) -> str:
        return f"{size / 1e9:.2f} GB"

    rows = {
        ("| fp32 (computes only", "| fp32（"): show(get_weight_bytes("text_encoder", "fp32")),
        "| quant8": show(get_weight_bytes("text_encoder", "quant8")),
        "| quant4": show(get_weight_bytes("text_encoder", "quant4")),
        "| fp32 |": show(get_weight_bytes("unet", "fp32")),
        "| fp8 |": show(get_weight_bytes("unet", "fp8")),
        "| nf4 |": show(get_weight_bytes("unet", "nf4")),
        "| `offload`": show(get_streamed_bytes()),
    }
    for beginning, size in rows.items():
        first = next(line for line in readme.splitlines() if line.startswith(beginning))
        assert size in first, (beginning, size)
    halves = [line for line in readme.splitlines() if line.startswith(("| fp16, bf16", "| fp16、bf16"))]
    expected = [show(get_weight_bytes(part, "fp16")) for part in ("text_encoder", "unet")]
    assert [size in line for size, line in zip(expected, halves, strict=True)] == [True, True]
    table = TextEncoderConfig().padded_vocab_size * TextEncoderConfig().hidden_size * 2
    assert show(get_weight_bytes("text_encoder", "quant4") - table) in readme
