"""The UNet over one run: what the steps have in common is computed once, and the pads of the text as one row.

Kolors' text is 256 rows, projected to the UNet's width and then to keys and values in 70 layers, and the same in every
step; so is the embedding of the sizes. Neighbouring rows of the text that are equal, as all pads are, count as one
whose attention logit is raised by log(how many).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import (
    Layer,
    Residual,
    RunTransformerBlock,
    Text,
    TransformerBlock,
    can_compile,
    compile_blocks,
    get_convolution,
    get_layer,
    get_residual,
    get_transformer_block,
    run_residual,
    run_transformer_block,
    split_heads,
)
from .options import EXACT, SpeedOptions
from .products import FasterProducts, has_onednn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from .sampling import Conditioning

# What is written out here: Kolors' and SDXL's configuration. A UNet with another runs its own forward pass.
_KNOWN_CONFIG: Mapping[str, object] = MappingProxyType(
    {
        "center_input_sample": False, "time_embedding_type": "positional", "time_embedding_act_fn": None,
        "time_cond_proj_dim": None, "class_embed_type": None, "num_class_embeds": None,
        "addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj", "act_fn": "silu",
        "attention_type": "default", "dual_cross_attention": False, "only_cross_attention": False,
        "cross_attention_norm": None, "upcast_attention": False, "use_linear_projection": True,
        "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
        "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
)  # fmt: skip
_KNOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UNetMidBlock2DCrossAttn"}

# Steps whose embeddings are projected together: one pass over the weights instead of so many.
STEPS_AT_ONCE = 32
# Convolutions' weights are put into oneDNN's order for a run if they all fit in here, in bytes, and the picture is no
# larger than so many cells: the order is else made in every call, which on a large picture is next to nothing.
MAX_PACKED_BYTES = 2**30
MAX_PACKED_CELLS = 64 * 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transformer:
    """A ``Transformer2DModel``: its layers, and what each of its blocks reads of the text."""

    module: nn.Module
    norm: Layer
    proj_in: Layer
    proj_out: Layer
    blocks: tuple[tuple[nn.Module, TransformerBlock, Text], ...]


@dataclass(frozen=True)
class Stage:
    """A down, middle or up block: residual blocks by number, transformers after them, and a change of size."""

    module: nn.Module
    residuals: tuple[tuple[nn.Module, Residual], ...]
    transformers: tuple[Transformer, ...]
    sampler: Layer | None


def find_obstacle(unet: UNet2DConditionModel) -> str | None:
    """Says why a UNet cannot be run block by block from here; None where it can."""
    if type(unet).__name__ != "UNet2DConditionModel" or unet.training:
        return f"it is a {type(unet).__name__}{' in training' if unet.training else ''}"
    for key, expected in _KNOWN_CONFIG.items():
        if (value := unet.config.get(key, expected)) != expected:
            return f"its configuration has {key}={value!r}"
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        if type(block).__name__ not in _KNOWN_BLOCKS:
            return f"it has a block {type(block).__name__}"
        if any(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
            return "FreeU is on"
    for name, module in unet.named_modules():
        if next(module.children(), None) is not None and ("forward" in vars(module) or module._forward_hooks):
            return f"something hangs on {name or 'it'}"
        if hasattr(module, "processor") and type(module.processor).__name__ != "AttnProcessor2_0":
            return f"{name} has a {type(module.processor).__name__}"
        if getattr(module, "fused_projections", False):
            return f"{name} has fused projections"
    return None


def collapse_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Takes equal neighbouring rows of texts together.

    Args:
        rows: (B, L, D), the text as the UNet reads it.

    Returns:
        Rows (B, S, D) and a bias (B, 1, 1, S) for the attention logits, in the rows' dtype: log(how many rows it
        stands for), -inf for filler. All rows and None where none are equal.
    """
    is_new = torch.ones(rows.shape[:2], dtype=torch.bool)
    is_new[:, 1:] = (rows[:, 1:] != rows[:, :-1]).any(-1).cpu()
    chosen: list[list[int]] = []
    biases: list[list[float]] = []
    for starts in (row.nonzero()[:, 0].tolist() for row in is_new):
        counts = [end - start for start, end in zip(starts, [*starts[1:], rows.shape[1]], strict=True)]
        parts = [get_logits(count, rows.dtype) for count in counts]
        chosen.append([start for start, part in zip(starts, parts, strict=True) for _ in part])
        biases.append([logit for part in parts for logit in part])
    longest = max(map(len, chosen))
    longest += -longest % (1 if rows.device.type == "cpu" else 8)  # graphics cards' kernels want multiples of 8
    if longest >= rows.shape[1]:
        return rows, None
    index = torch.tensor([row + [0] * (longest - len(row)) for row in chosen], device=rows.device)
    bias = torch.tensor([row + [-math.inf] * (longest - len(row)) for row in biases])
    taken = rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))  # (B, S, D)
    return taken, bias.to(rows.device, rows.dtype)[:, None, None]


