"""What lies on the disk: whole, cut off, lacking a shard or a tensor, or another model's."""

from __future__ import annotations

import json
import shutil

import pytest

from kolors_nodes.kolors.identify import FileKind
from kolors_nodes.kolors.inventory import Finding, inspect_part, read_precision
from kolors_nodes.kolors.vae import build_autoencoder, get_ldm_names
from kolors_nodes.nodes.models import DEMO_FOLDER

from ..files import get_chatglm_shapes, get_unet_shapes, get_vae_shapes, write_chatglm, write_holes, write_pickle


@pytest.mark.parametrize(
    ("part", "kind", "precision"),
    [
        ("unet", FileKind.KOLORS_UNET, "fp16"),
        ("text_encoder", FileKind.CHATGLM3, "fp16"),
        ("vae", FileKind.VAE, "fp16"),
    ],
)
def test_the_bundled_model_is_whole(part, kind, precision):
    folder = DEMO_FOLDER / part
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = inspect_part(folder, part)
    assert found == Finding(path=folder, part=part, kind=kind, precision=precision, size=size)


WHOLE = {
    "fp16": (lambda path: write_holes(path, get_unet_shapes()), "unet", "fp16"),
    "fp8": (lambda path: write_holes(path, get_unet_shapes(), "F8_E4M3"), "unet", "fp8"),
    "fp32": (lambda path: write_holes(path, get_unet_shapes(), "F32"), "unet", "fp32"),
    "text": (write_chatglm, "text_encoder", "fp16"),
    "text base": (lambda path: write_chatglm(path, prefix="transformer."), "text_encoder", "fp16"),
    "int8": (lambda path: write_chatglm(path, 8), "text_encoder", "int8"),
    "int4": (lambda path: write_chatglm(path, 4), "text_encoder", "int4"),
    "VAE": (lambda path: write_holes(path, get_vae_shapes(), "F32"), "vae", "fp32"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_single_files_of_full_size(tmp_path, name):
    write, part, precision = WHOLE[name]
    file = write(tmp_path / "file.safetensors")
    found = inspect_part(file, part)
    assert read_precision(file) == precision
    assert (found.problem, found.precision) == ("", precision)


def test_the_vae_in_ldm_s_names(tmp_path):
    names = {new: old for old, new in get_ldm_names(build_autoencoder(device="meta")).items()}
    shapes = {names[name]: shape for name, shape in get_vae_shapes().items()}
    assert inspect_part(write_holes(tmp_path / "sdxl.vae.safetensors", shapes), "vae").problem == ""
    del shapes["decoder.mid.attn_1.q.weight"]
    found = inspect_part(write_holes(tmp_path / "lacking.safetensors", shapes), "vae")
    assert "lacks 1 tensors (decoder.mid_block.attentions.0.to_q.weight)" in found.problem


def test_a_missing_tensor_is_named(tmp_path):
    shapes = get_chatglm_shapes()
    del shapes["encoder.layers.3.mlp.dense_4h_to_h.weight"]
    found = inspect_part(write_holes(tmp_path / "text.safetensors", shapes), "text_encoder")
    assert "lacks 1 tensors (encoder.layers.3.mlp.dense_4h_to_h.weight). Fetch it again." in found.problem


def test_a_missing_shard(tmp_path):
    folder = tmp_path / "text_encoder"
    shapes = list(get_chatglm_shapes().items())
    for number in range(7):
        write_pickle(folder / f"pytorch_model-{number + 1:05}-of-00007.bin", dict(shapes[number::7]))
    (folder / "config.json").write_text("{}")
    assert inspect_part(folder, "text_encoder").problem == ""
    (folder / "pytorch_model-00007-of-00007.bin").unlink()
    found = inspect_part(folder, "text_encoder")
    assert (found.kind, found.size) == (None, 0)
    assert "6 of 7 weight files" in found.problem


def test_a_truncated_file(tmp_path):
    shutil.copytree(DEMO_FOLDER / "unet", tmp_path / "unet")
    file = next((tmp_path / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "incomplete download" in inspect_part(tmp_path / "unet", "unet").problem


def test_a_missing_configuration(tmp_path):
    shutil.copytree(DEMO_FOLDER / "unet", tmp_path / "unet")
    (tmp_path / "unet" / "config.json").unlink()
    assert "Missing file" in inspect_part(tmp_path / "unet", "unet").problem


def test_the_wrong_model(tmp_path):
    found = inspect_part(write_chatglm(tmp_path / "file.safetensors", 8), "unet")
    assert found.kind is FileKind.CHATGLM3_INT8
    assert "Expected as the UNet: Kolors' UNet" in found.problem


def test_the_early_faulty_upload(tmp_path):
    """The first upload of Kolors' UNet lacked encoder_hid_proj, and stayed on many disks."""
    shapes = {name: shape for name, shape in get_unet_shapes().items() if not name.startswith("encoder_hid_proj")}
    file = write_holes(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", shapes)
    file.with_name("config.json").write_text(json.dumps({}))
    assert "early, faulty upload" in inspect_part(tmp_path / "unet", "unet").problem
