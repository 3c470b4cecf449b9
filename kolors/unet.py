"""Kolors' UNet: diffusers' UNet2DConditionModel in SDXL's shape, with a projection for ChatGLM3's text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint import (
    CheckpointError,
    OnProgress,
    describe_bytes,
    find_weight_files,
    iterate_tensors,
    load_weights_,
    read_config,
    read_pages,
)
from .compact import CompactLayer, Float8Conv2d, Float8Linear, NF4Linear
from .identify import check_part
from .precision import COMPACT_PRECISIONS, get_compute_dtype, replace_precision
from .unet_names import rename_tensors

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Source: unet/config.json of Kwai-Kolors/Kolors, where it differs from the defaults of diffusers.
KOLORS_UNET_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 5632,
    }
)


def build_unet(
    config: Mapping[str, Any] = KOLORS_UNET_CONFIG, *, device: torch.device | str = "cpu"
) -> UNet2DConditionModel:
    """Makes a UNet with fresh float32 weights (``device="meta"``: with none at all)."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        return UNet2DConditionModel.from_config(dict(config)).eval()


def load_unet(
    path: str | Path,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> UNet2DConditionModel:
    """Loads the ``unet`` folder of a Kolors model, or one file of it, memory-mapped, onto the CPU.

    A file may have diffusers' or SGM's names, and any prefix.

    Args:
        path: the folder or the file.
        precision: one of ``UNET_PRECISIONS``.
        device: where it will compute; what that cannot do is replaced, with a line in the log.
        on_progress: called as the weights arrive.

    Raises:
        ValueError: no precision has this name.
        CheckpointError: it is missing or incomplete, a file is damaged, or it is another model's UNet.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"UNet not found: {path}.")
    config = read_config(path, KOLORS_UNET_CONFIG, "encoder_hid_dim_type")
    check_part(path, "unet")
    tensors = iterate_tensors(find_weight_files(path))
    precision = replace_precision(precision, device)
    dtype = get_compute_dtype(precision, device)
    unet = build_unet(config, device="meta")
    tensors = rename_tensors(tensors, unet)
    if precision not in COMPACT_PRECISIONS:
        return load_weights_(unet, tensors, dtype=dtype, source=path, on_progress=on_progress)
    # As they lie in the file, mapped; each is read when it is made compact, and let go.
    load_weights_(unet, tensors, dtype=None, source=path)
    return compact_(unet, precision, dtype, on_progress)


@torch.no_grad()
def compact_(
    unet: UNet2DConditionModel, precision: str, dtype: torch.dtype, on_progress: OnProgress | None = None
) -> UNet2DConditionModel:
    """Stores the weights of a UNet's blocks compactly, layer by layer, and converts all others.

    fp8: all linear layers and convolutions of the blocks, 99 % of the weights; those that are float8 already are
    kept bit for bit. nf4: the linear layers of the transformers, 86 % of the weights. What lies outside of the blocks,
    norms and biases are small, and stay in the dtype that computes.

    Args:
        unet: on the CPU; or on the meta device, to learn sizes.
        precision: one of ``COMPACT_PRECISIONS``.
        dtype: what it computes in.
        on_progress: called after each layer, with the bytes that are read by then.
    """
    total = sum(parameter.nbytes for parameter in unet.parameters())
    done = 0
    for name, module in list(unet.named_modules()):
        if not isinstance(module, CompactLayer) and (layer_class := _get_compact_class(name, module, precision)):
            parent, _, attribute = name.rpartition(".")
            done += sum(parameter.nbytes for parameter in module.parameters())
            read_pages(module.weight)
            module.bias = None if module.bias is None else _convert(module.bias, dtype)
            setattr(unet.get_submodule(parent), attribute, layer_class(module))
        else:
            own = dict(module.named_parameters(recurse=False))
            done += sum(parameter.nbytes for parameter in own.values())
            for attribute, parameter in own.items():
                setattr(module, attribute, _convert(parameter, dtype))
        if on_progress:
            on_progress(done, total, f"Loading the UNet as {precision}: {describe_bytes(done, total)}")
    return unet


def _get_compact_class(name: str, module: nn.Module, precision: str) -> type[CompactLayer] | None:
    if not name.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return None
    if precision == "nf4":
        return NF4Linear if isinstance(module, nn.Linear) and ".attentions." in name else None
    return {nn.Linear: Float8Linear, nn.Conv2d: Float8Conv2d}.get(type(module))


def _convert(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
