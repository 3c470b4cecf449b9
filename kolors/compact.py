"""Layers that hold their weights in fewer bits than they compute in: float8 and NF4, in plain torch.

They run on every device, need no hook and no other package, change nothing when they run, and copy like any layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

# The 16 values of NF4: quantiles of the normal distribution, scaled to [-1, 1], zero among them.
# Source: Dettmers et al. 2023 (QLoRA), appendix E; bitsandbytes' table.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class CompactLayer(nn.Module):
    """A layer whose weight is stored compactly and put together for each pass, in the dtype of the input.

    Low-rank matrices can lie beside the weight: rounded into it, most of a LoRA would be lost between two steps of
    the grid.
    """

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gives the weight, in its own shape."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the weight has outside of its storage."""
        raise NotImplementedError

    def to_plain(self, weight: torch.Tensor) -> nn.Module:
        """Gives torch's own layer with a weight instead of the stored one, and the same bias."""
        raise NotImplementedError

    def set_branch_(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Puts low-rank matrices beside the weight: the layer computes as if up · down were added to it.

        Args:
            down: (r, in), or of a convolution (r, in, kh, kw).
            up: (out, r) or (out, r, 1, 1), with all factors.
        """
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def _add_branch(self, output: torch.Tensor, inputs: torch.Tensor, down: Callable, up: Callable) -> torch.Tensor:
        if getattr(self, "down", None) is None:
            return output
        return output + up(down(inputs, self.down.to(inputs.dtype)), self.up.to(inputs.dtype))

    def _get_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class CompactLinear(CompactLayer, nn.Linear):
    """A linear layer with a compact weight. Made from another by a class's ``from_layer``."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def to_plain(self, weight: torch.Tensor) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = F.linear(inputs, self.dequantise(inputs.dtype), self._get_bias(inputs.dtype))
        return self._add_branch(output, inputs, F.linear, F.linear)


class Float8Linear(CompactLinear):
    """A linear layer that stores its weight as float8; see ``to_float8``."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        _set_float8_(self, layer.weight)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return from_float8(self.weight, self.scale, dtype)


class Float8Conv2d(CompactLayer, nn.Conv2d):
    """A convolution that stores its weight as float8; see ``to_float8``."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias=False, padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
        self.bias = layer.bias
        _set_float8_(self, layer.weight)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def to_plain(self, weight: torch.Tensor) -> nn.Conv2d:
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, bias=False, padding_mode=self.padding_mode, device="meta",
        )  # fmt: skip
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return layer

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return from_float8(self.weight, self.scale, dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self._conv_forward(inputs, self.dequantise(inputs.dtype), self._get_bias(inputs.dtype))
        return self._add_branch(output, inputs, lambda x, down: self._conv_forward(x, down, None), F.conv2d)


class NF4Linear(CompactLinear):
    """A linear layer that stores its weight as NF4; see ``to_nf4``."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        packed, absmax = to_nf4(layer.weight.detach())
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return from_nf4(self.weight, self.absmax, dtype).view(self.weight_shape)


def get_weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Gives the shape of a layer's weight, also where it is stored in another."""
    return module.weight_shape if isinstance(module, CompactLayer) else tuple(module.weight.shape)


def expand_(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Puts torch's own layers in place of the compact ones, with the weights that these stand for and branches."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, CompactLayer):
            weight = layer.dequantise()
            if getattr(layer, "down", None) is not None:
                weight += (layer.up.float().flatten(1) @ layer.down.float().flatten(1)).view(weight.shape)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.to_plain(weight.to(dtype)))
    return module


def _set_float8_(layer: nn.Module, weight: torch.Tensor) -> None:
    stored, scale = to_float8(weight.detach())
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)


def to_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stores a weight as float8 (e4m3: 4 bits of exponent, 3 of mantissa), each output with a power of two beside it.

    Without that factor most weights of a UNet, around 0.02, lie where e4m3 has no exponents left: the error of
    normally distributed ones is 2.6 % with it, without it 3.3 % at a deviation of 0.02 and 19 % at 0.003.

    Args:
        weight: (out, ...). Float8 already: is kept, bit for bit.

    Returns:
        The stored weight and the factors, (out, 1, ...) in float32; None for a weight that was float8.
    """
    if weight.dtype in _FLOAT8:
        return weight, None
    largest = weight.abs().flatten(1).amax(1).float().clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.ceil(torch.log2(largest / torch.finfo(torch.float8_e4m3fn).max)))
    scale = scale.view(-1, *(1 for _ in weight.shape[1:]))
    return (weight / scale).to(torch.float8_e4m3fn), scale


def from_float8(stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Gives the weight that ``to_float8`` stored, exactly, in a dtype that holds it."""
    weight = stored.to(dtype)
    return weight if scale is None else weight * scale.to(dtype)


def to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stores a weight as NF4: 4 bits each, the index of the nearest of 16 values, times the block's largest number.

    Args:
        weight: any shape, an even number of elements; blocks of 64 run through it in memory order.

    Returns:
        uint8 (elements / 2), the first of two in the high bits, and float32 (blocks).

    Source: agrees with bitsandbytes' NF4 without double quantisation.
    """
    size = weight.numel()
    blocks = F.pad(weight.flatten().float(), (0, -size % NF4_BLOCK)).view(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(1)
    blocks = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    values = torch.tensor(NF4_VALUES, device=weight.device)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=weight.device)
    for border in (values[1:] + values[:-1]) / 2:  # counting those below is faster than torch's search
        codes += blocks > border
    codes = codes.flatten()[:size].view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], absmax


def from_nf4(packed: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gives the elements that ``to_nf4`` stored, in one row."""
    pairs = _get_nf4_pairs(packed.device, dtype)
    flat = F.embedding(packed.int(), pairs).flatten()
    whole = flat.numel() // NF4_BLOCK * NF4_BLOCK
    absmax = absmax.to(dtype)
    flat[:whole].view(-1, NF4_BLOCK).mul_(absmax[: whole // NF4_BLOCK, None])
    flat[whole:].mul_(absmax[-1])
    return flat


@cache
def _get_nf4_pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Gives the two values of every byte, (256, 2)."""
    values = torch.tensor(NF4_VALUES, device=device, dtype=dtype)
    codes = torch.arange(256, device=device)
    return values[torch.stack([codes // 16, codes % 16], dim=1)]
