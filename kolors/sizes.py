"""How many bytes the weights of each part take at each precision: exact, from modules without weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .precision import COMPACT_PRECISIONS, PRECISIONS

if TYPE_CHECKING:
    from .text_encoder import TextEncoderConfig


def count_bytes(module: nn.Module) -> int:
    """Gives the bytes of a module's parameters and buffers; on the meta device too."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def get_unet_bytes(config: Mapping[str, Any], precision: str, device: torch.device | str | None = None) -> int:
    """Gives the bytes of a UNet's weights as ``load_unet`` holds them.

    Args:
        config: the content of its config.json.
        precision: one of ``UNET_PRECISIONS``.
        device: where it computes, which may replace the precision; None: one that has every precision.
    """
    from .precision import get_compute_dtype, replace_precision
    from .unet import build_unet, compact_

    unet = build_unet(config, device="meta")
    if device is None:
        dtype = getattr(torch, PRECISIONS.get(precision, PRECISIONS["fp16"]))
    else:
        precision = replace_precision(precision, device)
        dtype = get_compute_dtype(precision, device)
    if precision in COMPACT_PRECISIONS:
        return count_bytes(compact_(unet, precision, dtype))
    return sum(tensor.numel() * dtype.itemsize for tensor in unet.state_dict().values())


def get_text_encoder_bytes(config: TextEncoderConfig, precision: str, device: torch.device | str | None = None) -> int:
    """Gives the bytes of a text encoder's weights as ``load_text_encoder`` holds those of the published files.

    Args:
        config: its sizes.
        precision: one of ``TEXT_PRECISIONS``. In fp32 it computes only: the weights stay as published, in fp16.
        device: as in ``get_unet_bytes``.
    """
    from .text_encoder import RMSNorm, build_text_encoder, get_compute_dtype

    if device is None:
        dtype = getattr(torch, PRECISIONS.get(precision, PRECISIONS["fp16"]))
    else:
        dtype = get_compute_dtype(precision, device)
    encoder = build_text_encoder(config, device="meta", precision=precision)
    # Norms, biases and angles are held in the dtype that computes.
    small = [module.weight for module in encoder.modules() if isinstance(module, RMSNorm)]
    small += [parameter for name, parameter in encoder.named_parameters() if name.endswith(".bias")]
    small += list(encoder.buffers())
    return count_bytes(encoder) + sum(tensor.numel() * (dtype.itemsize - tensor.itemsize) for tensor in small)


@cache
def get_weight_bytes(part: str, precision: str, device: str | None = None) -> int:
    """Gives the bytes of the full-size model's weights in memory.

    Norms, biases, scales and the text encoder's embedding count; its language-model head is never loaded.

    Args:
        part: ``unet`` or ``text_encoder``.
        precision: one of the part's (``UNET_PRECISIONS``, ``TEXT_PRECISIONS``).
        device: where it computes, which may replace the precision; None: one that has every precision.
    """
    if part == "unet":
        from .unet import KOLORS_UNET_CONFIG

        return get_unet_bytes(KOLORS_UNET_CONFIG, precision, device)
    from .text_encoder import TextEncoderConfig

    return get_text_encoder_bytes(TextEncoderConfig(), precision, device)


@cache
def get_streamed_bytes() -> int:
    """Gives the bytes of the full-size UNet's weights on the device with the offload ``blocks``, in fp16."""
    from .offload import get_device_bytes
    from .unet import build_unet

    return get_device_bytes(build_unet(device="meta"), "blocks") // 2  # built in float32
