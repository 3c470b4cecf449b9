"""Matrix products on x86 CPUs through oneDNN, which is faster there than what torch chooses.

For float32 torch calls MKL, whose AVX-512 code runs on Intel's CPUs alone: on a Zen 5 it gives 190 GFLOP/s on two
cores where oneDNN, which torch carries too and calls for convolutions, gives 420, from the same weights. Results
differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Multiplications below which the longer way into oneDNN costs more than it saves (measured: even at 2.4 million).
SMALL_PRODUCT = 2**21


@cache
def has_onednn() -> bool:
    """Whether oneDNN's operators are there and right. torch lists them under no public name, so they are tried."""
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    rows, weight, bias = torch.linspace(-1, 1, 48).view(2, 3, 8), torch.linspace(-2, 1, 40).view(5, 8), torch.ones(5)
    pictures, kernels = rows.view(2, 2, 3, 4), torch.linspace(-2, 1, 90).view(5, 2, 3, 3)
    try:
        product = call_onednn(rows, weight, bias)
        convolved = convolve_onednn(pictures, kernels, bias, (1, 1), (1, 1))
    except (AttributeError, RuntimeError, TypeError):  # another torch: an operator is missing or takes other inputs
        return False
    is_right = torch.allclose(product, F.linear(rows, weight, bias), atol=1e-5)
    return is_right and torch.allclose(convolved, F.conv2d(pictures, kernels, bias, padding=1), atol=1e-5)


def call_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Gives rows (..., K) times weight (N, K) transposed, plus bias: (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def convolve_onednn(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Convolves images (B, K, H, W) with kernels (N, K, h, w), packed or not: (B, N, H', W'), in the images' layout.

    ``torch.mkldnn_convolution`` does the same but gives plain images for channels-last ones.
    """
    return torch.ops.mkldnn._convolution_pointwise(images, weight, bias, padding, stride, (1, 1), 1, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """The same with gradients, whose products take the faster way too."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(rows if weight.requires_grad else None, weight if rows.requires_grad else None)
        return call_onednn(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)  # (M, N)
        grad_rows = call_onednn(grad, weight.t(), None) if needs_rows else None
        grad_weight = call_onednn(flat.t(), rows.flatten(0, -2).t(), None) if needs_weight else None
        return grad_rows, grad_weight, flat.sum(0) if needs_bias else None


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Does what ``torch.nn.functional.linear`` does, through oneDNN where that is faster.

    Args:
        rows: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    if torch.compiler.is_compiling() or not is_faster(rows, weight):  # the compiler has products of its own
        return F.linear(rows, weight, bias)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return OneDNNLinear.apply(rows, weight, bias)
    return call_onednn(rows, weight, bias)


def is_faster(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is the faster way: a large enough float32 product of plain tensors on a CPU that has it."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and rows.dim() > 1
        and rows.numel() * weight.shape[0] >= SMALL_PRODUCT
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and has_onednn()
    )


class FasterProducts(TorchFunctionMode):
    """Within it, every ``linear`` takes the faster way: for modules whose forward pass is not ours.

    Each call of torch costs about a microsecond more, so it pays where layers are large.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and len(args) in (2, 3) and not kwargs:
            return linear(*args)
        return function(*args, **(kwargs or {}))
