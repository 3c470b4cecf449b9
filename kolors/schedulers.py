"""Noise schedules: a table from the name in a workflow to a diffusers scheduler with Kolors' settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Source: scheduler/scheduler_config.json of Kwai-Kolors/Kolors. SDXL has 1000 timesteps and beta_end 0.012.
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


@dataclass(frozen=True)
class SchedulerSpec:
    """A diffusers class and what it gets beside the schedule."""

    class_name: str
    settings: Mapping[str, object] = field(default_factory=dict)


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
    }
)


def build_scheduler(name: str) -> SchedulerMixin:
    """Makes a scheduler object for one run; schedulers carry the state of a run and are never shared.

    Raises:
        ValueError: no scheduler has this name.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise ValueError(f"No scheduler is called {name!r}. Choose one of: {', '.join(SCHEDULERS)}.")
    spec = SCHEDULERS[name]
    return getattr(diffusers, spec.class_name)(**KOLORS_SCHEDULE, **spec.settings)
