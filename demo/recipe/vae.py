"""The VAE: Kolors' (SDXL's) structure, f8 and 4 channels, scaled down; trained on free shapes and colours."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL

from .averaging import WeightAverage
from .shapes import RESOLUTION, draw_plain_picture, draw_wild_picture

logger = logging.getLogger(__name__)

SCALING_FACTOR = 0.13025


@dataclass(frozen=True, kw_only=True)
class VAEOptions:
    """How the VAE is trained.

    First on crops, which hold mostly edges and cost a quarter, then on pictures; at last the decoder alone, on
    pictures as the model is taught them and with noise of up to `decoder_noise` (in scaled latents, whose
    deviation is 1): it learns to draw clean edges and flat colours from latents that are not quite right.
    """

    crop_steps: int = 900
    crop_batch_size: int = 32
    crop_size: int = 64
    picture_steps: int = 600
    picture_batch_size: int = 16
    decoder_steps: int = 800
    decoder_batch_size: int = 8
    decoder_noise: float = 0.2
    learning_rate: float = 1.5e-3
    decoder_learning_rate: float = 1e-3
    kl_weight: float = 3e-4
    ema_decay: float = 0.995
    seed: int = 1


def build_vae() -> AutoencoderKL:
    """Makes the untrained VAE.

    Channel counts are multiples of 32 because ComfyUI's VAE is constructed with 32 groups per normalisation;
    8 groups are used (4 channels or more each): one channel per group would erase colour.
    """
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """Turns B pictures (H, W, 3) in [0, 255] into (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def draw_crop(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a random square of `size` pixels."""
    y, x = rng.integers(0, RESOLUTION - size + 1, 2)
    return picture[y : y + size, x : x + size]


def get_loss(vae: AutoencoderKL, pictures: torch.Tensor, kl_weight: float, generator: torch.Generator) -> torch.Tensor:
    """Absolute plus squared error of the reconstruction, plus `kl_weight` nats per latent value."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(logvar / 2) * torch.randn(mean.shape, generator=generator)
        error = vae.decode(latents).sample.float() - pictures
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return error.abs().mean() + error.square().mean() + kl_weight * kl.mean()


def train_vae(options: VAEOptions) -> AutoencoderKL:
    """Trains the VAE and returns its averaged weights, the latents' statistics folded in, the decoder tuned."""
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    vae = build_vae()
    average = WeightAverage(vae, options.ema_decay)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    total = options.crop_steps + options.picture_steps
    started = time.monotonic()
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = (
                options.learning_rate
                * min(1, (step + 1) / 50)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
            )
        if step < options.crop_steps:
            pictures = [
                draw_crop(draw_wild_picture(rng), options.crop_size, rng) for _ in range(options.crop_batch_size)
            ]
        else:
            pictures = [draw_wild_picture(rng) for _ in range(options.picture_batch_size)]
        loss = get_loss(vae, to_tensor(pictures), options.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_(vae)
        if step % 50 == 0 or step == total - 1:
            logger.info("vae step %d/%d loss %.4f, %.0f s", step, total, loss.item(), time.monotonic() - started)
        if step % 200 == 199 or step == total - 1:
            logger.info("vae psnr %.2f dB", get_psnr(average.module, np.random.default_rng(99)))
    fold_statistics_(average.module, np.random.default_rng(options.seed + 1))
    return tune_decoder(average.module, options)


def get_decoder_loss(
    vae: AutoencoderKL, pictures: torch.Tensor, max_noise: float, generator: torch.Generator
) -> torch.Tensor:
    """Absolute plus squared error of what the decoder makes of noisy latents; the encoder is not trained."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean.float()
        deviation = max_noise / vae.config.scaling_factor * torch.rand((len(pictures), 1, 1, 1), generator=generator)
        latents = latents + deviation * torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents).sample.float() - pictures
    return error.abs().mean() + error.square().mean()


def tune_decoder(vae: AutoencoderKL, options: VAEOptions) -> AutoencoderKL:
    """Trains the decoder further with the encoder as it is, so that latents made before stay valid.

    Returns:
        A VAE with the averaged weights.
    """
    rng = np.random.default_rng(options.seed + 2)
    generator = torch.Generator().manual_seed(options.seed + 2)
    average = WeightAverage(vae, options.ema_decay)
    vae.requires_grad_(False)
    parameters = [
        *vae.decoder.requires_grad_(True).parameters(),
        *vae.post_quant_conv.requires_grad_(True).parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=options.decoder_learning_rate, weight_decay=1e-4)
    started = time.monotonic()
    for step in range(options.decoder_steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                options.decoder_learning_rate
                * min(1, (step + 1) / 50)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.decoder_steps)))
            )
        pictures = [
            draw_plain_picture(rng) if rng.random() < 0.6 else draw_wild_picture(rng)
            for _ in range(options.decoder_batch_size)
        ]
        loss = get_decoder_loss(vae, to_tensor(pictures), options.decoder_noise, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update_(vae)
        if step % 100 == 0 or step == options.decoder_steps - 1:
            logger.info(
                "decoder step %d/%d loss %.4f, %.0f s",
                step,
                options.decoder_steps,
                loss.item(),
                time.monotonic() - started,
            )
    return average.module.eval()


@torch.no_grad()
def get_psnr(vae: AutoencoderKL, rng: np.random.Generator, count: int = 64) -> float:
    """Returns the mean peak signal-to-noise ratio in dB of `count` reconstructed pictures."""
    pictures = to_tensor([draw_wild_picture(rng) for _ in range(count)])
    decoded = torch.cat(
        [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pictures.split(16)]
    )
    squared = ((decoded - pictures) / 2).square().mean((1, 2, 3))
    return float((-10 * squared.log10()).mean())


@torch.no_grad()
def fold_statistics_(vae: AutoencoderKL, rng: np.random.Generator, count: int = 256) -> None:
    """Rescales the latents so that `latents * scaling_factor` has mean 0 and deviation 1 in each channel.

    The 1 x 1 convolutions around the latents (`quant_conv`, `post_quant_conv`) absorb an affine map exactly.
    """
    pictures = to_tensor([draw_wild_picture(rng) for _ in range(count)])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(16)])
    mean = latents.mean((0, 2, 3))
    scale = 1 / (latents.std((0, 2, 3)) * vae.config.scaling_factor)  # new = (old - mean) * scale
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] *= scale[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * scale
    quant.bias[channels:] += 2 * scale.log()  # the log variances follow
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= scale[None, :, None, None]
