"""Noise schedules: a table from the name in a workflow to a diffusers scheduler with Kolors' settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

# Source: scheduler/scheduler_config.json of Kwai-Kolors/Kolors.
KOLORS_SCHEDULE: Mapping[str, object] = MappingProxyType(
    {
        "num_train_timesteps": 1100,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.014,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
)
# SDXL's differs in two numbers. LoRAs that SDXL was distilled with into few steps expect them.
# Source: scheduler/scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0.
SDXL_SCHEDULE: Mapping[str, object] = MappingProxyType(
    {**KOLORS_SCHEDULE, "num_train_timesteps": 1000, "beta_end": 0.012}
)
NOISE_SCHEDULES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {"kolors": KOLORS_SCHEDULE, "sdxl": SDXL_SCHEDULE}
)


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers class and what it gets beside the schedule, or in place of a part of it."""

    class_name: str
    settings: Mapping[str, object] = field(default_factory=dict)


_KARRAS = {"use_karras_sigmas": True}
_TRAILING = {"timestep_spacing": "trailing"}


# The order is that of the widget in saved workflows; new names go to the end.
SCHEDULERS: Mapping[str, SchedulerSpec] = MappingProxyType(
    {
        "EulerDiscreteScheduler": SchedulerSpec("EulerDiscreteScheduler"),
        "EulerAncestralDiscreteScheduler": SchedulerSpec("EulerAncestralDiscreteScheduler"),
        "DPMSolverMultistepScheduler": SchedulerSpec("DPMSolverMultistepScheduler"),
        "DPMSolverMultistepScheduler_SDE_karras": SchedulerSpec(
            "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
        ),
        "UniPCMultistepScheduler": SchedulerSpec("UniPCMultistepScheduler"),
        "DEISMultistepScheduler": SchedulerSpec("DEISMultistepScheduler"),
        "DPMSolverMultistepScheduler_karras": SchedulerSpec("DPMSolverMultistepScheduler", _KARRAS),
        "EulerDiscreteScheduler_karras": SchedulerSpec("EulerDiscreteScheduler", _KARRAS),
        "EulerDiscreteScheduler_trailing": SchedulerSpec("EulerDiscreteScheduler", _TRAILING),
        "HeunDiscreteScheduler": SchedulerSpec("HeunDiscreteScheduler"),
        # Latents are no pictures: nothing in them is cut off at 1.
        "DDIMScheduler": SchedulerSpec("DDIMScheduler", {"clip_sample": False}),
        "DDIMScheduler_trailing": SchedulerSpec("DDIMScheduler", {"clip_sample": False, **_TRAILING}),
        "LCMScheduler": SchedulerSpec("LCMScheduler"),
        "TCDScheduler": SchedulerSpec("TCDScheduler"),
    }
)


def build_scheduler(name: str, noise_schedule: str = "kolors") -> SchedulerMixin:
    """Makes a scheduler object for one run; schedulers carry the state of a run and are never shared.

    Args:
        name: one of ``SCHEDULERS``.
        noise_schedule: one of ``NOISE_SCHEDULES``.

    Raises:
        ValueError: no scheduler or noise schedule has this name.
    """
    import diffusers

    for kind, chosen, names in (("scheduler", name, SCHEDULERS), ("noise schedule", noise_schedule, NOISE_SCHEDULES)):
        if chosen not in names:
            raise ValueError(f"No {kind} is called {chosen!r}. Choose one of: {', '.join(names)}.")
    spec = SCHEDULERS[name]
    return getattr(diffusers, spec.class_name)(**{**NOISE_SCHEDULES[noise_schedule], **spec.settings})


def set_timesteps_(scheduler: SchedulerMixin, num_inference_steps: int, num_steps_run: int) -> torch.Tensor:
    """Readies a scheduler for the last so many steps of a schedule.

    The timesteps stay on the CPU, where the schedulers' tables are: looking one up never waits for the device.

    Returns:
        Those of all evaluations of the UNet in turn. There are ``scheduler.order`` to a step, but one to the last.
    """
    # The consistency schedulers choose among the steps of their distillation, and take no more unless told so.
    distilled = scheduler.config.get("original_inference_steps") or num_inference_steps
    extra = {"original_inference_steps": num_inference_steps} if num_inference_steps > distilled else {}
    scheduler.set_timesteps(num_inference_steps, device="cpu", **extra)
    start = (num_inference_steps - num_steps_run) * scheduler.order
    # Karras schedules round to equal timesteps at many steps; looked up by value, a run would start too late.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:]
