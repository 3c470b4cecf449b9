"""The UNet: Kolors' structure scaled down, trained to predict noise on cached latents and captions."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from ...kolors.text_encoder import TextEncoder, TokenBatch
from ...kolors.tokenizer import MAX_TOKENS, Tokenizer
from .averaging import WeightAverage
from .captions import EMPTY_CAPTIONS, SEEN, draw_caption
from .shapes import RESOLUTION, draw_placement, render
from .text_encoder import HIDDEN_SIZE
from .vae import to_tensor

logger = logging.getLogger(__name__)

ADDITION_TIME_EMBED_DIM = 8
LATENT_SIZE = RESOLUTION // 8


@dataclass(frozen=True, kw_only=True)
class UNetOptions:
    """How the UNet is trained; `compile` needs a C++ compiler and changes the speed alone."""

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    constant_share: float = 0.3
    ema_decay: float = 0.999
    empty_caption_share: float = 0.08
    negative_caption_share: float = 0.04
    max_loss_weight: float = 40.0
    pictures: int = 6000
    captions_per_combination: int = 80
    seed: int = 3
    checkpoint_every: int = 500
    compile: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything the UNet reads, computed once.

    Attributes:
        latents: (N, 4, h, w), scaled to unit deviation.
        combination: (N,) index into SEEN.
        rows: (K, S, D) compact rows of K captions (one pad row, then the tokens, then filler).
        mask: (K, S) float32, what `encoder_attention_mask` must be for the compact rows.
        pooled: (K, D).
        captions_per_combination: captions of combination i are rows i * n to (i + 1) * n; behind the last
            combination's stand EMPTY_CAPTIONS, the empty one first.
    """

    latents: torch.Tensor
    combination: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    captions_per_combination: int


def build_scheduler() -> EulerDiscreteScheduler:
    """Kolors' noise schedule: 1100 timesteps."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1100,
        beta_start=0.00085,
        beta_end=0.014,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    """Makes the untrained UNet; 16 groups leave 3 channels or more in each, one would erase colour and time."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(3, 6, 8),
        cross_attention_dim=96,
        encoder_hid_dim=HIDDEN_SIZE,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time",
        addition_time_embed_dim=ADDITION_TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=6 * ADDITION_TIME_EMBED_DIM + HIDDEN_SIZE,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    init_copy_path_(unet)
    return unet


@torch.no_grad()
def init_copy_path_(unet: UNet2DConditionModel) -> None:
    """Initialises the UNet to return its input, which is the right answer where nearly all is noise.

    The path is conv_in -> outermost skip -> shortcut of the last residual block -> conv_out. The last two are
    parted by a group norm and a SiLU: each latent channel x takes two channels of a group of its own, x and -x,
    so that the group's mean is 0, and SiLU(x) - SiLU(-x) = x.
    """
    conv_in, conv_out, norm_out = unet.conv_in, unet.conv_out, unet.conv_norm_out
    block = unet.up_blocks[-1].resnets[-1]
    width = conv_in.out_channels
    group = width // norm_out.num_groups
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    conv_out.weight *= 0.1
    conv_out.bias.zero_()
    skip_start = block.conv_shortcut.in_channels - width
    for channel in range(conv_in.in_channels):
        for sign, index in ((1.0, channel * group), (-1.0, channel * group + 1)):
            conv_in.weight[index] = 0
            conv_in.weight[index, channel, 1, 1] = sign
            conv_in.bias[index] = 0
            block.conv_shortcut.weight[index] = 0
            block.conv_shortcut.weight[index, skip_start + index] = 1
            block.conv_shortcut.bias[index] = 0
            conv_out.weight[:, index] = 0
            # The group's third channel is silent, so the norm scales x up by sqrt(group / 2).
            conv_out.weight[channel, index, 1, 1] = sign * math.sqrt(2 / group)
        for index in range(channel * group + 2, (channel + 1) * group):
            block.conv_shortcut.weight[index] = 0
            block.conv_shortcut.bias[index] = 0


def get_time_ids(batch_size: int) -> torch.Tensor:
    """Micro-conditioning (B, 6): original size, crop offset, target size in pixels."""
    size = float(RESOLUTION)
    return torch.tensor([[size, size, 0.0, 0.0, size, size]]).repeat(batch_size, 1)


@torch.no_grad()
def fold_time_ids_(unet: UNet2DConditionModel) -> None:
    """Makes the UNet read any picture size as the one it was trained at, and that one exactly as before.

    In training the micro-conditioning is constant, so its weights stay what chance made them, and another size
    (a second pass on an upscaled latent) would push the embedding anywhere. The constant's contribution moves
    into the bias and the weights become 0.
    """
    linear = unet.add_embedding.linear_1
    embedded = unet.add_time_proj(get_time_ids(1).flatten()).flatten()  # (6 * ADDITION_TIME_EMBED_DIM,)
    sizes = linear.weight[:, HIDDEN_SIZE:]  # the pooled vector comes first
    linear.bias += sizes @ embedded.to(sizes.dtype)
    sizes.zero_()


