"""Measures this pack beside its peers: one command, one table. `python benchmarks/run.py --quick`.

Every row runs ours and the peer's in turns, in one process, on the same weights and inputs, and compares what they
computed. How far ours is from what the machine can do at most stands in the last column.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by libraries when they are imported
warnings.filterwarnings("ignore")

from machine import Machine, measure_machine  # noqa: E402
from pairs import Case, Row, measure  # noqa: E402

# Modules of this folder with get_cases(quick=...) -> list[Case], in the order of the table.
# Training before the large models: the memory of its processes is told too high once this one is large.
THEMES = ("training", "graphics_card", "sampling", "text_encoding", "decoding", "loras", "loading", "starting")
QUICK_SECONDS = 85.0  # after these no further row is begun, and none repeated


def collect_cases(*, quick: bool) -> list[Case]:
    """Lists the cases of all themes."""
    return [case for theme in THEMES for case in importlib.import_module(theme).get_cases(quick=quick)]


def choose_cases(cases: list[Case], only: list[str]) -> list[Case]:
    """Takes the cases whose names hold one of these texts; all of them where there are none.

    Raises:
        ValueError: a text is in no name.
    """
    for text in only:
        if not any(text in case.name for case in cases):
            raise ValueError(f"No row has {text!r} in its name. There are: {', '.join(case.name for case in cases)}.")
    return [case for case in cases if not only or any(text in case.name for text in only)]


def measure_case(case: Case, machines: dict[str, Machine], *, quick: bool, deadline: float | None) -> Row:
    """Builds a case's models and measures it.

    Args:
        case: what.
        machines: the limits of each device so far. They are measured before every row, and the best counts: what else
            runs on a machine only lowers them.
        quick: measures the limits in a shorter time.
        deadline: of ``time.perf_counter``; after it nothing is measured.
    """
    if deadline is not None and time.perf_counter() > deadline:
        return Row(name=case.name, note="Left out, as the time was up: run it with --only.")
    machine = measure_machine(case.device, seconds=0.2 if quick else 1.0)
    machines[case.device] = machine.take_best(machines.get(case.device, machine))
    built = case.build()
    if isinstance(built, Row):
        return built
    return measure(case.name, built, machines[case.device], pairs=case.pairs, deadline=deadline)


def format_table(rows: list[Row]) -> str:
    """Lays the rows out as a Markdown table."""
    head = ("row", "ours s", "peer s", "peer / ours", "spread", "difference", "of the limit", "peer", "note")
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *map(format_row, rows)])


def format_row(row: Row) -> str:
    """Lays one row out."""
    memory = ""
    if row.ours_peak_mib is not None:
        memory = f"; memory beside the weights {row.ours_peak_mib:.0f} MiB, the peer's {row.peer_peak_mib:.0f} MiB"
    cells = (
        row.name,
        *(_format(value, ".3g") for value in (row.ours_s, row.peer_s)),
        *(_format(value, ".2f") for value in (row.ratio, row.spread)),
        _format(row.max_relative_difference, ".1e"),
        _format(row.of_limit, ".0%"),
        row.peer,
        row.note + memory,
    )
    return f"| {' | '.join(cells)} |"


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints. Exit status 1: the outputs of a row differ by more than its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats: two minutes on two cores")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows with NAME in their name")
    parser.add_argument("--pairs", type=int, metavar="N", help="how often both sides of a row run, in turns")
    parser.add_argument("--json", action="store_true", help="print a list of rows instead of the table")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    deadline = started + QUICK_SECONDS if chosen.quick else None
    try:
        cases = choose_cases(collect_cases(quick=chosen.quick), chosen.only)
    except ValueError as error:
        parser.error(str(error))
    machines: dict[str, Machine] = {}
    rows = []
    for case in sorted(cases, key=lambda case: case.is_long):
        case = replace(case, pairs=chosen.pairs or case.pairs)
        rows.append(measure_case(case, machines, quick=chosen.quick, deadline=deadline))
        print(f"{time.perf_counter() - started:.0f} s {format_row(rows[-1])}", file=sys.stderr)
        gc.collect()
    if chosen.json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print("\n".join(map(str, machines.values())), format_table(rows), sep="\n\n")
    return int(any(row.max_relative_difference is not None and row.ratio is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
