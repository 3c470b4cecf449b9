"""The node that samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kolors.options import SCALING_FACTOR, VAE_SCALE_FACTOR, SamplingOptions
from ..kolors.schedulers import NOISE_SCHEDULES, SCHEDULERS
from .encode import from_socket
from .host import get_host
from .models import KolorsModel

if TYPE_CHECKING:
    import torch

    from ..kolors.prompts import PromptEmbeds

DEFAULTS = SamplingOptions()


class KolorsSampler:
    """Samples latents with the Kolors UNet."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The UNet."}),
                "kolors_embeds": ("KOLORS_EMBEDS", {"tooltip": "The encoded prompts; a picture is drawn for each."}),
                "width": ("INT", {"default": DEFAULTS.width, "min": 64, "max": 2048, "step": 64,
                          "tooltip": "Width in pixels, 64 to 2048. Kolors is best near 1024. Not used with a latent."}),
                "height": ("INT", {"default": DEFAULTS.height, "min": 64, "max": 2048, "step": 64,
                           "tooltip": "Height in pixels, 64 to 2048. Not used with a latent."}),
                "seed": ("INT", {"default": DEFAULTS.seed, "min": 0, "max": 0xFFFFFFFFFFFFFFFF,
                         "tooltip": "Decides the noise, 0 to 2^64 - 1. The same seed gives the same picture."}),
                "steps": ("INT", {"default": DEFAULTS.num_inference_steps, "min": 1, "max": 200, "step": 1,
                          "tooltip": "Steps of the whole schedule, 1 to 200. More are finer and slower."}),
                "cfg": ("FLOAT", {"default": DEFAULTS.guidance_scale, "min": 0.0, "max": 20.0, "step": 0.01,
                        "tooltip": "How closely the prompt is followed, 0 to 20. At 1 and below there is no "
                                   "guidance: twice as fast, the negative prompt is not used."}),
                "scheduler": (list(SCHEDULERS), {"default": DEFAULTS.scheduler,
                              "tooltip": "The method that removes the noise. For 4 to 8 steps take "
                                         "DPMSolverMultistepScheduler or DEISMultistepScheduler; DPM-Solver with "
                                         "karras needs more than 8."}),
            },
            "optional": {
                "latent": ("LATENT", {"tooltip": "Start from this picture (VAE Encode). It sets the size."}),
                "denoise_strength": ("FLOAT", {"default": DEFAULTS.strength, "min": 0.0, "max": 1.0, "step": 0.01,
                                     "tooltip": "Share of the steps that is run on the latent, 0 to 1: the lower, the "
                                                "closer to it. Below 1 a latent is needed."}),
                "noise_device": (["gpu", "cpu"], {"default": "gpu", "advanced": True, "tooltip": "Where noise is "
                                 "drawn: on the device that samples, or on the CPU, where a seed gives the same on "
                                 "every machine."}),
                "noise_schedule": (list(NOISE_SCHEDULES), {"default": DEFAULTS.noise_schedule, "advanced": True,
                                   "tooltip": "Which noise belongs to a timestep: Kolors' 1100 steps, or SDXL's 1000, "
                                              "which few-step LoRAs made for SDXL expect."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The sampled latents, for VAE Decode.",)
    FUNCTION = "process"
    CATEGORY = "Kolors"
    DESCRIPTION = "Draws a picture for each prompt, from noise or starting from a latent."
    SEARCH_ALIASES = ["ksampler", "kolors text to image", "kolors image to image", "img2img", "可图"]

    def process(
        self,
        kolors_model: KolorsModel,
        kolors_embeds: dict[str, torch.Tensor],
        width: int,
        height: int,
        seed: int,
        steps: int,
        cfg: float,
        scheduler: str,
        latent: dict[str, torch.Tensor] | None = None,
        denoise_strength: float = DEFAULTS.strength,
        noise_device: str = "gpu",
        noise_schedule: str = DEFAULTS.noise_schedule,
    ) -> tuple[dict[str, torch.Tensor]]:
        from ..kolors.sampling import sample

        host = get_host()
        options = SamplingOptions(
            num_inference_steps=steps, guidance_scale=cfg, scheduler=scheduler, strength=denoise_strength,
            height=height, width=width, seed=seed, noise_schedule=noise_schedule,
        )  # fmt: skip
        samples = None if latent is None else latent["samples"] * SCALING_FACTOR
        unet, embeds = kolors_model.patched_unet, from_socket(kolors_embeds)
        cells = count_cells(embeds, options, samples)
        with host.on_device(unet, kolors_model, cells, kolors_model.offload):
            latents = sample(
                unet, embeds, options, latents=samples,
                noise_device="cpu" if noise_device == "cpu" else None, on_step=host.report_step,
                speed=kolors_model.speed, on_progress=host.report_work,
            )  # fmt: skip
        return ({"samples": (latents.float() / SCALING_FACTOR).to(host.get_intermediate_device())},)


def count_cells(embeds: PromptEmbeds, options: SamplingOptions, samples: torch.Tensor | None) -> int:
    """Gives the latent cells that the UNet computes at once: of all pictures, twice with guidance."""
    area, batch = options.height * options.width // VAE_SCALE_FACTOR**2, embeds.batch_size
    if samples is not None:
        area, batch = samples.shape[-2] * samples.shape[-1], max(batch, samples.shape[0])
    return area * batch * (2 if options.guidance_scale > 1.0 else 1)
