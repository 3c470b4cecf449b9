"""Layers of diffusers' autoencoder that do the same with less: their parameters keep their names.

New memory is what the passes between convolutions cost on a CPU: a fresh 32 MB are given page by page in 10 ms, in
which the numbers in them could be read ten times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SQUARES_AT_ONCE = 2**16  # numbers; 256 KB in float32


def fold_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Makes four 2x2 kernels of a 3x3 one that follows nearest-neighbour doubling.

    Of the three rows under the kernel two are always equal there: the last two for an even row of the result, the
    first two for an odd one. Adding their weights beforehand leaves 4 products of 9. Likewise for columns.

    Args:
        weight: (O, C, 3, 3).

    Returns:
        (4 O, C, 2, 2): for even rows and even columns, even and odd, odd and even, odd and odd.
    """

    def halves(kernel: torch.Tensor, dim: int) -> list[torch.Tensor]:
        first, middle, last = kernel.unbind(dim)
        return [torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)]

    return torch.cat([kernel for rows in halves(weight, 2) for kernel in halves(rows, 3)])


def upsample(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Doubles both sides by copying neighbours, then convolves with a 3x3 kernel and a border of zeros.

    Args:
        hidden_states: (B, C, h, w).
        weight: (O, C, 3, 3).
        bias: (O,) or None.

    Returns:
        (B, O, 2 h, 2 w).
    """
    batch, _, height, width = hidden_states.shape
    channels = weight.shape[0]
    kernels = fold_kernel(weight)
    # One convolution for all four; a kernel's result for cell (i, j) lies at (i, j) plus its parities.
    parts = F.conv2d(hidden_states, kernels, None if bias is None else bias.repeat(4), padding=1)
    parts = parts.unflatten(1, (2, 2, channels))  # (B, 2, 2, O, h + 1, w + 1)
    is_channels_last = hidden_states.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    size = (batch, channels, 2 * height, 2 * width)
    result = torch.empty(size, dtype=parts.dtype, device=parts.device, memory_format=layout)
    for row in range(2):
        for column in range(2):
            part = parts[:, row, column, :, row : row + height, column : column + width]
            result[:, :, row::2, column::2] = part
    return result


class FoldedUpsample(nn.Module):
    """Stands in for diffusers' ``Upsample2D``, with the same parameter under the same name.

    Only on CPUs, where it is 1.5 to 1.8 times as fast (measured): elsewhere nothing is measured yet.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        """Doubles (B, C, h, w) or stretches it to ``output_size``, then convolves: (B, O, 2 h, 2 w)."""
        if output_size is None and hidden_states.device.type == "cpu" and not torch.is_grad_enabled():
            return upsample(hidden_states, self.conv.weight, self.conv.bias)
        scale = 2.0 if output_size is None else None
        return self.conv(F.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest"))


def silu_(hidden_states: torch.Tensor) -> torch.Tensor:
    """Applies SiLU to numbers that nobody else reads, in their place unless gradients are taken."""
    return F.silu(hidden_states, inplace=not torch.is_grad_enabled())


class GroupNorm(nn.GroupNorm):
    """Stands in for torch's group norm on large pictures.

    torch's kernel for channels-last pictures on a CPU adds up each group in float32, number after number: of 256
    channels at 512x512 the result is off by 8e-5, a hundred times what rounding explains (measured). Here rows of the
    picture are added up, and the rows' sums in float64.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__(norm.num_groups, norm.num_channels, eps=norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises (B, C, h, w)."""
        is_alone = hidden_states.dim() == 4 and hidden_states.shape[0] == 1
        is_plain = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
        if not is_alone or not is_plain or hidden_states.is_contiguous() or torch.is_grad_enabled():
            return super().forward(hidden_states)
        mean, variance = (
            part.float().repeat_interleave(self.num_channels // self.num_groups)
            for part in get_statistics(hidden_states, self.num_groups)
        )
        return F.batch_norm(hidden_states, mean, variance, self.weight, self.bias, eps=self.eps)


def get_statistics(hidden_states: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives mean and variance of each group of channels in one picture (1, C, h, w), both (groups,) in float64."""
    rows = hidden_states[0].permute(1, 2, 0)  # (h, w, C)
    # The squares of a few rows at a time, which stay in the processor's cache.
    parts = rows.split(max(1, SQUARES_AT_ONCE // rows[0].numel()))
    squares = torch.cat([part.square().sum(1) for part in parts])  # (h, C)
    mean, square = (
        part.double().sum(0).view(groups, -1).sum(1) / (hidden_states.numel() // groups)
        for part in (rows.sum(1), squares)
    )
    return mean, (square - mean.square()).clamp_min(0)


class LastActivation(nn.Module):
    """Stands in for the SiLU between the last norm and the last convolution."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Applies it in place."""
        return silu_(hidden_states)


class Residual(nn.Module):
    """Stands in for diffusers' ``ResnetBlock2D`` without a time: norms' and convolutions' results are written over."""

    output_scale_factor = 1.0

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, hidden_states: torch.Tensor, temb: None = None) -> torch.Tensor:
        """Gives (B, O, h, w) of (B, C, h, w)."""
        inner = self.conv1(silu_(self.norm1(hidden_states)))
        inner = self.conv2(silu_(self.norm2(inner)))
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        return inner.add_(hidden_states)


def streamline_(module: nn.Module) -> nn.Module:
    """Replaces the ``Upsample2D``, ``ResnetBlock2D`` and group norms of a diffusers model that do what these layers do.

    Returns:
        The module itself; its parameters keep their names.
    """
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    # From the inside: a block that is replaced takes its layers along.
    for parent in reversed(list(module.modules())):
        for name, child in parent.named_children():
            if isinstance(child, Upsample2D) and _is_plain_upsample(child):
                setattr(parent, name, FoldedUpsample(child.conv))
            elif isinstance(child, ResnetBlock2D) and _is_plain_residual(child):
                setattr(parent, name, Residual(child))
            elif type(child) is nn.GroupNorm:
                setattr(parent, name, GroupNorm(child))
            elif name == "conv_act" and isinstance(child, nn.SiLU):
                setattr(parent, name, LastActivation())
    return module


def _is_plain_residual(block: nn.Module) -> bool:
    """Whether it is norm, SiLU, convolution, twice, and a sum: no time, no change of size, nothing dropped."""
    if block.time_embedding_norm == "scale_shift" or block.output_scale_factor != 1.0 or block.dropout.p > 0.0:
        return False
    extras = (block.time_emb_proj, block.upsample, block.downsample)
    return isinstance(block.nonlinearity, nn.SiLU) and all(extra is None for extra in extras)


def _is_plain_upsample(upsampler: nn.Module) -> bool:
    """Whether it doubles, then convolves 3x3 with a border of one, and does nothing else."""
    conv = getattr(upsampler, "conv", None)
    if not isinstance(conv, nn.Conv2d) or upsampler.use_conv_transpose or upsampler.norm is not None:
        return False
    sizes = (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups)
    return upsampler.interpolate and sizes == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
