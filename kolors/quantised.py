"""Linear layers that store their weights narrower than they compute: in half precision, 8 or 4 bits.

A layer is computed in blocks of output rows: a block is widened into a small buffer and multiplied at once. The wide
weight never exists, and a CPU multiplies a block from its cache: that is faster than the same layer stored wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from .products import linear

# Elements of a block. On a CPU 8 MiB of float32 stay in the cache; other devices want few launches.
_CPU_BLOCK = 2**21
_DEVICE_BLOCK = 2**25

# float16's smallest number stands in for the step of a group of zeros.
_SMALLEST_STEP = 2.0**-24
# A group's zero point is stored in sixteenths of a step.
_ZERO_UNITS = 16


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the weight of a linear layer is stored in integers.

    Attributes:
        bits: 8, or 4: two values in a byte, the one of the lower column in the high bits.
        group_size: columns that share a step size; 0: all of a row.
        has_zero: whether a group's range may lie off zero's middle.
    """

    bits: int
    group_size: int = 0
    has_zero: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits}, expected 4 or 8.")

    def get_group_size(self, columns: int) -> int:
        """Gives the columns of a group in a layer of so many: the wished number, or the largest part of it that fits.

        Raises:
            ValueError: the number of columns is odd, which two values in a byte need even.
        """
        if self.bits == 4 and columns % 2:
            raise ValueError(f"A linear layer of {columns} inputs cannot be stored in 4 bits: expected an even number.")
        return math.gcd(columns, self.group_size) if self.group_size else columns


# The text encoder's precisions. Groups of 32 with a zero point take 4.75 bits a weight and err by 7.8 % on normally
# distributed weights, where NF4 in groups of 64 (4.5 bits) errs by 9.2 % and one step size for a whole row by 15.8 %.
QUANTISATIONS: Mapping[str, Quantisation] = MappingProxyType(
    {"quant8": Quantisation(bits=8, group_size=64), "quant4": Quantisation(bits=4, group_size=32, has_zero=True)}
)
# ChatGLM's own files: one step size for each row. Source: ``QuantizedLinear`` in THUDM/chatglm3-6b's quantization.py.
CHATGLM_QUANTISATIONS: Mapping[int, Quantisation] = MappingProxyType({bits: Quantisation(bits=bits) for bits in (4, 8)})


class BlockwiseLinear(nn.Module):
    """A linear layer whose weight is widened block by block. For inference: no gradient passes.

    Args:
        in_features: columns of the weight.
        out_features: its rows.
        bias: whether there is one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def write_rows(self, start: int, stop: int, target: torch.Tensor) -> None:
        """Writes rows of the weight, with columns in ``order_columns``' order.

        Args:
            start: the first row.
            stop: the row behind the last.
            target: (stop - start, in_features), of a floating dtype: it decides how products are rounded.
        """
        raise NotImplementedError

    def order_columns(self, inputs: torch.Tensor) -> torch.Tensor:
        """Gives inputs (R, in_features) with their columns in the order in which rows are written."""
        return inputs

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.order_columns(inputs.flatten(0, -2))
        outputs = rows.new_empty(rows.shape[0], self.out_features)
        size = _DEVICE_BLOCK
        if rows.device.type == "cpu":
            rows, size = rows.float(), _CPU_BLOCK  # half precision is no faster there
        size = min(max(size // self.in_features, 1), self.out_features)
        buffer = rows.new_empty(size, self.in_features)
        for start in range(0, self.out_features, size):
            stop = min(start + size, self.out_features)
            block = buffer[: stop - start]
            self.write_rows(start, stop, block)
            outputs[:, start:stop] = linear(rows, block)
        if self.bias is not None:
            outputs += self.bias
        return outputs.unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Linear(BlockwiseLinear):
    """torch's linear layer, but its weight may have another floating dtype than its inputs.

    A weight of half precision with float32 inputs gives what its copy in float32 would.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias=False)
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = plain.weight, plain.bias

    def write_rows(self, start: int, stop: int, target: torch.Tensor) -> None:
        target.copy_(self.weight[start:stop])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == inputs.dtype:
            return linear(inputs, self.weight, self.bias)
        return super().forward(inputs)


