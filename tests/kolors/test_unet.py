"""The UNet's configuration, and loading it from disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kolors_nodes.kolors.checkpoint import CheckpointError
from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet, load_unet
from kolors_nodes.kolors.unet_names import iterate_module_names

from .conftest import TINY_UNET


def test_full_size_names_and_shapes(reference):
    expected = json.loads((reference / "kolors" / "unet_state_dict_shapes.json").read_text(encoding="utf-8"))
    unet = build_unet(device="meta")
    assert {name: list(tensor.shape) for name, tensor in unet.state_dict().items()} == expected


def test_the_configuration_is_the_published_one(reference):
    published = json.loads((reference / "kolors" / "unet_config.json").read_text(encoding="utf-8"))
    ours = build_unet(device="meta").config
    for key, value in published.items():
        assert json.loads(json.dumps(ours[key])) == value, key
    assert set(KOLORS_UNET_CONFIG) <= set(published)


@pytest.fixture
def saved(tmp_path, tiny_unet):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY_UNET, "_class_name": "UNet2DConditionModel"}))
    weights = {name: tensor.half() for name, tensor in tiny_unet.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    return folder, weights


def test_loads_what_was_saved(saved):
    folder, weights = saved
    unet = load_unet(folder, precision="fp16", device="cuda")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in unet.state_dict().items())
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_converts_the_precision(saved):
    folder, weights = saved
    unet = load_unet(folder, precision="fp32")
    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, weights["conv_in.weight"].float())


def test_truncated_file(saved):
    folder, _ = saved
    file = folder / "diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="incomplete download"):
        load_unet(folder, precision="fp16", device="cuda")


def test_an_sdxl_unet_in_kolors_place(saved):
    folder, weights = saved
    del weights["encoder_hid_proj.weight"], weights["encoder_hid_proj.bias"]
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="is an SDXL UNet. Expected as the UNet: Kolors' UNet, unet.* of Kwai-"):
        load_unet(folder, precision="fp16")


def test_an_inpainting_unet(saved):
    folder, weights = saved
    weights["conv_in.weight"] = weights["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match="is Kolors' inpainting UNet"):
        load_unet(folder, precision="fp16")


def test_a_single_file_in_sgm_names(saved, tiny_unet, tmp_path):
    folder, weights = saved
    names = {name: sgm for name, sgm, _ in iterate_module_names(tiny_unet)}
    renamed = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        renamed[f"model.diffusion_model.{names[module]}.{kind}"] = tensor
    save_file(renamed, folder / "kolors.safetensors")  # beside its config.json
    loaded = load_unet(folder / "kolors.safetensors", precision="bf16").state_dict()
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in weights.items())


def test_another_model_s_configuration_beside_a_single_file(saved):
    """models/diffusion_models may hold anything: without Kolors' own configuration a file is taken for full size."""
    folder, _ = saved
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(CheckpointError, match=r"bias has the shape \(128,\), expected \(1280,\)"):
        load_unet(folder / "diffusion_pytorch_model.fp16.safetensors")


def test_missing_and_unknown_tensors_are_shown(saved):
    folder, weights = saved
    weights["conv_extra.weight"] = weights.pop("mid_block.resnets.0.conv1.weight")
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"missing \(mid_block.resnets.0.conv1.weight\), 1 are unknown \(conv_extra.weight\)"
    ):
        load_unet(folder, precision="fp16", device="cuda")


def test_no_weights_and_no_config(tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        load_unet(tmp_path, precision="fp16", device="cuda")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="No weights found"):
        load_unet(tmp_path, precision="fp16", device="cuda")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no readable JSON"):
        load_unet(tmp_path, precision="fp16", device="cuda")


def test_a_pickle_with_code_is_refused(saved):
    folder, _ = saved
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save({"conv_in.weight": print}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors and is refused"):
        load_unet(folder, precision="fp16", device="cuda")
