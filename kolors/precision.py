"""Precisions by name, and what stands in where a device cannot compute one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Precision → the name of torch's dtype.
PRECISIONS: Mapping[str, str] = MappingProxyType({"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"})

# What the UNet and the text encoder can be held in: the widgets' choices, in their order. The compact ones store only.
COMPACT_PRECISIONS = ("fp8", "nf4")
UNET_PRECISIONS = ("fp16", "bf16", "fp32", "fp8", "nf4")
TEXT_PRECISIONS = ("fp16", "quant4", "quant8", "bf16", "fp32")

logger = logging.getLogger(__name__)


def replace_precision(precision: str, device: torch.device | str) -> str:
    """Gives the precision to hold a UNet in on a device: the one asked for, or what stands in, with a log line.

    Apple's graphics have no float8; NF4, fp16 and bf16 they have.

    Raises:
        ValueError: no precision of UNets has this name.
    """
    import torch

    if precision not in UNET_PRECISIONS:
        raise ValueError(f"No precision is called {precision!r}. Choose one of: {', '.join(UNET_PRECISIONS)}.")
    if precision == "fp8" and torch.device(device).type == "mps":
        logger.info("%s has no fp8: holding the UNet in fp16 instead, twice as large. nf4 is smaller.", device)
        return "fp16"
    return precision


def get_compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Gives the dtype that a UNet of a precision computes in: its own, and for fp8 and nf4, which only store, that of
    fp16.

    Raises:
        ValueError: no precision has this name.
    """
    return get_dtype("fp16" if precision in COMPACT_PRECISIONS else precision, device)


def get_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Gives the dtype for a precision on a device.

    CPUs compute half precision slower than float32 and lack some kernels for it, so fp16 becomes float32
    there; graphics cards without bfloat16 arithmetic get float16. A log line says so.

    Raises:
        ValueError: no precision has this name.
    """
    import torch

    if precision not in PRECISIONS:
        raise ValueError(f"No precision is called {precision!r}. Choose one of: {', '.join(PRECISIONS)}.")
    device = torch.device(device)
    replacement = precision
    if device.type == "cpu" and precision == "fp16":
        replacement = "fp32"
    elif device.type == "cuda" and precision == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        replacement = "fp16"
    if replacement != precision:
        logger.info("%s is no precision for %s: computing in %s instead.", precision, device, replacement)
    return getattr(torch, PRECISIONS[replacement])
