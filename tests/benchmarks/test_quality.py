"""The quality table: its interval, and that it compares picture by picture."""

from __future__ import annotations

import pytest
import torch


def test_the_interval_is_wilsons(benchmark):
    """Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 15 of 148 is 0.0624 to 0.1605, 0 of 20 is 0 to 0.1611."""
    get_interval = benchmark("quality").get_interval
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert get_interval(right / count, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_changes_are_taken_picture_by_picture(benchmark):
    quality = benchmark("quality")
    plain = quality.Drawn(pictures=torch.zeros(4, 2, 2, 3), asked=[None] * 4)
    other = quality.Drawn(pictures=torch.full((4, 2, 2, 3), 1 / 255), asked=[None] * 4)
    overlaps = {id(plain): [0.9, 0.8, 0.7, 0.6], id(other): [0.8, 0.7, 0.6, 0.9]}

    def read(drawn):
        return [{"all": float(overlap > 0.65), "iou": overlap} for overlap in overlaps[id(drawn)]]

    verdict = quality.compare("row", other, plain, read, 4.0)
    assert (verdict.pictures, verdict.right, verdict.speed) == (4, 0.75, 4.0)
    assert verdict.overlap_change == pytest.approx(0.0, abs=1e-12)
    assert verdict.overlap_error == pytest.approx(0.1)  # changes -0.1 three times and 0.3: deviation 0.2, of four
    assert verdict.difference == pytest.approx(1.0, rel=1e-5)


def test_every_speed_option_precision_and_scheduler_is_a_choice(benchmark):
    from kolors_nodes.kolors.options import SpeedOptions
    from kolors_nodes.kolors.precision import TEXT_PRECISIONS, UNET_PRECISIONS
    from kolors_nodes.kolors.schedulers import SCHEDULERS

    choices = benchmark("quality").list_choices()
    plain = SpeedOptions()
    for name in SpeedOptions.__dataclass_fields__:
        assert any(getattr(choice.speed, name) != getattr(plain, name) for choice in choices), name
    # fp16 is computed in float32 on a CPU, so it is no choice there.
    assert {choice.unet for choice in choices} == set(UNET_PRECISIONS) - {"fp16"}
    assert {choice.text for choice in choices} == set(TEXT_PRECISIONS) - {"fp16"}
    assert {choice.sampling.scheduler for choice in choices} == set(SCHEDULERS)
    assert len({choice.name for choice in choices}) == len(choices)


def test_drawing_takes_prompts_of_all_groups_with_every_seed(benchmark):
    quality = benchmark("quality")
    few = quality.replace(quality.PLAIN, num_inference_steps=1)
    one_step = quality.Choice(name="one step", sampling=few)
    drawn = quality.draw(one_step, prompts=1, seeds=2)
    assert quality.measure_speed(one_step, one_step, pairs=1) > 0
    assert drawn.pictures.shape == (8, quality.RESOLUTION, quality.RESOLUTION, 3)
    assert len(drawn.asked) == 8
    assert drawn.asked[0] == drawn.asked[1] and len(set(drawn.asked)) > 1
