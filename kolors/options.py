"""How to sample, as checked values. Loads no torch: nodes read their widgets' defaults from here."""

from __future__ import annotations

from dataclasses import dataclass

from .schedulers import NOISE_SCHEDULES, SCHEDULERS

VAE_SCALE_FACTOR = 8  # pixels per latent cell, along each side
SCALING_FACTOR = 0.13025  # latents of the UNet = latents of the VAE times this (SDXL's VAE)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to sample.

    Attributes:
        num_inference_steps: steps of the whole schedule, 1 to 1100, with SDXL's noise schedule to 1000.
        guidance_scale: classifier-free guidance; at 1 and below there is none and the negatives are not used.
        scheduler: a name of ``SCHEDULERS``.
        strength: share of the schedule that is run, from its end; below 1 only on given latents.
        height: picture height in pixels, a multiple of 8; not used where latents are given.
        width: picture width, likewise.
        seed: of the generator that draws all noise.
        noise_schedule: a name of ``NOISE_SCHEDULES``: which noise the UNet takes a timestep for.

    Raises:
        ValueError: a value is out of range, or so few steps are left that nothing would be run.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    scheduler: str = "EulerDiscreteScheduler"
    strength: float = 1.0
    height: int = 1024
    width: int = 1024
    seed: int = 0
    noise_schedule: str = "kolors"

    def __post_init__(self) -> None:
        if self.noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"No noise schedule is called {self.noise_schedule!r}. Choose one of: {', '.join(NOISE_SCHEDULES)}."
            )
        most = NOISE_SCHEDULES[self.noise_schedule]["num_train_timesteps"]
        if not 1 <= self.num_inference_steps <= most:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}, expected 1 to {most}.")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"No scheduler is called {self.scheduler!r}. Choose one of: {', '.join(SCHEDULERS)}.")
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"The denoise strength is {self.strength}, expected 0 to 1.")
        if self.num_steps_run == 0:
            raise ValueError(
                f"Nothing would be sampled: {self.num_inference_steps} steps at a denoise strength of "
                f"{self.strength:g} leave int({self.num_inference_steps} x {self.strength:g}) = 0 steps. "
                "Raise the steps or the strength."
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size < VAE_SCALE_FACTOR or size % VAE_SCALE_FACTOR:
                raise ValueError(f"The {name} is {size} pixels, expected a multiple of {VAE_SCALE_FACTOR}.")

    @property
    def num_steps_run(self) -> int:
        """Steps that are run: ``int(steps x strength)``, as diffusers and the existing packs count them."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How to be faster than the plain steps. ``compile`` changes nothing but rounding, the others approximate.

    The defaults change nothing.

    Attributes:
        compile: translate the repeated blocks for the device. The first run of a size class takes minutes.
        feature_reuse: n, of which the UNet's deep blocks are computed in one of n evaluations, and their result is used
            in the others; 1 computes them always. Source: Ma et al. 2023 (DeepCache), with a uniform interval.
        guidance_until: share of the steps with guidance, from the start; the rest run without, in half the time.

    Raises:
        ValueError: a value is out of range.
    """

    compile: bool = False
    feature_reuse: int = 1
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.feature_reuse <= 20:
            raise ValueError(f"feature_reuse is {self.feature_reuse}, expected 1 to 20 steps.")
        if not 0.0 <= self.guidance_until <= 1.0:
            raise ValueError(f"guidance_until is {self.guidance_until}, expected 0 to 1.")


EXACT = SpeedOptions()
