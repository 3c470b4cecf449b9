"""A frozen linear layer with a low-rank adapter, made for training: one node in autograd's graph instead of eight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class LowRankProduct(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with gradients for x, A and B alone.

    What autograd would make of the parts is the same sums; here the products add into each other's results, so that
    nothing of the size of x or y is read or written just to scale, cast or add it. B tokens stand in M rows.

    Source: Hu et al. 2021, equation 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor,
        up: torch.Tensor, scale: float, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """Gives y (..., out), in ``dtype``; x (..., in), weight (out, in), down A (r, in), up B (out, r)."""
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (M, in)
        low = rows @ down.to(dtype).t()  # (M, r)
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # (M, out)
        y.addmm_(low, up.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape, ctx.x_dtype = scale, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gives the gradients of x, A and B; the adapter's in its own dtype."""
        rows, low, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # (M, out)
        low_grad = (grad @ up.to(grad.dtype)).mul_(ctx.scale)  # (M, r)
        down_grad = (low_grad.t() @ rows).to(down.dtype)
        up_grad = (grad.t() @ low).mul_(ctx.scale).to(up.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight.to(grad.dtype)
            x_grad = x_grad.addmm_(low_grad, down.to(grad.dtype)).view(ctx.shape).to(ctx.x_dtype)
        return x_grad, None, None, down_grad, up_grad, None, None


class LowRankLinear(nn.Module):
    """Stands for peft's layer around a plain linear one, with its submodules under their names.

    Args:
        layer: peft's, without dropout.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer.base_layer
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scale = layer.scaling["default"]

    def forward(self, x: torch.Tensor, *unused: Any) -> torch.Tensor:
        """Gives x (..., in) → (..., out), in autocast's dtype where that is on."""
        base, kind = self.base_layer, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.weight.dtype
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        return LowRankProduct.apply(x, base.weight, base.bias, down, up, self.scale, dtype)


def replace_layers_(unet: nn.Module) -> None:
    """Puts ``LowRankLinear`` in place of peft's layers around plain linear ones; others, and any dropout, stay."""
    from peft.tuners.lora.layer import Linear

    for name, module in list(unet.named_modules()):
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            if isinstance(module.lora_dropout["default"], nn.Identity):
                parent, _, attribute = name.rpartition(".")
                setattr(unet.get_submodule(parent), attribute, LowRankLinear(module))
