"""What every choice that is made for speed or memory does to the bundled model's pictures: does it draw what is asked?

    python benchmarks/quality.py --only reuse --prompts 6 --seeds 4

The judge is that of the bundled model (demo/recipe/evaluate.py): a classifier reads shape, colour and background, and
the drawn shape is laid over the ideal one. Every choice draws the same prompts from the same noise as the plain way.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache

import numpy as np
import torch
from pairs import time_run
from trial_models import DEMO_MODEL

from kolors_nodes.demo.recipe.captions import HELD_OUT, LANGUAGES, SEEN, Combination
from kolors_nodes.demo.recipe.classifier import load_classifier
from kolors_nodes.demo.recipe.evaluate import choose_prompts, judge
from kolors_nodes.demo.recipe.shapes import RESOLUTION
from kolors_nodes.kolors.options import SCALING_FACTOR, SamplingOptions, SpeedOptions
from kolors_nodes.kolors.prompts import PromptEmbeds, encode_prompts
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.schedulers import SCHEDULERS
from kolors_nodes.kolors.text_encoder import find_tokenizer, load_text_encoder
from kolors_nodes.kolors.tokenizer import Tokenizer
from kolors_nodes.kolors.unet import load_unet
from kolors_nodes.kolors.vae import load_vae

PLAIN = SamplingOptions(num_inference_steps=25, guidance_scale=5.0, height=RESOLUTION, width=RESOLUTION)
# The schedulers at these, and at the plain way's 25.
FEW_STEPS = (4, 8)
TIMED_PAIRS = 5
GROUP_SIZE = 6  # prompts that are drawn at once


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to draw.

    Attributes:
        name: for the table.
        sampling: options of the sampler; the seed is set for each run.
        speed: options of the sampler that are made for speed.
        unet: the UNet's precision.
        text: the text encoder's precision.
    """

    name: str
    sampling: SamplingOptions = PLAIN
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    unet: str = "fp32"
    text: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a choice drew: pictures (N, H, W, 3) in [0, 1], and what was asked for."""

    pictures: torch.Tensor
    asked: list[Combination]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A row of the table.

    Attributes:
        name: of the choice.
        pictures: how many were judged, N.
        right: share with shape, colour and background as asked.
        low: lower end of the share's 95 % interval (Wilson).
        high: its upper end.
        overlap: mean intersection over union of the drawn and the ideal shape.
        overlap_change: mean change of it against the plain way, picture by picture.
        overlap_error: standard error of that change.
        difference: mean absolute difference of a pixel from the plain way's, in levels of 255.
        speed: how many times as fast as the plain way one picture is sampled, median of pairs of runs in turns.
    """

    name: str
    pictures: int
    right: float
    low: float
    high: float
    overlap: float
    overlap_change: float
    overlap_error: float
    difference: float
    speed: float


def list_choices() -> list[Choice]:
    """Lists the ways to draw; the first one is the plain way."""
    choices = [Choice(name="plain: Euler, 25 steps, float32")]
    for every in (2, 3, 5):
        choices.append(Choice(name=f"feature_reuse {every}", speed=SpeedOptions(feature_reuse=every)))
    for share in (0.8, 0.6, 0.4, 0.2):
        choices.append(Choice(name=f"guidance_until {share}", speed=SpeedOptions(guidance_until=share)))
    both = SpeedOptions(feature_reuse=2, guidance_until=0.6)
    choices.append(Choice(name="feature_reuse 2, guidance_until 0.6", speed=both))
    choices += [Choice(name=f"UNet {precision}", unet=precision) for precision in ("bf16", "fp8", "nf4")]
    choices += [Choice(name=f"text encoder {precision}", text=precision) for precision in ("bf16", "quant8", "quant4")]
    for scheduler in SCHEDULERS:
        for steps in (*FEW_STEPS, 25):
            sampling = replace(PLAIN, scheduler=scheduler, num_inference_steps=steps)
            if sampling != PLAIN:
                choices.append(Choice(name=f"{scheduler}, {steps} steps", sampling=sampling))
    # Last, as it takes minutes before the first picture.
    return [*choices, Choice(name="compile", speed=SpeedOptions(compile=True))]


@cache
def get_unet(precision: str):
    """Loads the bundled UNet, each precision once."""
    return load_unet(DEMO_MODEL / "unet", precision=precision)


@cache
def get_vae():
    """Loads the bundled VAE, once."""
    return load_vae(DEMO_MODEL / "vae")


@cache
def get_groups(precision: str, count: int) -> list[tuple[PromptEmbeds, tuple[Combination, ...]]]:
    """Encodes prompts of all groups (seen and held-out combinations, in both languages) with what they ask for."""
    encoder = load_text_encoder(DEMO_MODEL / "text_encoder", precision=precision)
    tokenizer = Tokenizer(find_tokenizer(DEMO_MODEL))
    groups = []
    for combinations in (SEEN, HELD_OUT):
        for language in LANGUAGES:
            chosen = choose_prompts(combinations, language, count, np.random.default_rng(7))
            for start in range(0, count, GROUP_SIZE):
                prompts, asked = zip(*chosen[start : start + GROUP_SIZE], strict=True)
                groups.append((encode_prompts(encoder, tokenizer, prompts, [""] * len(prompts)), asked))
    return groups


