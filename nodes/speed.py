"""The node that trades for speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..kolors.options import EXACT, SpeedOptions
from .models import KolorsModel


class KolorsSpeed:
    """Sets how a Kolors model may be faster than its plain steps."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The UNet. It is not changed; what comes out carries the "
                                                            "settings."}),
                "compile": ("BOOLEAN", {"default": EXACT.compile,
                            "tooltip": "Exact. Translates the UNet's blocks for the device with torch.compile. The "
                                       "first run takes minutes longer, later ones of all sizes are faster. Where a "
                                       "compiler or Triton is missing, the log says so and nothing is compiled."}),
                "feature_reuse": ("INT", {"default": EXACT.feature_reuse, "min": 1, "max": 20, "step": 1,
                                  "tooltip": "Approximate. The UNet's deep blocks run in one of so many steps, 1 to "
                                             "20, and their result is used in the others. 1 is exact."}),
                "guidance_until": ("FLOAT", {"default": EXACT.guidance_until, "min": 0.0, "max": 1.0, "step": 0.05,
                                   "tooltip": "Approximate. Share of the steps with guidance (cfg), 0 to 1; the rest "
                                              "take half the time and do not see the negative prompt. 1 is exact."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("KOLORSMODEL",)
    RETURN_NAMES = ("kolors_model",)
    OUTPUT_TOOLTIPS = ("The same model with these settings, for Kolors Sampler.",)
    FUNCTION = "set_speed"
    CATEGORY = "Kolors"
    DESCRIPTION = "Makes sampling faster: compiled, or approximate by reusing deep features or guiding fewer steps."
    SEARCH_ALIASES = ["torch compile", "deepcache", "speed up", "faster", "加速"]

    def set_speed(
        self, kolors_model: KolorsModel, compile: bool, feature_reuse: int, guidance_until: float
    ) -> tuple[KolorsModel]:
        speed = SpeedOptions(compile=compile, feature_reuse=feature_reuse, guidance_until=guidance_until)
        return (replace(kolors_model, speed=speed),)
