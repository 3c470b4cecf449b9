"""Sampling on a graphics card against diffusers' KolorsPipeline, eager and compiled: full size, half precision, 1024².

Lists no rows where there is no CUDA device. The tests run the same pairs on the CPU with a tiny UNet.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from pairs import Case, Pair
from sampling import PROMPT_TOKENS, build_pair
from trial_models import build_random_unet, make_embeds

from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SIDE, STEPS, QUICK_STEPS = 1024, 25, 5
# Half precision has 11 bits: 5e-4 for a sum in another order, which many steps of a random UNet spread.
TOLERANCE = 5e-2


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows; none without a graphics card. Compiling takes minutes and is not quick."""
    if not torch.cuda.is_available():
        return []
    steps, pairs = (QUICK_STEPS, 2) if quick else (STEPS, 5)
    return [
        Case(name=f"card 1024 {name}", build=partial(build_card_pair, steps, compiled), pairs=pairs, device="cuda")
        for name, compiled in (("eager", False), ("compiled", True))
        if not (quick and compiled)
    ]


@cache
def get_unet() -> UNet2DConditionModel:
    """Makes the full-size UNet with random weights, once for both rows."""
    return build_random_unet(KOLORS_UNET_CONFIG, device="cuda", dtype=torch.float16)


def build_card_pair(steps: int, compiled: bool) -> Pair:
    """Pairs both at full size."""
    embeds = make_embeds(4096, PROMPT_TOKENS, device="cuda", dtype=torch.float16)
    return build_pair(get_unet(), embeds, side=SIDE, steps=steps, compiled=compiled, tolerance=TOLERANCE)
