"""The UNet's residual and transformer blocks as functions of tensors, over the layers of diffusers' modules.

diffusers' modules stay what loads, saves and holds the weights. What they do in a step is written out here, so that
what is constant over a run comes in ready, and so that one compiled function serves all blocks of one shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .products import convolve_onednn, has_onednn, linear

logger = logging.getLogger(__name__)

# A layer's weights, or where they are not plain the layer itself. Both are called with the input.
Layer = Callable[[torch.Tensor], torch.Tensor]


class LinearWeights(NamedTuple):
    """A plain linear layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return linear(rows, self.weight, self.bias)


class ConvolutionWeights(NamedTuple):
    """A plain convolution."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return F.conv2d(images, self.weight, self.bias, self.stride, self.padding)


class PackedConvolution(NamedTuple):
    """A convolution whose weights lie in oneDNN's own order, which is else made anew in every call."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return convolve_onednn(images, self.weight, self.bias, self.stride, self.padding)


class LayerNormWeights(NamedTuple):
    """A plain layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps)


class GroupNormWeights(NamedTuple):
    """A plain group norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    groups: int
    eps: float

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return F.group_norm(images, self.groups, self.weight, self.bias, self.eps)


def get_layer(module: nn.Module, block: nn.Module | None = None) -> Layer:
    """Gives a layer's weights; the layer itself where it is quantised, or something hangs on it.

    Args:
        module: the layer.
        block: that it is part of; hooks that hang on the block too, such as the host's for interruption, may be left
            out here.
    """
    hooks = set(module._forward_pre_hooks.values()) - set(block._forward_pre_hooks.values() if block else ())
    if hooks or module._forward_hooks or "forward" in vars(module) or set(module._parameters) != {"weight", "bias"}:
        return module
    if type(module) is nn.Linear:
        return LinearWeights(module.weight, module.bias)
    if type(module) is nn.Conv2d and module.groups == 1 and module.dilation == (1, 1):
        return ConvolutionWeights(module.weight, module.bias, module.stride, module.padding)
    if type(module) is nn.LayerNorm and module.bias is not None:
        return LayerNormWeights(module.weight, module.bias, module.eps)
    if type(module) is nn.GroupNorm:
        return GroupNormWeights(module.weight, module.bias, module.num_groups, module.eps)
    return module


def get_convolution(module: nn.Module, size: tuple[int, int] | None) -> Layer:
    """Gives a convolution's weights as ``get_layer`` does; in oneDNN's order for inputs of a size, where one is given.

    Args:
        module: the layer.
        size: height and width of its input, in cells. For another one the result is the same, only slower.
    """
    layer = get_layer(module)
    if size is None or not isinstance(layer, ConvolutionWeights):
        return layer
    shape = [2, layer.weight.shape[1], *size]
    weight = layer.weight.detach().to_mkldnn()
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, layer.padding, layer.stride, (1, 1), 1, shape)
    return PackedConvolution(packed, *layer[1:])


class Residual(NamedTuple):
    """The layers of a ``ResnetBlock2D``; the projection of the time embedding is not among them."""

    norm1: Layer
    conv1: Layer
    norm2: Layer
    conv2: Layer
    shortcut: Layer | None


class TransformerBlock(NamedTuple):
    """The layers of a ``BasicTransformerBlock``, without the projections of the text."""

    norm1: Layer
    query: Layer
    key: Layer
    value: Layer
    out: Layer
    norm2: Layer
    text_query: Layer
    text_out: Layer
    norm3: Layer
    widen: Layer
    narrow: Layer


