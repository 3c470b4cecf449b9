"""Sampling: from noise or a picture's latents to latents, one denoising loop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from .checkpoint import OnProgress
from .denoiser import build_denoiser
from .options import EXACT, VAE_SCALE_FACTOR, SamplingOptions, SpeedOptions
from .prompts import PromptEmbeds
from .schedulers import build_scheduler, set_timesteps_

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DConditionModel

OnStep = Callable[[int, int, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the UNet is conditioned on over a whole run, negatives first where there is guidance.

    Attributes:
        prompt_embeds: (G B, L, D), G is 2 with guidance and 1 without.
        pooled_prompt_embeds: (G B, D).
        time_ids: (G B, 6): original height and width, crop top and left, target height and width, in pixels.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    time_ids: torch.Tensor

    def without_negatives(self) -> Conditioning:
        """Gives the second half of the rows."""
        return Conditioning(**{field.name: getattr(self, field.name).chunk(2)[1] for field in fields(self)})


def get_noise(
    shape: tuple[int, ...], generator: torch.Generator, *, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Draws normal noise on the generator's device, in float32 whatever ``dtype`` is, then converts it.

    So the precision of a model does not change the picture that a seed gives.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    return noise.to(device=device, dtype=dtype)


def get_conditioning(
    embeds: PromptEmbeds, unet: UNet2DConditionModel, *, height: int, width: int, guided: bool
) -> Conditioning:
    """Lays out text and size for the UNet, on its device and in its dtype.

    Args:
        embeds: B prompts.
        unet: decides device and dtype.
        height: of the picture, in pixels: original and target size both, no crop.
        width: likewise.
        guided: put the negatives in front.
    """
    prompt_embeds, pooled = embeds.prompt_embeds, embeds.pooled_prompt_embeds
    if guided:
        prompt_embeds = torch.cat([embeds.negative_prompt_embeds, prompt_embeds])
        pooled = torch.cat([embeds.negative_pooled_prompt_embeds, pooled])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * prompt_embeds.shape[0])
    return Conditioning(
        prompt_embeds=prompt_embeds.to(unet.device, unet.dtype),
        pooled_prompt_embeds=pooled.to(unet.device, unet.dtype),
        time_ids=time_ids.to(unet.device, unet.dtype),
    )


def guide(noise_pred: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Combines the guidance branches.

    Args:
        noise_pred: (2 B, C, h, w), the unconditional ones first.
        guidance_scale: w in uncond + w (cond - uncond).

    Returns:
        (B, C, h, w).

    Source: Ho and Salimans 2022, equation 6, in the form of diffusers' pipelines.
    """
    unconditional, conditional = noise_pred.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def check_embeds(embeds: PromptEmbeds, unet: UNet2DConditionModel) -> None:
    """Checks that the UNet reads text of this width.

    Raises:
        ValueError: the embeddings come from a text encoder of another size.
    """
    width, expected = embeds.prompt_embeds.shape[-1], unet.config.encoder_hid_dim
    if width != expected:
        raise ValueError(
            f"The text embeddings are {width} wide, this UNet reads {expected}: text encoder and UNet belong to "
            "different models. Load both from the same one."
        )


def match_batch(embeds: PromptEmbeds, latents: torch.Tensor) -> PromptEmbeds:
    """Gives each of several latents a prompt: one prompt serves them all.

    One latent with several prompts stays one: its noise is drawn once and shared.

    Raises:
        ValueError: the numbers of latents and prompts fit in no such way.
    """
    num_latents, num_prompts = latents.shape[0], embeds.batch_size
    if num_latents in (1, num_prompts):
        return embeds
    if num_prompts > 1:
        raise ValueError(
            f"{num_latents} latents came with {num_prompts} prompts: give one of either, or as many of both."
        )
    return PromptEmbeds(
        prompt_embeds=embeds.prompt_embeds.expand(num_latents, -1, -1),
        pooled_prompt_embeds=embeds.pooled_prompt_embeds.expand(num_latents, -1),
        negative_prompt_embeds=embeds.negative_prompt_embeds.expand(num_latents, -1, -1),
        negative_pooled_prompt_embeds=embeds.negative_pooled_prompt_embeds.expand(num_latents, -1),
    )