def get_logits(count: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Gives what is added to the logits of one or two equal rows, so that they weigh as much as ``count`` rows.

    float32 holds log(count) well enough. Half precision rounds it by up to 1 %, so the first row has the next lower
    number that the dtype holds, and a second row the remainder.
    """
    logit = math.log(count)
    if count == 1 or dtype not in (torch.float16, torch.bfloat16):
        return (logit,)
    grid = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(logit))
    first = math.floor(logit / grid) * grid
    remainder = count - math.exp(first)
    return (first, math.log(remainder)) if remainder > 1e-6 * count else (first,)


def build_denoiser(
    unet: UNet2DConditionModel,
    conditioning: Conditioning,
    timesteps: torch.Tensor,
    *,
    size: tuple[int, int],
    speed: SpeedOptions = EXACT,
) -> Denoiser | PlainDenoiser:
    """Prepares a UNet for a run.

    Args:
        unet: on its device; not changed.
        conditioning: G B rows.
        timesteps: (N,), of every evaluation in turn.
        size: height and width of the latents, in cells.
        speed: what may be left out or prepared.
    """
    if obstacle := find_obstacle(unet):
        level = logging.INFO if speed.compile or speed.feature_reuse > 1 else logging.DEBUG
        logger.log(level, "The UNet runs its own forward pass, uncompiled and whole in each step: %s.", obstacle)
        return PlainDenoiser(unet, conditioning, timesteps)
    return Denoiser(unet, conditioning, timesteps, size=size, speed=speed)


class PlainDenoiser:
    """The UNet's own forward pass, for UNets that are put together in other ways."""

    is_compiled = False

    def __init__(self, unet: UNet2DConditionModel, conditioning: Conditioning, timesteps: torch.Tensor):
        self.unet, self.conditioning, self.timesteps = unet, conditioning, timesteps.to(unet.device)

    def __call__(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Predicts the noise as ``Denoiser`` does."""
        texts = self.conditioning
        with FasterProducts():
            return self.unet(
                latents.repeat(texts.prompt_embeds.shape[0] // latents.shape[0], 1, 1, 1),
                self.timesteps[index],
                encoder_hidden_states=texts.prompt_embeds,
                added_cond_kwargs={"text_embeds": texts.pooled_prompt_embeds, "time_ids": texts.time_ids},
                return_dict=False,
            )[0]

    def drop_negatives_(self) -> None:
        """Goes on without the first half of the rows, as ``Denoiser`` does."""
        self.conditioning = self.conditioning.without_negatives()


class Denoiser:
    """The UNet over one run, block by block.

    Args:
        unet: one without an obstacle; it is read, and its blocks' hooks are called.
        conditioning: G B rows.
        timesteps: (N,), of every evaluation in turn.
        size: height and width of the latents, in cells.
        speed: what may be left out or prepared.

    Source: agrees with the forward pass of diffusers' ``UNet2DConditionModel`` to rounding.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioning: Conditioning,
        timesteps: torch.Tensor,
        *,
        size: tuple[int, int],
        speed: SpeedOptions = EXACT,
    ):
        self.unet, self.speed = unet, speed
        self.deep: torch.Tensor | None = None  # what the last stage took in when the deep ones last ran
        self.rows = conditioning.prompt_embeds.shape[0]
        self.is_compiled = speed.compile and can_compile(unet.device.type)
        self.run_residual, self.run_block = (
            compile_blocks() if self.is_compiled else (run_residual, run_transformer_block)
        )
        packs = not self.is_compiled and shall_pack(unet, size)
        # oneDNN's own convolutions are fastest on channels-last pictures, which the transformers then read as they lie.
        self.memory_format = torch.channels_last if packs else torch.contiguous_format
        rows, bias = collapse_rows(conditioning.prompt_embeds)
        text = get_layer(unet.encoder_hid_proj)(rows), bias
        sizes = [tuple(math.ceil(side / 2**level) for side in size) for level in range(len(unet.down_blocks))]
        down_sizes, up_sizes = (sizes, sizes[::-1]) if packs else ([None] * len(sizes),) * 2
        self.conv_in = get_convolution(unet.conv_in, down_sizes[0])
        self.down = tuple(map(partial(get_stage, text=text), unet.down_blocks, down_sizes))
        self.mid = get_stage(unet.mid_block, up_sizes[0], text=text)
        self.up = tuple(map(partial(get_stage, text=text), unet.up_blocks, up_sizes))
        self.norm_out, self.conv_out = get_layer(unet.conv_norm_out), get_convolution(unet.conv_out, up_sizes[-1])
        self._embed_time(conditioning, timesteps)

    @torch.inference_mode()  # a thousand small operations each save what autograd would note down
    def __call__(self, latents: torch.Tensor, index: int) -> torch.Tensor:
        """Predicts the noise.

        Args:
            latents: (B, C, h, w), scaled for the model.
            index: which of the timesteps.

        Returns:
            (G B, C, h, w).
        """
        shifts = self._get_shifts(index)
        hidden = self.conv_in(latents.contiguous(memory_format=self.memory_format))
        # Up to the first time embedding the guidance branches are the same.
        skips = [hidden.repeat(self.rows // hidden.shape[0], 1, 1, 1)]
        if self.deep is None or index % self.speed.feature_reuse == 0:
            self.deep = self._run_deep(hidden, iter(shifts), skips)
        else:
            self._run_down(hidden, self.down[0], iter(shifts), skips)
        last = self.up[-1]
        hidden = self._run_up(self.deep, last, iter(shifts[-len(last.residuals) :]), skips)
        return self.conv_out(F.silu(self.norm_out(hidden))).contiguous()

    def drop_negatives_(self) -> None:
        """Goes on without the first half of the rows, those of the negative prompts."""
        self.rows //= 2
        self.down, self.up = tuple(map(drop_negatives, self.down)), tuple(map(drop_negatives, self.up))
        self.mid = drop_negatives(self.mid)
        self.embeddings, self.shifts, self.deep = self.embeddings[:, self.rows :], (-1, []), None

    def _run_deep(
        self, hidden: torch.Tensor, shifts: Iterator[torch.Tensor], skips: list[torch.Tensor]
    ) -> torch.Tensor:
        """Runs all but the last stage."""
        for stage in self.down:
            hidden = self._run_down(hidden, stage, shifts, skips)
            if stage.sampler:
                hidden = stage.sampler(hidden)
                skips.append(hidden)
        hidden = self._run_mid(hidden, self.mid, shifts)
        for stage in self.up[:-1]:
            hidden = self._run_up(hidden, stage, shifts, skips)
        return hidden

    def _run_down(
        self, hidden: torch.Tensor, stage: Stage, shifts: Iterator[torch.Tensor], skips: list[torch.Tensor]
    ) -> torch.Tensor:
        enter(stage.module)
        for number in range(len(stage.residuals)):
            hidden = self._run_layer(hidden, stage, number, shifts)
            skips.append(hidden)
        return hidden

    def _run_mid(self, hidden: torch.Tensor, stage: Stage, shifts: Iterator[torch.Tensor]) -> torch.Tensor:
        for number, (module, residual) in enumerate(stage.residuals):
            if number:
                hidden = run_transformer(hidden, stage.transformers[number - 1], self.run_block)
            enter(module)
            hidden = self.run_residual(hidden, next(shifts), residual)
        return hidden

    def _run_up(
        self, hidden: torch.Tensor, stage: Stage, shifts: Iterator[torch.Tensor], skips: list[torch.Tensor]
    ) -> torch.Tensor:
        enter(stage.module)
        for number in range(len(stage.residuals)):
            hidden = self._run_layer(torch.cat([hidden, skips.pop()], dim=1), stage, number, shifts)
        if stage.sampler:
            # To the size of what comes next, which on odd sizes is not twice this one.
            hidden = stage.sampler(F.interpolate(hidden, size=skips[-1].shape[2:], mode="nearest"))
        return hidden

    def _run_layer(
        self, hidden: torch.Tensor, stage: Stage, number: int, shifts: Iterator[torch.Tensor]
    ) -> torch.Tensor:
        """Runs a residual block and the transformer after it, if there is one."""
        module, residual = stage.residuals[number]
        enter(module)
        hidden = self.run_residual(hidden, next(shifts), residual)
        return run_transformer(hidden, stage.transformers[number], self.run_block) if stage.transformers else hidden

    def _embed_time(self, conditioning: Conditioning, timesteps: torch.Tensor) -> None:
        """Computes the embeddings (N, G B, E) of all evaluations' timesteps and of the sizes, up to each block's own
        projection."""
        unet, dtype = self.unet, conditioning.prompt_embeds.dtype
        time = unet.time_embedding(unet.time_proj(timesteps.to(unet.device)).to(dtype))  # (N, E)
        sizes = unet.add_time_proj(conditioning.time_ids.flatten()).view(self.rows, -1)
        sizes = unet.add_embedding(torch.cat([conditioning.pooled_prompt_embeds, sizes.to(dtype)], dim=-1))
        self.embeddings = F.silu(time[:, None] + sizes)
        stages = (*self.down, self.mid, *self.up)
        self.projections = [get_layer(module.time_emb_proj) for stage in stages for module, _ in stage.residuals]
        self.shifts: tuple[int, list[torch.Tensor]] = (-1, [])

    def _get_shifts(self, index: int) -> list[torch.Tensor]:
        """Gives each residual block's (G B, K) at an evaluation, in the order in which they run."""
        group = index // STEPS_AT_ONCE
        if self.shifts[0] != group:
            chosen = self.embeddings[group * STEPS_AT_ONCE : (group + 1) * STEPS_AT_ONCE]
            self.shifts = group, [project(chosen) for project in self.projections]
        return [shift[index % STEPS_AT_ONCE] for shift in self.shifts[1]]


def get_stage(module: Any, size: tuple[int, int] | None, *, text: tuple[torch.Tensor, torch.Tensor | None]) -> Stage:
    """Takes the layers out of a block of the UNet.

    Args:
        module: the block.
        size: of its pictures, in cells, where convolutions' weights shall be packed.
        text: projected rows (G B, S, D) and their bias.
    """
    sampler = None
    if samplers := getattr(module, "upsamplers", None):
        sampler = get_convolution(samplers[0].conv, size and (2 * size[0], 2 * size[1]))
    elif samplers := getattr(module, "downsamplers", None):
        sampler = get_convolution(samplers[0].conv, size)
    return Stage(
        module,
        tuple((residual, get_residual(residual, size)) for residual in module.resnets),
        tuple(get_transformer(each, *text) for each in getattr(module, "attentions", ())),
        sampler,
    )


def drop_negatives(stage: Stage) -> Stage:
    """Gives a stage that reads the second half of the texts alone."""

    def halve(text: Text) -> Text:
        return Text(*(None if part is None else part.chunk(2)[1] for part in text))

    return replace(
        stage,
        transformers=tuple(
            replace(each, blocks=tuple((module, block, halve(text)) for module, block, text in each.blocks))
            for each in stage.transformers
        ),
    )


def get_transformer(module: Any, rows: torch.Tensor, bias: torch.Tensor | None) -> Transformer:
    """Takes the layers out of a ``Transformer2DModel`` and computes the keys and values of the text."""
    blocks = []
    for block in module.transformer_blocks:
        reading = block.attn2
        head_size = reading.inner_dim // reading.heads
        key, value = (split_heads(get_layer(layer)(rows), head_size) for layer in (reading.to_k, reading.to_v))
        blocks.append((block, get_transformer_block(block), Text(key.contiguous(), value.contiguous(), bias)))
    norm, proj_in, proj_out = get_layer(module.norm), get_layer(module.proj_in), get_layer(module.proj_out)
    return Transformer(module, norm, proj_in, proj_out, tuple(blocks))


def run_transformer(
    hidden_states: torch.Tensor, transformer: Transformer, run_block: RunTransformerBlock
) -> torch.Tensor:
    """Runs a ``Transformer2DModel`` over (B, C, h, w)."""
    enter(transformer.module)
    size = hidden_states.shape[2:]
    tokens = transformer.norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, C)
    tokens = transformer.proj_in(tokens)
    for module, block, text in transformer.blocks:
        enter(module)
        tokens = run_block(tokens, block, text)
    return hidden_states + transformer.proj_out(tokens).unflatten(1, size).permute(0, 3, 1, 2)


def enter(module: nn.Module) -> None:
    """Calls what hangs before a block, as the host's check for interruption does."""
    for hook in tuple(module._forward_pre_hooks.values()):
        hook(module, ())


def shall_pack(unet: UNet2DConditionModel, size: tuple[int, int]) -> bool:
    """Whether convolutions' weights are put into oneDNN's order for a run on latents of a size in cells."""
    if unet.device.type != "cpu" or unet.dtype != torch.float32 or not has_onednn():
        return False
    if math.prod(size) > MAX_PACKED_CELLS:
        return False
    convolutions = (module for module in unet.modules() if type(module) is nn.Conv2d)
    return sum(module.weight.nbytes for module in convolutions) <= MAX_PACKED_BYTES
