"""The loaders on files in all the places where people keep them."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolors_nodes.headless.host import HeadlessHost, use_host
from kolors_nodes.kolors.sizes import get_weight_bytes
from kolors_nodes.kolors.unet import load_unet
from kolors_nodes.nodes.loaders import (
    DownloadAndLoadChatGLM3,
    DownloadAndLoadKolorsModel,
    LoadChatGLM3,
    LoadKolorsUNet,
    list_checkpoints,
    resolve_checkpoint,
)
from kolors_nodes.nodes.models import DEMO_FOLDER

from ..files import get_chatglm_shapes, write_chatglm, write_holes, write_pickle


@pytest.fixture
def host(tmp_path):
    with use_host(HeadlessHost(models_dir=tmp_path / "models", device="cpu")) as host:
        yield host


@pytest.mark.parametrize("folder", ["diffusion_models", "unet", "diffusion_models/kolors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_single_unet_file_in_its_own_precision(host, folder, dtype):
    weights = load_file(DEMO_FOLDER / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    target = host.models_dir / folder
    target.mkdir(parents=True)
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, target / "kolors.safetensors")
    shutil.copy(DEMO_FOLDER / "unet" / "config.json", target)
    name = "kolors/kolors.safetensors" if folder.count("/") else "kolors.safetensors"
    assert name in LoadKolorsUNet.INPUT_TYPES()["required"]["unet_name"][0]
    assert LoadKolorsUNet.VALIDATE_INPUTS(name) is True
    (model,) = LoadKolorsUNet().load_unet(name, offload="blocks")
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}[dtype]
    expected = load_unet(target / "kolors.safetensors", precision=precision).state_dict()
    assert model.offload == "blocks"
    found = model.unet.state_dict()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
               for name, tensor in expected.items())  # fmt: skip
    assert found["mid_block.resnets.0.conv1.weight"].dtype == dtype


def test_the_tooltip_s_sizes_are_the_computed_ones():
    tooltip = DownloadAndLoadKolorsModel.INPUT_TYPES()["required"]["precision"][1]["tooltip"]
    fp16, fp32, fp8, nf4 = (get_weight_bytes("unet", name) / 1e9 for name in ("fp16", "fp32", "fp8", "nf4"))
    assert f"fp16 and bf16 take {fp16:.1f} GB, fp32 {fp32:.1f} GB, fp8 {fp8:.1f} GB, nf4 {nf4:.1f} GB" in tooltip
    tooltip = DownloadAndLoadChatGLM3.INPUT_TYPES()["required"]["precision"][1]["tooltip"]
    fp16, quant8, quant4 = (get_weight_bytes("text_encoder", name) / 1e9 for name in ("fp16", "quant8", "quant4"))
    assert f"fp32 take {fp16:.1f} GB (fp32 computes only), quant8 {quant8:.1f} GB, quant4 {quant4:.1f} GB" in tooltip


def test_text_encoders_are_listed_from_both_folders_without_what_lies_beside_them(host):
    shapes = get_chatglm_shapes(layers=2)
    for folder, name in (
        ("LLM", "one.safetensors"),
        ("LLM/checkpoints", "two.safetensors"),
        ("text_encoders", "three.safetensors"),
    ):
        write_holes(host.models_dir / folder / name, shapes)
    base = host.models_dir / "LLM" / "chatglm3-6b-base"
    for number in (1, 2, 3):
        write_pickle(base / f"pytorch_model-{number:05}-of-00003.bin", shapes)
    for name in ("config.json", "tokenizer.model", "pytorch_model.bin.index.json"):
        (base / name).write_text("{}")
    assert list_checkpoints(host) == [
        "chatglm3-6b-base/pytorch_model-00001-of-00003.bin", "two.safetensors", "one.safetensors", "three.safetensors",
    ]  # fmt: skip
    assert resolve_checkpoint(host, "three.safetensors").parent.name == "text_encoders"
    assert resolve_checkpoint(host, "chatglm3-6b-base/pytorch_model-00001-of-00003.bin") == base


@pytest.mark.parametrize(
    ("bits", "prefix", "precision", "stored"),
    [(16, "", "as file", "fp16"), (16, "transformer.", "quant4", "quant4"), (8, "", "as file", "fp16"),
     (4, "transformer.", "as file", "fp16")],
)  # fmt: skip
def test_a_single_text_encoder_file_is_looked_at_and_not_loaded(host, bits, prefix, precision, stored):
    """Of full size, though nothing but its header is read until a text is encoded. The file's name misleads."""
    write_chatglm(host.models_dir / "LLM" / "checkpoints" / "chatglm3-4bit-8bit.safetensors", bits, prefix)
    shutil.copy(DEMO_FOLDER / "tokenizer" / "tokenizer.model", host.models_dir / "LLM" / "checkpoints")
    name = "chatglm3-4bit-8bit.safetensors"
    assert LoadChatGLM3.INPUT_TYPES()["required"]["chatglm3_checkpoint"][0] == [name]
    assert LoadChatGLM3.VALIDATE_INPUTS(name) is True
    (model,) = LoadChatGLM3().loadmodel(name, precision=precision, embedding_on_cpu=True)
    quantisation = model.files.quantisation
    assert (quantisation.bits if quantisation else 16) == bits
    assert (model.precision, model.embedding_on_cpu) == (stored, True)
    assert "text_encoder" not in vars(model)
