"""What a file is, from its header alone."""

from __future__ import annotations

import json

import pytest
import torch

from kolors_nodes.kolors.checkpoint import CheckpointError
from kolors_nodes.kolors.identify import KOLORS_UNETS, TEXT_ENCODERS, VAES, FileKind, check_kind, classify, identify
from kolors_nodes.nodes.models import DEMO_FOLDER, DEMO_LORAS

from ..files import (
    get_chatglm_shapes,
    get_lora_shapes,
    get_unet_shapes,
    get_vae_shapes,
    write_chatglm,
    write_holes,
    write_pickle,
)


def test_the_synthetic_files_have_the_published_names_and_shapes(reference):
    published = json.loads((reference / "chatglm3" / "state_dict_shapes.json").read_text(encoding="utf-8"))
    assert {name: list(shape) for name, shape in get_chatglm_shapes().items()} == published
    published = json.loads((reference / "kolors" / "unet_state_dict_shapes.json").read_text(encoding="utf-8"))
    assert {name: list(shape) for name, shape in get_unet_shapes().items()} == published


def rename(shapes, prefix):
    return {prefix + name: shape for name, shape in shapes.items()}


def without(shapes, *starts):
    return {name: shape for name, shape in shapes.items() if not name.startswith(starts)}


SGM = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0"}


def sgm(is_kolors=True):
    """Kolors' or SDXL's UNet in a single file as ComfyUI saves it; only the names that tell are needed here."""
    shapes = {}
    for name, shape in get_unet_shapes(is_kolors=is_kolors).items():
        for diffusers_name, sgm_name in SGM.items():
            name = name.replace(diffusers_name, sgm_name)
        shapes["model.diffusion_model." + name] = shape
    return shapes


FILES = {
    "Kolors": (get_unet_shapes, FileKind.KOLORS_UNET),
    "Kolors in SGM's names": (sgm, FileKind.KOLORS_UNET),
    "Kolors inpainting": (lambda: get_unet_shapes(9), FileKind.KOLORS_INPAINTING_UNET),
    "early upload": (lambda: without(get_unet_shapes(), "encoder_hid_proj"), FileKind.FAULTY_KOLORS_UNET),
    "SDXL": (lambda: get_unet_shapes(is_kolors=False), FileKind.SDXL_UNET),
    "SDXL in SGM's names": (lambda: sgm(False), FileKind.SDXL_UNET),
    "SDXL checkpoint": (
        lambda: {**sgm(False), **rename(get_vae_shapes(), "first_stage_model.")},
        FileKind.SDXL_CHECKPOINT,
    ),
    "ChatGLM3": (get_chatglm_shapes, FileKind.CHATGLM3),
    "ChatGLM3 base": (lambda: get_chatglm_shapes(prefix="transformer."), FileKind.CHATGLM3),
    "a late shard": (lambda: without(get_chatglm_shapes(), "embedding", "encoder.layers.0."), FileKind.CHATGLM3),
    "GLM-4": (lambda: get_chatglm_shapes(layers=40, vocabulary=151552), FileKind.GLM4),
    "VAE": (get_vae_shapes, FileKind.VAE),
    "Flux's VAE": (lambda: get_vae_shapes(16), FileKind.FOREIGN_VAE),
    "LoRA": (get_lora_shapes, FileKind.LORA),
    "ControlNet": (
        lambda: {**without(get_unet_shapes(), "up_blocks", "conv_out"), "controlnet_mid_block.weight": (8, 8, 1, 1)},
        FileKind.CONTROLNET,
    ),
    "IP-Adapter": (lambda: {"image_proj.latents": (1, 16, 2048)}, FileKind.IP_ADAPTER),
    "CLIP": (lambda: {"text_model.embeddings.token_embedding.weight": (49408, 768)}, FileKind.OTHER),
}


@pytest.mark.parametrize("name", FILES)
def test_safetensors(tmp_path, name):
    make, kind = FILES[name]
    # The name of the file is none of the evidence.
    assert identify(write_holes(tmp_path / "kolors_4bit_inpaint_vae.safetensors", make())) is kind


@pytest.mark.parametrize("name", ["Kolors", "ChatGLM3", "ChatGLM3 base", "VAE", "LoRA", "IP-Adapter"])
def test_pickles(tmp_path, name):
    make, kind = FILES[name]
    assert identify(write_pickle(tmp_path / "file.bin", make())) is kind