@torch.no_grad()
def encode_captions(
    encoder: TextEncoder, tokenizer: Tokenizer, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodes captions in compact form: rows (K, S, D), mask (K, S), pooled (K, D).

    All pad rows of a prompt are equal, so 256 rows are exactly one pad row with log(number of pads) added to
    its attention logits. diffusers turns a mask value m into a bias of (1 - m) * -10000; filler rows have m 0.
    """
    batch = TokenBatch.from_ids([tokenizer.encode(caption) for caption in captions], tokenizer.pad_token_id)
    rows, last = encoder(batch)
    pooled = last[torch.arange(len(last)), batch.num_tokens]
    index = torch.arange(rows.shape[1])
    mask = (index <= batch.num_tokens[:, None]).float()
    mask[:, 0] = 1 + torch.log((MAX_TOKENS - batch.num_tokens).float()) / 10000
    return rows, mask, pooled


@torch.no_grad()
def prepare_data(vae: AutoencoderKL, encoder: TextEncoder, tokenizer: Tokenizer, options: UNetOptions) -> TrainingData:
    """Renders and encodes the pictures and captions of the combinations in training."""
    rng = np.random.default_rng(options.seed)
    combination = rng.permutation(np.arange(options.pictures) % len(SEEN))
    latents = []
    for part in np.array_split(combination, math.ceil(options.pictures / 32)):
        seen = [SEEN[index] for index in part]
        pictures = [render(c.shape, c.colour, c.background, draw_placement(rng)) for c in seen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = vae.encode(to_tensor(pictures)).latent_dist.mean
        latents.append(mean.float() * vae.config.scaling_factor)
    count = options.captions_per_combination
    captions = [draw_caption(c, rng, leave_background_open=index % 20 == 0) for c in SEEN for index in range(count)]
    rows, mask, pooled = encode_captions(encoder, tokenizer, [*captions, *EMPTY_CAPTIONS])
    return TrainingData(
        latents=torch.cat(latents),
        combination=torch.from_numpy(combination),
        rows=rows,
        mask=mask,
        pooled=pooled,
        captions_per_combination=count,
    )


def get_learning_rate(step: int, options: UNetOptions) -> float:
    """Warm-up, constant, then a cosine to 1 %."""
    constant_end = options.constant_share * options.steps
    progress = max(0.0, (step - constant_end) / (options.steps - constant_end))
    factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return options.learning_rate * factor * min(1.0, (step + 1) / options.warmup_steps)


def get_loss(
    unet: nn.Module, data: TrainingData, alphas_cumprod: torch.Tensor, options: UNetOptions, generator: torch.Generator
) -> torch.Tensor:
    """Noise prediction error of one random batch, each sample weighted with min(1 / alpha-bar, a maximum).

    That weight makes it the error of velocity prediction, which does not neglect the high noise where
    background and colour are decided. Timesteps are stratified: one in each of B equal ranges.
    """
    size, total = options.batch_size, len(alphas_cumprod)
    pick = torch.randint(len(data.latents), (size,), generator=generator)
    caption = data.combination[pick] * data.captions_per_combination
    caption += torch.randint(data.captions_per_combination, (size,), generator=generator)
    lot = torch.rand(size, generator=generator)
    first_empty = len(SEEN) * data.captions_per_combination
    negative = torch.randint(first_empty, len(data.rows), (size,), generator=generator)
    caption = torch.where(lot < options.empty_caption_share + options.negative_caption_share, negative, caption)
    caption[lot < options.empty_caption_share] = first_empty
    timesteps = ((torch.arange(size) + torch.rand(size, generator=generator)) * total / size).long()
    latents = data.latents[pick]
    noise = torch.randn(latents.shape, generator=generator)
    alpha = alphas_cumprod[timesteps]
    noisy = alpha.sqrt()[:, None, None, None] * latents + (1 - alpha).sqrt()[:, None, None, None] * noise
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = unet(
            noisy,
            timesteps,
            encoder_hidden_states=data.rows[caption],
            encoder_attention_mask=data.mask[caption],
            added_cond_kwargs={"text_embeds": data.pooled[caption], "time_ids": get_time_ids(size)},
        ).sample
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    return (error * (1 / alpha).clamp(max=options.max_loss_weight)).mean()


def train_unet(
    data: TrainingData,
    options: UNetOptions,
    checkpoint: Path,
    on_checkpoint: Callable[[UNet2DConditionModel, int], None],
) -> UNet2DConditionModel:
    """Trains the UNet and returns its averaged weights.

    Args:
        data: what `prepare_data` made.
        options: the settings; their `steps` fix the learning rate's course.
        checkpoint: where the state is kept; a run that finds one goes on from it.
        on_checkpoint: called with the averaged weights and the step whenever the state was saved.
    """
    torch.manual_seed(options.seed)
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())  # its backward pass on a CPU is faster than the fused attention's
    average = WeightAverage(unet, options.ema_decay)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = average.step = state["step"]
    predictor = torch.compile(unet) if options.compile else unet
    alphas_cumprod = build_scheduler().alphas_cumprod
    running, started = 0.0, time.monotonic()
    for step in range(first, options.steps):
        # Seeded per step, so that a resumed run sees what an uninterrupted one would.
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, options)
        loss = get_loss(predictor, data, alphas_cumprod, options, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update_(unet)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            logger.info("unet step %d/%d loss %.4f, %.0f s", step, options.steps, running, time.monotonic() - started)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            state = {
                "unet": unet.state_dict(),
                "average": average.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint)
            on_checkpoint(average.module, step + 1)
    return average.module.eval()
