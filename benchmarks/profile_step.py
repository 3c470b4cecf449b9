"""Where one sampling step goes: the ten operators that take most of it, in diffusers' pipeline and in ours.

python benchmarks/profile_step.py          # the mid-size UNet on the CPU, 256 x 256 pixels
python benchmarks/profile_step.py --card   # the full-size UNet on the graphics card, 1024 x 1024 pixels
"""

from __future__ import annotations

import argparse

from graphics_card import SIDE
from graphics_card import get_unet as get_full_size_unet
from sampling import PROMPT_TOKENS, Run, get_our_run, get_peer_run
from torch.profiler import ProfilerActivity, profile
from trial_models import get_mid_size_unet, make_embeds


def profile_second_step(run: Run, *, card: bool) -> str:
    """Profiles a run's second step, in which nothing is computed that only a run's first one needs."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]
    profiler = profile(activities=activities)
    calls: list[int] = []

    def on_step() -> None:
        calls.append(1)
        if len(calls) == 1:
            profiler.start()
        else:
            profiler.stop()

    run(2, on_step)
    order = "self_device_time_total" if card else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=60)


def main(arguments: list[str] | None = None) -> int:
    """Prints both profiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="store_true", help="on the graphics card, at full size")
    chosen = parser.parse_args(arguments)
    unet, side = (get_full_size_unet(), SIDE) if chosen.card else (get_mid_size_unet(), 256)
    embeds = make_embeds(4096, PROMPT_TOKENS, device=str(unet.device), dtype=unet.dtype)
    for name, get_run in (("diffusers KolorsPipeline", get_peer_run), ("ours", get_our_run)):
        run = get_run(unet, embeds, side=side)
        run(2, lambda: None)
        print(f"{name}, one step at {side} x {side}:\n{profile_second_step(run, card=chosen.card)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