def test_tables_within_a_pickle(tmp_path):
    torch.save({"image_proj": {"latents": torch.zeros(1)}, "ip_adapter": {}}, tmp_path / "adapter.bin")
    assert identify(tmp_path / "adapter.bin") is FileKind.IP_ADAPTER


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3"])
def test_the_number_format_of_a_unet_does_not_matter(tmp_path, dtype):
    assert identify(write_holes(tmp_path / "unet.safetensors", get_unet_shapes(), dtype)) is FileKind.KOLORS_UNET


@pytest.mark.parametrize(("bits", "kind"), [(8, FileKind.CHATGLM3_INT8), (4, FileKind.CHATGLM3_INT4)])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_width_is_told_by_the_tensors(tmp_path, bits, kind, prefix):
    misleading = tmp_path / f"chatglm3-{12 - bits}bit.safetensors"
    assert identify(write_chatglm(misleading, bits, prefix)) is kind
    tiny = {"hidden": 96, "ffn": 256, "qkv": 160, "layers": 2, "vocabulary": 576}
    assert identify(write_chatglm(tmp_path / "tiny.safetensors", bits, prefix, **tiny)) is kind


def test_integers_in_another_form_are_not_taken_for_chatglm_s(tmp_path):
    shapes = get_chatglm_shapes(layers=1)
    packed = {name: "U8" for name in shapes if "query_key_value.weight" in name}
    assert identify(write_holes(tmp_path / "bnb.safetensors", shapes, dtypes=packed)) is FileKind.OTHER


def test_folders_of_the_bundled_model():
    kinds = {part: identify(DEMO_FOLDER / part) for part in ("unet", "text_encoder", "vae")}
    assert kinds == {"unet": FileKind.KOLORS_UNET, "text_encoder": FileKind.CHATGLM3, "vae": FileKind.VAE}
    assert all(identify(file) is FileKind.LORA for file in DEMO_LORAS.glob("*.safetensors"))


def test_shards_are_read_together(tmp_path):
    shapes = get_chatglm_shapes()
    for number in range(7):
        part = {name: shape for index, (name, shape) in enumerate(shapes.items()) if index * 7 // len(shapes) == number}
        write_pickle(tmp_path / f"pytorch_model-{number + 1:05}-of-00007.bin", part)
    assert identify(tmp_path) is FileKind.CHATGLM3
    (tmp_path / "pytorch_model-00003-of-00007.bin").unlink()
    with pytest.raises(CheckpointError, match="holds 6 of 7 weight files"):
        identify(tmp_path)


def test_a_file_saved_by_hand_under_another_name(tmp_path):
    write_holes(tmp_path / "diffusion_pytorch_model (1).safetensors", get_unet_shapes())
    assert identify(tmp_path) is FileKind.KOLORS_UNET


NO_CHECKPOINTS = {
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of Git LFS"),
    "page.safetensors": (b"<!DOCTYPE html><html>", "a web page"),
    "model.gguf": (b"GGUF\x03\0\0\0", "is a GGUF file"),
    "empty.safetensors": (b"", "is empty"),
    "noise.bin": (b"noise" * 9, "damaged, or no file of PyTorch 1.6"),
    "noise.safetensors": (b"noise" * 9, "damaged or an incomplete download"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_at_all(tmp_path, name):
    content, message = NO_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        identify(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated(tmp_path, suffix):
    file = tmp_path / f"unet.{suffix}"
    (write_holes if suffix == "safetensors" else write_pickle)(file, get_unet_shapes())
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="incomplete download"):
        identify(file)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="Nothing is at"):
        identify(tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="No weights found"):
        identify(tmp_path)


@pytest.mark.parametrize("expected", [KOLORS_UNETS, TEXT_ENCODERS, VAES])
@pytest.mark.parametrize("name", FILES)
def test_the_message_names_what_it_is_what_belongs_there_and_where_it_belongs(tmp_path, name, expected):
    make, kind = FILES[name]
    file = write_holes(tmp_path / "file.safetensors", make())
    if kind in expected:
        assert check_kind(file, expected, "the UNet") is kind
        return
    with pytest.raises(CheckpointError) as error:
        check_kind(file, expected, "the UNet")
    text = str(error.value)
    assert text.startswith(f"{file} is {kind.value}. Expected as the UNet: ")
    assert " of " in text.split("Expected as ")[1]
    assert text.rsplit(". This file ")[1].startswith(("belongs in", "has no node", "is of no use", "is not for Kolors"))


def test_reading_a_header_takes_no_weights(tmp_path):
    """5 GB in 1,682 tensors: the header alone is read, or this would take seconds."""
    import time

    file = write_holes(tmp_path / "unet.safetensors", get_unet_shapes())
    assert file.stat().st_size > 5e9
    start = time.process_time()
    identify(file)
    assert time.process_time() - start < 1
    assert classify({}) is FileKind.OTHER
