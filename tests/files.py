"""Model files with true names, shapes and sizes that take neither time nor disk: holes in place of values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path

import torch

BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
CHATGLM3 = {"hidden": 4096, "ffn": 13696, "qkv": 4608, "layers": 28, "vocabulary": 65024}
QUANTISED = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

Shapes = Mapping[str, tuple[int, ...]]


def write_holes(path: Path, shapes: Shapes, dtype: str = "F16", dtypes: Mapping[str, str] | None = None) -> Path:
    """Writes a valid safetensors file whose values are a hole: all zero, no disk used.

    Args:
        path: of the new file; its folder is made.
        shapes: name → shape.
        dtype: safetensors' word for the number format of all tensors but
        dtypes: those named here.
    """
    header, offset = {}, 0
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, dtype)
        end = offset + prod(shape) * BYTES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path


def write_pickle(path: Path, shapes: Shapes) -> Path:
    """Writes a file of ``torch.save`` with these shapes, each tensor one value repeated: a few kilobytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.zeros(1, dtype=torch.float16).expand(shape) for name, shape in shapes.items()}, path)
    return path


def get_chatglm_shapes(bits: int = 16, prefix: str = "", **sizes: int) -> dict[str, tuple[int, ...]]:
    """Gives ChatGLM3's names and shapes; with 8 or 4 bits those of its own quantised form.

    Source: the reference folder's state_dict_shapes.json (compared in a test); THUDM/chatglm3-6b-base for the
    prefix; chatglm's quantization.py for the quantised form.
    """
    size = {**CHATGLM3, **sizes}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (size["vocabulary"], size["hidden"]),
        "rotary_pos_emb.inv_freq": (32,),
    }
    linears = dict(
        zip(
            QUANTISED,
            (
                (size["qkv"], size["hidden"]),
                (size["hidden"], size["hidden"]),
                (2 * size["ffn"], size["hidden"]),
                (size["hidden"], size["ffn"]),
            ),
            strict=True,
        )
    )
    for layer in range(size["layers"]):
        start = f"encoder.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}{norm}.weight"] = (size["hidden"],)
        shapes[f"{start}self_attention.query_key_value.bias"] = (size["qkv"],)
        for name, (rows, columns) in linears.items():
            shapes[f"{start}{name}.weight"] = (rows, columns * bits // 8 if bits < 16 else columns)
            if bits < 16:
                shapes[f"{start}{name}.weight_scale"] = (rows,)
    shapes["encoder.final_layernorm.weight"] = (size["hidden"],)
    if bits == 16:
        shapes["output_layer.weight"] = (size["vocabulary"], size["hidden"])
    return {prefix + name: shape for name, shape in shapes.items()}


def write_chatglm(path: Path, bits: int = 16, prefix: str = "", **sizes: int) -> Path:
    """Writes ChatGLM3 as one file of holes."""
    shapes = get_chatglm_shapes(bits, prefix, **sizes)
    quantised = {name: "I8" for name in shapes if bits < 16 and f"{name}_scale" in shapes}
    return write_holes(path, shapes, dtypes=quantised)


@cache
def get_unet_shapes(in_channels: int = 4, is_kolors: bool = True) -> dict[str, tuple[int, ...]]:
    """Gives names and shapes of the full-size UNet of Kolors, or of SDXL, in diffusers' names."""
    from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet

    sdxl = {"encoder_hid_dim": None, "encoder_hid_dim_type": None, "projection_class_embeddings_input_dim": 2816}
    config = {**KOLORS_UNET_CONFIG, "in_channels": in_channels, **({} if is_kolors else sdxl)}
    return {name: tuple(tensor.shape) for name, tensor in build_unet(config, device="meta").state_dict().items()}


@cache
def get_vae_shapes(latent_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """Gives names and shapes of SDXL's VAE in diffusers' names."""
    from diffusers import AutoencoderKL

    from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG

    with torch.device("meta"):
        vae = AutoencoderKL.from_config({**SDXL_VAE_CONFIG, "latent_channels": latent_channels})
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def get_lora_shapes(rank: int = 4) -> dict[str, tuple[int, ...]]:
    """Gives names and shapes of a LoRA on the query projections."""
    shapes = {}
    for name, shape in get_unet_shapes().items():
        if name.endswith("attn1.to_q.weight"):
            base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            shapes |= {f"{base}.lora_down.weight": (rank, shape[1]), f"{base}.lora_up.weight": (shape[0], rank)}
    return shapes
