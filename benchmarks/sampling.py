"""Sampling on the CPU against diffusers' KolorsPipeline: same weights, same text, same noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from arithmetic import build_counter
from pairs import Case, Outputs, Pair
from trial_models import encode_with_bundled_model, get_bundled_unet, get_mid_size_unet, make_embeds

from kolors_nodes.kolors.options import EXACT, SamplingOptions, SpeedOptions
from kolors_nodes.kolors.prompts import PromptEmbeds
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.schedulers import build_scheduler

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SEED, GUIDANCE_SCALE = 7, 5.0
# float32 on both sides, sums in another order; the limit is the promise of the project.
TOLERANCE = 1e-4
PROMPT_TOKENS = 24  # a sentence
# Approximate choices, beside our own plain steps. What they do to pictures, quality.py measures.
CHOICES = {
    "feature_reuse 2": SpeedOptions(feature_reuse=2),
    "feature_reuse 3": SpeedOptions(feature_reuse=3),
    "guidance_until 0.6": SpeedOptions(guidance_until=0.6),
}
# Runs (steps, and what to call after each step) and gives the latents.
Run = Callable[[int, Callable[[], None]], Outputs]


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows; quick ones take fewer steps, so what is computed once a run weighs more in them."""
    steps, large_steps = (2, 1) if quick else (20, 20)

    def make_case(name: str, side: int, steps: int, num_tokens: int = PROMPT_TOKENS) -> Case:
        build = partial(build_mid_size_pair, side, steps, num_tokens)
        return Case(name=name, build=build, pairs=2, is_long=True)

    cases = [
        Case(name="sampling bundled 128", build=lambda: build_bundled_pair(20), pairs=3 if quick else 15),
        make_case("sampling mid 256", 256, steps),
        make_case("sampling mid 512", 512, large_steps),
        make_case("sampling full prompt 256", 256, steps, num_tokens=256),
    ]
    cases += [
        Case(name=f"choice mid 256 {name}", build=partial(build_choice_pair, 256, steps, speed), pairs=2, is_long=True)
        for name, speed in CHOICES.items()
    ]
    return cases[:3] if quick else cases


def build_bundled_pair(steps: int) -> Pair:
    """Pairs both on the bundled model at 128 x 128 pixels."""
    embeds = encode_with_bundled_model("a red circle on a white background")
    return build_pair(get_bundled_unet(), embeds, side=128, steps=steps)


def build_mid_size_pair(side: int, steps: int, num_tokens: int) -> Pair:
    """Pairs both on the random mid-size model."""
    return build_pair(get_mid_size_unet(), make_embeds(4096, num_tokens), side=side, steps=steps)


def build_choice_pair(side: int, steps: int, speed: SpeedOptions) -> Pair:
    """Pairs an approximate choice with the plain steps, on the random mid-size model."""
    unet, embeds = get_mid_size_unet(), make_embeds(4096, PROMPT_TOKENS)
    ours, plain = get_our_run(unet, embeds, side=side, speed=speed), get_our_run(unet, embeds, side=side)
    ours(2, _do_nothing)
    return Pair(
        ours=lambda: ours(steps, _do_nothing),
        peer=lambda: plain(steps, _do_nothing),
        peer_name="our plain steps",
        tolerance=10.0,  # another picture, by intention; even its negative differs by 2
        note=f"{steps} steps, cfg {GUIDANCE_SCALE:g}, float32; approximate",
    )


def build_pair(
    unet: UNet2DConditionModel,
    embeds: PromptEmbeds,
    *,
    side: int,
    steps: int,
    compiled: bool = False,
    tolerance: float = TOLERANCE,
) -> Pair:
    """Pairs our sampler with diffusers' pipeline on one UNet, whose weights both read.

    Args:
        unet: the model, on its device and in its dtype.
        embeds: one prompt, likewise.
        side: of the picture, in pixels.
        steps: of the schedule.
        compiled: whether both are compiled. The peer then gets a copy of the UNet, prepared as diffusers' guide has
            it: channels last, and ``torch.compile`` with ``max-autotune``.
        tolerance: see ``Pair``.
    """
    plain = get_our_run(unet, embeds, side=side), get_peer_run(unet, embeds, side=side)
    # What is compiled shows the counter nothing: the plain ways are counted, which warms both up.
    ours_flops, peer_flops = (count_run_flops(run, steps) for run in plain)
    ours, peer = plain
    if compiled:
        ours = get_our_run(unet, embeds, side=side, speed=SpeedOptions(compile=True))
        peer_unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        peer_unet.compile(mode="max-autotune", fullgraph=True)
        peer = get_peer_run(peer_unet, embeds, side=side)
        for run in (ours, peer):
            run(min(steps, 2), _do_nothing)
    return Pair(
        ours=lambda: ours(steps, _do_nothing),
        peer=lambda: peer(steps, _do_nothing),
        peer_name=f"diffusers KolorsPipeline{', compiled' if compiled else ''}",
        tolerance=tolerance,
        ours_flops=ours_flops,
        peer_flops=peer_flops,
        moved_bytes=steps * sum(parameter.nbytes for parameter in unet.parameters()),
        note=f"{steps} step{'' if steps == 1 else 's'}, cfg {GUIDANCE_SCALE:g}, {unet.dtype}".replace("torch.", ""),
    )


def get_our_run(unet: UNet2DConditionModel, embeds: PromptEmbeds, *, side: int, speed: SpeedOptions = EXACT) -> Run:
    """Gives our sampler."""

    def run(steps: int, on_step: Callable[[], None]) -> Outputs:
        options = SamplingOptions(
            num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, height=side, width=side, seed=SEED
        )
        return [sample(unet, embeds, options, noise_device="cpu", on_step=lambda *_: on_step(), speed=speed)]

    return run


def get_peer_run(unet: UNet2DConditionModel, embeds: PromptEmbeds, *, side: int) -> Run:
    """Gives diffusers' pipeline, which draws the same noise from the same seed."""
    from diffusers import KolorsPipeline

    scheduler = build_scheduler("EulerDiscreteScheduler")
    pipeline = KolorsPipeline(vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def run(steps: int, on_step: Callable[[], None]) -> Outputs:
        def end_step(pipeline, index, timestep, tensors):
            on_step()
            return tensors

        return [
            pipeline(
                prompt_embeds=embeds.prompt_embeds,
                pooled_prompt_embeds=embeds.pooled_prompt_embeds,
                negative_prompt_embeds=embeds.negative_prompt_embeds,
                negative_pooled_prompt_embeds=embeds.negative_pooled_prompt_embeds,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator().manual_seed(SEED),
                output_type="latent",
                callback_on_step_end=end_step,
            ).images
        ]

    return run


def count_run_flops(run: Run, steps: int) -> int:
    """Counts the operations of a run of so many steps from one of two, which serves as warm-up.

    What is computed once a run falls into the first step; the second is what every further one takes.
    """
    counts: list[int] = []
    with build_counter() as counter:
        run(min(steps, 2), lambda: counts.append(counter.get_total_flops()))
    return counts[0] + (steps - 1) * (counts[-1] - counts[0]) if steps > 1 else counts[0]


def _do_nothing() -> None:
    """Stands in for what is called after each step."""
