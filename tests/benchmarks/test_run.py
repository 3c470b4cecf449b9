"""The benchmark command: the rows it promises, and that a ratio needs equal outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from .conftest import FOLDER

PROMISED = {"name", "ours_s", "peer_s", "ratio", "spread", "max_relative_difference"}


@pytest.fixture
def machine(benchmark):
    return benchmark("machine").Machine(name="none", flops=1e9, bytes=1e9)


def make_pair(pairs, ours, peer, **fields):
    return pairs.Pair(ours=lambda: ours, peer=lambda: peer, peer_name="peer", tolerance=1e-4, **fields)


@pytest.mark.parametrize(("change", "has_ratio"), [(0.0, True), (1e-5, True), (1e-3, False), (float("nan"), False)])
def test_a_row_with_outputs_that_differ_has_no_ratio(benchmark, machine, change, has_ratio):
    pairs = benchmark("pairs")
    output = torch.linspace(-1, 1, 12).view(3, 4)
    changed = output.clone()
    changed[1, 2] += change
    row = pairs.measure("row", make_pair(pairs, [output, changed], [output, output]), machine, pairs=2)
    assert (row.ratio is not None) == has_ratio
    assert row.ours_s > 0 and row.peer_s > 0
    if change == change:
        assert row.max_relative_difference == pytest.approx(change, abs=2e-7)  # float32 near one


def test_the_worst_pair_decides(benchmark, machine):
    """Ours is wrong in the second pair alone."""
    pairs = benchmark("pairs")
    outputs = iter([torch.ones(2), torch.zeros(2), torch.ones(2)])
    pair = replace(make_pair(pairs, None, [torch.ones(2)]), ours=lambda: [next(outputs)])
    row = pairs.measure("row", pair, machine, pairs=3)
    assert row.ratio is None and row.max_relative_difference == 1.0


def test_outputs_that_are_no_pair_raise(benchmark, machine):
    pairs = benchmark("pairs")
    for ours, peer in (([torch.ones(2)], [torch.ones(3)]), ([torch.ones(2)], [torch.ones(2)] * 2), ([], [])):
        with pytest.raises(ValueError, match="no pair"):
            pairs.measure("row", make_pair(pairs, ours, peer), machine, pairs=1)


def test_both_sides_run_in_turns_the_first_one_changing(benchmark, machine):
    pairs = benchmark("pairs")
    ran = []

    def run(side):
        ran.append(side)
        return [torch.ones(1)]

    pair = replace(make_pair(pairs, None, None), ours=lambda: run("ours"), peer=lambda: run("peer"),
                   before=lambda: ran.append("before"), ours_flops=10**6, note="small")  # fmt: skip
    row = pairs.measure("row", pair, machine, pairs=2)
    assert ran == ["before", "ours", "before", "peer", "before", "peer", "before", "ours"]
    assert (row.pairs, row.limit_s, row.note) == (2, 1e-3, "small")
    assert row.of_limit == pytest.approx(1e-3 / row.ours_s)


def test_operations_are_counted_in_the_fused_kernels_too(benchmark):
    count = benchmark("arithmetic").count_flops
    from kolors_nodes.kolors.products import has_onednn, linear

    has_onednn()  # it tries a small product once
    rows, weight = torch.ones(2, 300, 64), torch.ones(128, 64)
    assert count(lambda: linear(rows, weight)) == 2 * 600 * 64 * 128
    query = torch.ones(1, 2, 16, 8)
    with torch.no_grad():
        counted = count(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert counted == 2 * (2 * 2 * 16 * 16 * 8)
    picture, kernel = torch.ones(1, 4, 8, 8), torch.ones(6, 4, 3, 3)
    assert count(lambda: torch.conv2d(picture, kernel, padding=1)) == 2 * 6 * 64 * 4 * 9
    ones = (1, 1)
    assert count(lambda: torch.mkldnn_convolution(picture, kernel, None, ones, ones, ones, 1)) == 2 * 6 * 64 * 4 * 9


def test_operations_of_many_steps_follow_from_two(benchmark):
    """A run that multiplies once, and then once in each step."""
    sampling = benchmark("sampling")
    matrix = torch.ones(10, 10)

    def run(steps, on_step):
        matrix @ matrix
        for _ in range(steps):
            matrix @ matrix
            on_step()

    assert [sampling.count_run_flops(run, steps) for steps in (1, 2, 20)] == [2000 * n for n in (2, 3, 21)]


def test_sampling_rows_compare_equal_work(benchmark, machine):
    """On a tiny UNet ours and diffusers' pipeline give the same latents, and with another seed they do not."""
    sampling, pairs, models = benchmark("sampling"), benchmark("pairs"), benchmark("trial_models")
    sizes = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1),
             "attention_head_dim": (1, 2, 4), "norm_num_groups": 8, "cross_attention_dim": 16, "encoder_hid_dim": 32,
             "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}  # fmt: skip
    unet = models.build_random_unet({**models.KOLORS_UNET_CONFIG, **sizes})
    pair = sampling.build_pair(unet, models.make_embeds(32, 5), side=64, steps=2)
    row = pairs.measure("tiny", pair, machine, pairs=1)
    assert row.ratio and row.max_relative_difference <= sampling.TOLERANCE
    assert row.peer_gflop > 0 and row.ours_gflop <= row.peer_gflop
    other = sampling.get_our_run(unet, models.make_embeds(32, 6), side=64)
    row = pairs.measure("tiny", replace(pair, ours=lambda: other(2, lambda: None)), machine, pairs=1)
    assert row.ratio is None and row.max_relative_difference > sampling.TOLERANCE


def test_names_choose_rows(benchmark):
    run = benchmark("run")
    cases = run.collect_cases(quick=True)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} >= {"sampling", "text", "decode", "training", "lora", "load", "start"}
    assert [case.name for case in run.choose_cases(cases, ["decode", "bundled"])] == [
        name for name in names if "decode" in name or "bundled" in name
    ]
    with pytest.raises(ValueError, match="No row has 'dcode' in its name. There are: "):
        run.choose_cases(cases, ["dcode"])


def test_a_graphics_card_adds_rows(benchmark, monkeypatch):
    cards = benchmark("graphics_card")
    assert bool(cards.get_cases(quick=False)) == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cases = cards.get_cases(quick=False)
    assert [(case.name, case.device) for case in cases] == [
        ("card 1024 eager", "cuda"),
        ("card 1024 compiled", "cuda"),
    ]
    assert [case.name for case in cards.get_cases(quick=True)] == ["card 1024 eager"]


def test_a_row_for_which_no_time_is_left_is_listed_without_figures(benchmark, machine):
    run, pairs = benchmark("run"), benchmark("pairs")
    case = pairs.Case(name="late", build=lambda: pytest.fail("it was built"))
    row = run.measure_case(case, {"cpu": machine}, quick=True, deadline=0.0)
    assert (row.name, row.ratio) == ("late", None) and "--only" in row.note


def test_json_is_a_list_of_rows():
    """The command as users run it."""
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--json", "--only", "sampling bundled"]
    rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert [row["name"] for row in rows] == ["sampling bundled 128"]
    assert rows[0].keys() >= PROMISED
    assert rows[0]["ratio"] > 0 and rows[0]["max_relative_difference"] <= 1e-4