class Text(NamedTuple):
    """What a block reads of the text, constant over a run.

    Attributes:
        key: (B, heads, S, head size).
        value: likewise.
        bias: (B, 1, 1, S), added to the attention logits; None for none.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None


def run_residual(hidden_states: torch.Tensor, shift: torch.Tensor, block: Residual) -> torch.Tensor:
    """Runs a residual block.

    Args:
        hidden_states: (B, C, h, w), or one for several rows of ``shift`` in turn, which differ from there on.
        shift: (G B, K), the projected time and size embedding.
        block: the layers.

    Returns:
        (G B, K, h, w).
    """
    inner = block.conv1(F.silu(block.norm1(hidden_states)))
    if inner.shape[0] != shift.shape[0]:
        repeats = shift.shape[0] // inner.shape[0]
        inner, hidden_states = inner.repeat(repeats, 1, 1, 1), hidden_states.repeat(repeats, 1, 1, 1)
    inner = block.conv2(F.silu(block.norm2(inner + shift[:, :, None, None])))
    return inner + (hidden_states if block.shortcut is None else block.shortcut(hidden_states))


def run_transformer_block(tokens: torch.Tensor, block: TransformerBlock, text: Text) -> torch.Tensor:
    """Runs a transformer block over tokens (B, h w, C): attention to themselves, to the text, feed-forward."""
    head_size = text.key.shape[-1]
    rows = block.norm1(tokens)
    query, key, value = (split_heads(layer(rows), head_size) for layer in (block.query, block.key, block.value))
    tokens = tokens + block.out(join_heads(F.scaled_dot_product_attention(query, key, value)))
    query = split_heads(block.text_query(block.norm2(tokens)), head_size)
    read = F.scaled_dot_product_attention(query, text.key, text.value, attn_mask=text.bias)
    tokens = tokens + block.text_out(join_heads(read))
    inner, gate = block.widen(block.norm3(tokens)).chunk(2, dim=-1)
    return tokens + block.narrow(inner * F.gelu(gate))


RunResidual = Callable[[torch.Tensor, torch.Tensor, Residual], torch.Tensor]
RunTransformerBlock = Callable[[torch.Tensor, TransformerBlock, Text], torch.Tensor]


@cache
def compile_blocks() -> tuple[RunResidual, RunTransformerBlock]:
    """Gives both functions compiled; one translation serves all blocks of a shape, all sizes and all later runs."""
    import torch._dynamo

    # Kinds of blocks by width: twelve of the residual ones in Kolors. More than a limit are left uncompiled.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, max(64, getattr(torch._dynamo.config, name)))
    return torch.compile(run_residual, dynamic=True), torch.compile(run_transformer_block, dynamic=True)


@cache
def can_compile(device_type: str) -> bool:
    """Tries the compiler on a kind of device. Logs once what is missing, a C++ compiler or Triton, where it fails.

    Not on a CPU with oneDNN: compiled blocks would call MKL for their products, which cost more than is saved.
    """
    if device_type == "cpu" and has_onednn():
        logger.info("On this CPU nothing is compiled: the plain blocks' products are faster than the compiler's.")
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=device_type))
    except (RuntimeError, ImportError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("torch.compile does not work here, so nothing is compiled: %s", reason)
        return False
    return True


def split_heads(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Turns rows (B, S, C) into heads (B, heads, S, head size)."""
    return rows.unflatten(-1, (-1, head_size)).transpose(1, 2)


def join_heads(heads: torch.Tensor) -> torch.Tensor:
    """Turns heads (B, heads, S, head size) into rows (B, S, C)."""
    return heads.transpose(1, 2).flatten(2)


def get_residual(module: Any, size: tuple[int, int] | None) -> Residual:
    """Takes the layers out of a ``ResnetBlock2D``; ``size`` as for ``get_convolution``."""
    return Residual(
        get_layer(module.norm1), get_convolution(module.conv1, size),
        get_layer(module.norm2), get_convolution(module.conv2, size),
        None if module.conv_shortcut is None else get_convolution(module.conv_shortcut, size),
    )  # fmt: skip


def get_transformer_block(module: Any) -> TransformerBlock:
    """Takes the layers out of a ``BasicTransformerBlock``."""
    attention, reading, feed_forward = module.attn1, module.attn2, module.ff.net
    layers = (
        module.norm1, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0],
        module.norm2, reading.to_q, reading.to_out[0], module.norm3, feed_forward[0].proj, feed_forward[2],
    )  # fmt: skip
    return TransformerBlock(*(get_layer(layer, module) for layer in layers))
