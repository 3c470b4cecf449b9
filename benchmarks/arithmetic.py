"""Counting floating-point operations, with the fused kernels that torch's counter does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_attention(query_shape, key_shape, value_shape, *_: Any, **__: Any) -> int:
    """Counts attention in one kernel."""
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def count_linear(rows_shape, weight_shape, *_: Any, **__: Any) -> int:
    """Counts rows (..., K) times a weight (N, K)."""
    return 2 * math.prod(rows_shape) * weight_shape[0]


def count_convolution(rows_shape, weight_shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Counts a convolution with a weight (O, C, kh, kw)."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def get_fused_kernels() -> dict[Any, Callable[..., int]]:
    """Lists the kernels of CPUs that torch's counter leaves out, those that this torch has."""
    counters = {
        "aten._scaled_dot_product_flash_attention_for_cpu": count_attention,
        "aten.mkldnn_convolution": count_convolution,
        "mkldnn._linear_pointwise": count_linear,
        "mkl._mkl_linear": count_linear,
        "mkldnn._convolution_pointwise": count_convolution,
    }
    found = {}
    for name, counter in counters.items():
        namespace, operator = name.split(".")
        if hasattr(getattr(torch.ops, namespace), operator):
            found[getattr(getattr(torch.ops, namespace), operator)] = counter
    return found


def build_counter() -> FlopCounterMode:
    """Makes a counter that also knows the CPU's fused kernels."""
    return FlopCounterMode(display=False, custom_mapping=get_fused_kernels())


def count_flops(run: Callable[[], object]) -> int:
    """Counts the floating-point operations of one run, which serves as its warm-up."""
    with build_counter() as counter:
        run()
    return counter.get_total_flops()
