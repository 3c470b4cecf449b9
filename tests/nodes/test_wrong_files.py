"""Every kind of file in every place: the right one passes, a wrong one is told with the right one named.

All files have true names, shapes and sizes, with holes in place of values. What is wrong is told before anything
runs, from the header.
"""

from __future__ import annotations

import json

import pytest

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless.graph import Graph
from kolors_nodes.headless.host import HeadlessHost, use_host
from kolors_nodes.headless.validation import validate_prompt
from kolors_nodes.nodes.models import KOLORS

from ..files import (
    get_lora_shapes,
    get_unet_shapes,
    get_vae_shapes,
    write_chatglm,
    write_holes,
)

NAME = "model.safetensors"


def write_unet(path, **options):
    write_holes(path, get_unet_shapes(**options))


# Kind of file → what writes it, the parts that it is right for, what it is called, and where it belongs.
FILES = {
    "Kolors UNet": (write_unet, {"unet"}, "is Kolors' UNet", "models/diffusion_models"),
    "Kolors UNet, fp8": (
        lambda path: write_holes(path, get_unet_shapes(), "F8_E4M3"), {"unet"}, "is Kolors' UNet",
        "models/diffusion_models",
    ),
    "Kolors inpainting UNet": (
        lambda path: write_unet(path, in_channels=9), set(), "inpainting UNet (9 input channels)", "no node",
    ),
    "SDXL UNet": (
        lambda path: write_unet(path, is_kolors=False), set(), "is an SDXL UNet", "not for Kolors",
    ),
    "ChatGLM3": (write_chatglm, {"text_encoder"}, "is ChatGLM3", "models/LLM"),
    "ChatGLM3 with prefix": (
        lambda path: write_chatglm(path, prefix="transformer."), {"text_encoder"}, "is ChatGLM3", "models/LLM",
    ),
    "ChatGLM3 int8": (lambda path: write_chatglm(path, 8), {"text_encoder"}, "8-bit form", "models/LLM"),
    "ChatGLM3 int4": (lambda path: write_chatglm(path, 4), {"text_encoder"}, "4-bit form", "models/LLM"),
    "VAE": (lambda path: write_holes(path, get_vae_shapes(), "F32"), {"vae"}, "is a VAE", "models/vae"),
    "LoRA": (lambda path: write_holes(path, get_lora_shapes()), set(), "is a LoRA", "models/loras"),
    "something else": (
        lambda path: write_holes(path, {"text_model.embeddings.position_ids": (1, 77)}), set(),
        "something that this pack does not know", "not for Kolors",
    ),
}  # fmt: skip

# Place → folder of the file, part, node, its inputs, and how the right file is named.
PLACES = {
    "UNet folder": (
        "diffusers/Kolors/unet", "unet", "DownloadAndLoadKolorsModel", {"model": KOLORS, "precision": "fp16"},
    ),
    "UNet file": ("diffusion_models", "unet", "LoadKolorsUNet", {"unet_name": NAME}),
    "UNet file, old folder": ("unet", "unet", "LoadKolorsUNet", {"unet_name": NAME}),
    "text encoder folder": (
        "diffusers/Kolors/text_encoder", "text_encoder", "DownloadAndLoadChatGLM3",
        {"precision": "fp16", "model": KOLORS},
    ),
    "text encoder file": ("LLM", "text_encoder", "LoadChatGLM3", {"chatglm3_checkpoint": NAME}),
    "VAE file": ("vae", "vae", "KolorsVAELoader", {"vae_name": NAME}),
    "VAE folder": ("diffusers/Kolors/vae", "vae", "KolorsVAELoader", {"vae_name": "diffusers/Kolors/vae"}),
}  # fmt: skip
RIGHT_ONES = {
    "unet": "Kolors' UNet, unet/diffusion_pytorch_model.fp16.safetensors of Kwai-Kolors/Kolors",
    "text_encoder": "ChatGLM3, the text_encoder folder of Kwai-Kolors/Kolors",
    "vae": "a VAE of SDXL's kind, sdxl.vae.safetensors of madebyollin/sdxl-vae-fp16-fix",
}


def validate(models, node, inputs) -> list[str]:
    """What the host says of a loader before it runs; nothing if it would run."""
    with use_host(HeadlessHost(models_dir=models)):
        graph = Graph({"1": {"class_type": node, "inputs": inputs}}, NODE_CLASS_MAPPINGS)
        found = validate_prompt(graph, ["1"])
    return [error["details"] for node_errors in found.node_errors.values() for error in node_errors["errors"]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_in_every_place(tmp_path, kind, place):
    write, right_for, name, home = FILES[kind]
    folder, part, node, inputs = PLACES[place]
    file = tmp_path / folder / NAME
    write(file)
    if "diffusers" in folder:
        file.with_name("config.json").write_text(json.dumps({"_class_name": "any"}))
        file.with_name("tokenizer.model").write_bytes(b"tokenizer")
    errors = validate(tmp_path, node, inputs)
    if part in right_for:
        assert errors == []
        return
    (error,) = errors
    assert str(tmp_path / folder) in error
    assert name in error
    assert f"Expected as the {part.replace('unet', 'UNet').replace('vae', 'VAE').replace('_', ' ')}: " in error
    assert RIGHT_ONES[part] in error
    assert home in error.partition("This f")[2]
