"""Pairs: our way and a peer's to the same result, timed in turns, with the difference between their outputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from machine import Machine

Outputs = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ways to one result.

    Attributes:
        ours: runs our way once and gives what it computed.
        peer: likewise, tensors of the same shapes in the same order.
        peer_name: whose way it is.
        tolerance: largest relative difference of the outputs with which a ratio of times means something.
        ours_flops: floating-point operations of one run of ours, 0 where they are not what limits it.
        peer_flops: likewise.
        moved_bytes: least number of bytes that a run must read or write, all weights once per pass.
        least_seconds: that a run takes by another limit, such as the disk's.
        before: called before each run, outside the time.
        note: what a reader must know of this row.
    """

    ours: Callable[[], Outputs]
    peer: Callable[[], Outputs]
    peer_name: str
    tolerance: float
    ours_flops: int = 0
    peer_flops: int = 0
    moved_bytes: int = 0
    least_seconds: float = 0.0
    before: Callable[[], None] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: of the case.
        peer: whose way ours is compared with.
        ours_s: median seconds of ours.
        peer_s: median seconds of the peer.
        ratio: median over the pairs of the peer's seconds over ours; None where the outputs differ by more than
            the tolerance, or where nothing was measured.
        spread: the largest ratio of a pair minus the smallest.
        max_relative_difference: largest difference between the outputs, over the peer's largest value.
        tolerance: see ``Pair``.
        pairs: how many were run.
        ours_gflop: arithmetic of one run, in 10^9 operations.
        peer_gflop: likewise.
        limit_s: least seconds that this machine needs for our arithmetic, our bytes or the disk, whichever is most.
        of_limit: ``limit_s / ours_s``: 1 is as fast as the machine can.
        ours_peak_mib: most memory of the graphics card that a run of ours held beside what was there before it.
        peer_peak_mib: likewise.
        note: what a reader must know.
    """

    name: str
    peer: str = ""
    ours_s: float | None = None
    peer_s: float | None = None
    ratio: float | None = None
    spread: float | None = None
    max_relative_difference: float | None = None
    tolerance: float | None = None
    pairs: int = 0
    ours_gflop: float | None = None
    peer_gflop: float | None = None
    limit_s: float | None = None
    of_limit: float | None = None
    ours_peak_mib: float | None = None
    peer_peak_mib: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Gives the row as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row to measure.

    Attributes:
        name: of the row.
        build: makes the pair (models are built then), or measures on its own and gives the row.
        pairs: how many are run.
        device: whose limits it is held against.
        is_long: run after the short ones, for whose sake it is left out where the time is short.
    """

    name: str
    build: Callable[[], Pair | Row]
    pairs: int = 5
    device: str = "cpu"
    is_long: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: wall seconds, what it computed, and the memory that it took on the graphics card, if there is one."""

    seconds: float
    outputs: Outputs
    peak_mib: float | None


def time_run(run: Callable[[], Outputs], before: Callable[[], None] | None = None) -> Run:
    """Runs once. Work on a graphics card is waited for."""
    if before:
        before()
    has_card = torch.cuda.is_available()
    if has_card:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    outputs = run()
    if has_card:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if has_card else None
    return Run(seconds=seconds, outputs=outputs, peak_mib=peak)


def get_relative_difference(outputs: Outputs, expected: Outputs) -> float:
    """Gives the largest difference over the largest value, the worst of all tensors.

    Raises:
        ValueError: the numbers or shapes of the tensors differ: then nothing was compared.
    """
    shapes, expected_shapes = ([tuple(tensor.shape) for tensor in tensors] for tensors in (outputs, expected))
    if shapes != expected_shapes or not shapes:
        raise ValueError(f"The outputs are no pair: ours have the shapes {shapes}, the peer's {expected_shapes}.")
    return max(map(_get_difference, outputs, expected))


def _get_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    output, expected = output.detach().cpu().float(), expected.detach().cpu().float()
    difference = (output - expected).abs().max().item()
    if difference != difference:
        return float("inf")  # NaN: no number at all agrees with nothing
    return difference / max(expected.abs().max().item(), 1e-30)


def measure(name: str, pair: Pair, machine: Machine, *, pairs: int, deadline: float | None = None) -> Row:
    """Runs both sides in turns, the first one changing, and compares every pair's outputs.

    Args:
        name: of the row.
        pair: what is run; each side should have been run once before.
        machine: sets the limit.
        pairs: how many, at least 1.
        deadline: of ``time.perf_counter``; after it no further pair is begun.
    """
    runs: list[dict[str, Run]] = []
    difference = 0.0
    for index in range(pairs):
        if index and deadline is not None and time.perf_counter() > deadline:
            break
        sides = ("ours", "peer") if index % 2 == 0 else ("peer", "ours")
        results = {side: time_run(getattr(pair, side), pair.before) for side in sides}
        difference = max(difference, get_relative_difference(results["ours"].outputs, results["peer"].outputs))
        # The outputs are let go: a row's memory must not grow with its pairs.
        runs.append({side: replace(run, outputs=()) for side, run in results.items()})
    return make_row(name, pair, machine, runs, difference)


def make_row(name: str, pair: Pair, machine: Machine, runs: Sequence[dict[str, Run]], difference: float) -> Row:
    """Makes the row of measured pairs. There is no ratio where the outputs differ."""
    ratios = [run["peer"].seconds / run["ours"].seconds for run in runs]
    ours_s, peer_s = (statistics.median(run[side].seconds for run in runs) for side in ("ours", "peer"))
    ours_peak, peer_peak = (max(run[side].peak_mib or 0.0 for run in runs) or None for side in ("ours", "peer"))
    equal = difference <= pair.tolerance
    limit = max(machine.get_least_seconds(pair.ours_flops, pair.moved_bytes), pair.least_seconds)
    return Row(
        name=name,
        peer=pair.peer_name,
        ours_s=ours_s,
        peer_s=peer_s,
        ratio=statistics.median(ratios) if equal else None,
        spread=max(ratios) - min(ratios),
        max_relative_difference=difference,
        tolerance=pair.tolerance,
        pairs=len(runs),
        ours_gflop=pair.ours_flops / 1e9 or None,
        peer_gflop=pair.peer_flops / 1e9 or None,
        limit_s=limit or None,
        of_limit=limit / ours_s if limit else None,
        ours_peak_mib=ours_peak,
        peer_peak_mib=peer_peak,
        note=pair.note if equal else f"The outputs differ by more than {pair.tolerance:g}: no ratio. {pair.note}",
    )