def check_latents(latents: torch.Tensor, unet: UNet2DConditionModel) -> None:
    """Checks that latents are Kolors'.

    Raises:
        ValueError: they are not (B, C, h, w) with the UNet's channels and at least one cell.
    """
    channels = unet.config.in_channels
    if latents.dim() != 4 or latents.shape[1] != channels or 0 in latents.shape:
        raise ValueError(
            f"The latent has the shape {tuple(latents.shape)}; Kolors takes (batch, {channels}, height / 8, "
            "width / 8). It comes from another kind of model; encode the picture with Kolors' VAE."
        )
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if min(latents.shape[2:]) < factor:
        raise ValueError(
            f"The latent is {latents.shape[3]}x{latents.shape[2]} cells, Kolors needs at least {factor}x{factor} "
            f"({factor * VAE_SCALE_FACTOR}x{factor * VAE_SCALE_FACTOR} pixels)."
        )


def get_start_latents(
    scheduler: SchedulerMixin,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    latents: torch.Tensor | None,
    batch_size: int,
) -> torch.Tensor:
    """Gives the latents that the first step starts from, (B, C, h, w).

    From nothing: noise at the schedule's strongest. From latents: noise is added at the first timestep that is
    run, at strength 1 too.
    """
    if latents is None:
        return noise * scheduler.init_noise_sigma
    noised = scheduler.add_noise(latents, noise, timesteps[:1].repeat(latents.shape[0]))
    return noised if noised.shape[0] == batch_size else noised.repeat(batch_size, 1, 1, 1)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    embeds: PromptEmbeds,
    options: SamplingOptions,
    *,
    latents: torch.Tensor | None = None,
    noise_device: torch.device | str | None = None,
    on_step: OnStep | None = None,
    speed: SpeedOptions = EXACT,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """Samples latents.

    Args:
        unet: on the device where it shall run; not changed.
        embeds: B prompts, or one for all latents.
        options: how.
        latents: (B or 1, C, h, w) to start from, already times the VAE's scaling factor; they set the size.
        noise_device: where all noise is drawn; by default on the UNet's device.
        on_step: called after each step with the steps done (from 1), the steps in all and the latents; what it
            raises ends the run.
        speed: what may be left out or prepared; by default nothing that changes the result.
        on_progress: called with a line of text before a step that may take minutes, as the first compiled one.

    Returns:
        (B, C, h, w) on the UNet's device, in its dtype, times the VAE's scaling factor.

    Raises:
        ValueError: strength below 1 without latents, or latents or embeddings that do not fit.

    Source: agrees with diffusers' ``KolorsPipeline`` from noise, and with KwaiKolorsWrapper's sampler from
    latents, which diffusers' own image-to-image pipeline does not (it drops the pooled embeddings).
    """
    if latents is None and options.strength < 1.0:
        raise ValueError(
            f"A denoise strength of {options.strength:g} needs a latent to start from, and none is given. "
            "Connect one (VAE Encode of a picture), or set the strength to 1."
        )
    check_embeds(embeds, unet)
    height, width = options.height, options.width
    if latents is not None:
        check_latents(latents, unet)
        embeds = match_batch(embeds, latents)
        latents = latents.to(unet.device, unet.dtype)
        height, width = (side * VAE_SCALE_FACTOR for side in latents.shape[2:])
    batch_size = embeds.batch_size
    generator = torch.Generator(noise_device or unet.device).manual_seed(options.seed)
    scheduler = build_scheduler(options.scheduler, options.noise_schedule)
    timesteps = set_timesteps_(scheduler, options.num_inference_steps, options.num_steps_run)

    shape = (batch_size, unet.config.in_channels, height // VAE_SCALE_FACTOR, width // VAE_SCALE_FACTOR)
    noise_shape = shape if latents is None else tuple(latents.shape)
    noise = get_noise(noise_shape, generator, device=unet.device, dtype=unet.dtype)
    latents = get_start_latents(scheduler, timesteps, noise, latents, batch_size)

    guided = options.guidance_scale > 1.0
    conditioning = get_conditioning(embeds, unet, height=height, width=width, guided=guided)
    denoiser = build_denoiser(unet, conditioning, timesteps, size=shape[2:], speed=speed)
    if denoiser.is_compiled and on_progress:
        on_progress(0, options.num_steps_run, "Compiling the UNet's blocks: the first steps of a kind take minutes")
    last_guided = math.ceil(speed.guidance_until * len(timesteps)) if guided else 0
    step_options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for index, timestep in enumerate(timesteps):
        if guided and index == last_guided:
            denoiser.drop_negatives_()
        noise_pred = denoiser(scheduler.scale_model_input(latents, timestep), index)
        if index < last_guided:
            noise_pred = guide(noise_pred, options.guidance_scale)
        latents = scheduler.step(noise_pred, timestep, latents, **step_options, return_dict=False)[0]
        is_last = index + 1 == len(timesteps)
        if on_step and (is_last or (index + 1) % scheduler.order == 0):
            on_step((index + scheduler.order) // scheduler.order, options.num_steps_run, latents)
    return latents