class QuantisedLinear(BlockwiseLinear):
    """A linear layer that stores its weight as integers q: the weight is (q - zero / 16) · scale.

    Attributes:
        weight: (out, in · bits / 8) int8.
        weight_scale: (out, groups) float16; (out,) where a row is one group, as in ChatGLM's files.
        weight_zero: (out, groups) int8, or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, quantisation: Quantisation):
        super().__init__(in_features, out_features, bias)
        self.quantisation = quantisation
        groups = in_features // quantisation.get_group_size(in_features)
        shape = (out_features, groups) if quantisation.group_size else (out_features,)
        stored = torch.zeros(out_features, in_features * quantisation.bits // 8, dtype=torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=torch.float16), requires_grad=False)
        zero = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
        self.weight_zero = zero if quantisation.has_zero else None

    def write_rows(self, start: int, stop: int, target: torch.Tensor) -> None:
        stored = self.weight[start:stop]
        planes = 8 // self.quantisation.bits
        if planes == 2:
            half = self.in_features // 2
            target[:, :half].copy_(stored >> 4)  # int8: the sign comes along
            target[:, half:].copy_((stored << 4) >> 4)
        else:
            target.copy_(stored)
        scale = self.weight_scale[start:stop].reshape(stop - start, 1, -1, 1).to(target.dtype)
        grouped = target.view(stop - start, planes, scale.shape[2], -1)
        if self.weight_zero is not None:
            zero = self.weight_zero[start:stop].reshape(scale.shape).to(target.dtype)
            grouped.sub_(zero, alpha=1 / _ZERO_UNITS)
        grouped.mul_(scale)

    def order_columns(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.quantisation.bits == 8:
            return inputs
        return torch.cat([inputs[:, 0::2], inputs[:, 1::2]], dim=1)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Gives the weight (out, in), with products rounded to ``dtype``.

        Source: for ChatGLM's files the kernels ``int8WeightExtraction*`` and ``int4WeightExtraction*`` of its
        quantization.py: T(value) · scale in T, which is half or float; the high bits are the even columns.
        """
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        self.write_rows(0, self.out_features, weight)
        if self.quantisation.bits == 8:
            return weight
        even, odd = weight.chunk(2, dim=1)
        return torch.stack([even, odd], dim=2).flatten(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantisation}"


def quantise(weight: torch.Tensor, quantisation: Quantisation) -> dict[str, torch.Tensor]:
    """Quantises a weight, a block of rows at a time, so that no wide copy of it exists.

    Args:
        weight: (out, in), of a floating dtype; computed where it is.
        quantisation: how.

    Returns:
        The tensors of a ``QuantisedLinear`` under their names, on the CPU.

    Raises:
        ValueError: the weight holds infinity or no number, or is too odd in shape.
    """
    size = (_CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK) // weight.shape[1]
    parts = [_quantise_rows(rows.float(), quantisation) for rows in weight.split(max(size, 1))]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def _quantise_rows(weight: torch.Tensor, quantisation: Quantisation) -> dict[str, torch.Tensor]:
    grouped = weight.view(weight.shape[0], -1, quantisation.get_group_size(weight.shape[1]))  # (rows, groups, size)
    largest = 2 ** (quantisation.bits - 1) - 1
    if quantisation.has_zero:
        # Zero stays in the range, as the zero point is stored in as many bits as reach just so far.
        low, high = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
        scale = ((high - low) / (2 * largest + 1)).clamp_(min=_SMALLEST_STEP).half()
        zero = ((-largest - 1 - low / scale.float()) * _ZERO_UNITS).round_().clamp_(-128, 127)
        values = (grouped / scale.float()[..., None]).add_(zero[..., None], alpha=1 / _ZERO_UNITS)
        values = values.round_().clamp_(-largest - 1, largest)
    else:
        zero = None
        scale = (grouped.abs().amax(2) / largest).clamp_(min=_SMALLEST_STEP).half()
        values = (grouped / scale.float()[..., None]).round_().clamp_(-largest, largest)
    if not scale.isfinite().all():
        raise ValueError("A weight to be quantised holds infinity or no number. The file is damaged: fetch it again.")
    values = values.flatten(1).to(torch.int8)
    if quantisation.bits == 4:
        values = (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
    found = {"weight": values, "weight_scale": scale if quantisation.group_size else scale.flatten()}
    return found if zero is None else found | {"weight_zero": zero.to(torch.int8)}