def draw(choice: Choice, prompts: int, seeds: int) -> Drawn:
    """Draws every prompt with every seed."""
    pictures, asked = [], []
    for embeds, combinations in get_groups(choice.text, prompts):
        for seed in range(seeds):
            pictures.append(get_vae().decode(sample_latents(choice, embeds, seed) / SCALING_FACTOR))
            asked += combinations
    return Drawn(pictures=torch.cat(pictures), asked=asked)


def sample_latents(choice: Choice, embeds: PromptEmbeds, seed: int = 0) -> torch.Tensor:
    """Samples the latents of a group of prompts, (B, C, h, w)."""
    return sample(get_unet(choice.unet), embeds, replace(choice.sampling, seed=seed), speed=choice.speed)


def measure_speed(choice: Choice, plain: Choice, pairs: int) -> float:
    """Gives how many times as fast as the plain way a choice samples one picture."""
    embeds = get_groups(choice.text, 1)[0][0]
    for each in (plain, choice):  # what a first run prepares is not in the time
        sample_latents(each, embeds)
    ratios = []
    for _ in range(pairs):
        seconds = [time_run(lambda each=each: [sample_latents(each, embeds)]).seconds for each in (plain, choice)]
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def get_interval(share: float, count: int) -> tuple[float, float]:
    """Gives Wilson's 95 % interval of a share of ``count`` independent trials. Source: Wilson 1927."""
    z = 1.96
    centre = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - width) / (1 + z * z / count), (centre + width) / (1 + z * z / count)


def compare(
    name: str, drawn: Drawn, plain: Drawn, read: Callable[[Drawn], list[dict[str, float]]], speed: float
) -> Verdict:
    """Judges what a choice drew, beside the plain way's pictures."""
    scores, plain_scores = read(drawn), read(plain)
    right = float(np.mean([score["all"] for score in scores]))
    low, high = get_interval(right, len(scores))
    change = np.array([score["iou"] - other["iou"] for score, other in zip(scores, plain_scores, strict=True)])
    return Verdict(
        name=name,
        pictures=len(scores),
        right=right,
        low=low,
        high=high,
        overlap=float(np.mean([score["iou"] for score in scores])),
        overlap_change=float(change.mean()),
        overlap_error=float(change.std(ddof=1) / math.sqrt(len(change))),
        difference=float((drawn.pictures - plain.pictures).abs().mean()) * 255,
        speed=speed,
    )


def iterate_verdicts(choices: list[Choice], prompts: int, seeds: int) -> Iterator[Verdict]:
    """Judges choices one by one."""
    classifier = load_classifier()

    def read(drawn: Drawn) -> list[dict[str, float]]:
        return judge(drawn.pictures, drawn.asked, classifier)

    plain_way = list_choices()[0]
    plain = draw(plain_way, prompts, seeds)
    for choice in choices:
        if choice == plain_way:
            yield compare(choice.name, plain, plain, read, 1.0)
            continue
        speed = measure_speed(choice, plain_way, TIMED_PAIRS)
        yield compare(choice.name, draw(choice, prompts, seeds), plain, read, speed)


def format_row(verdict: Verdict) -> str:
    """Lays a row out for the Markdown table."""
    cells = (
        verdict.name,
        f"{verdict.right:.3f} ({verdict.low:.3f} to {verdict.high:.3f})",
        f"{verdict.overlap:.3f}",
        f"{verdict.overlap_change:+.3f} ± {verdict.overlap_error:.3f}",
        f"{verdict.difference:.2f}",
        f"{verdict.speed:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> int:
    """Judges and prints, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="choices with NAME in their name")
    parser.add_argument("--prompts", type=int, default=6, help="of each of the four groups (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="pictures for each prompt (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    chosen = parser.parse_args(arguments)
    choices = [choice for choice in list_choices() if not chosen.only or any(t in choice.name for t in chosen.only)]
    if not choices:
        parser.error(f"No choice has this in its name. There are: {'; '.join(c.name for c in list_choices())}.")
    verdicts = []
    if not chosen.json:
        print("| choice | all three right (95 %) | overlap | its change | pixels differ by | speed |")
        print("| --- | --- | --- | --- | --- | --- |")
    for verdict in iterate_verdicts(choices, chosen.prompts, chosen.seeds):
        verdicts.append(asdict(verdict))
        print(format_row(verdict), flush=True, file=sys.stderr if chosen.json else sys.stdout)
    if chosen.json:
        print(json.dumps(verdicts, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
