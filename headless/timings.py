"""When nodes were at work: a sum per node, and a trace that Chrome shows as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .execution import Timing


def sum_timings(timings: Iterable[Timing]) -> dict[str, dict[str, Any]]:
    """Returns ``{node id: {"class_type", "seconds"}}``, in the order in which the nodes began."""
    sums: dict[str, dict[str, Any]] = {}
    for timing in timings:
        entry = sums.setdefault(timing.node_id, {"class_type": timing.class_type, "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + timing.end - timing.start, 6)
    return sums


def write_trace(timings: Iterable[Timing], path: Path) -> None:
    """Writes a file in Chrome's trace format, for chrome://tracing or ui.perfetto.dev.

    Times are microseconds since the first node began. Raises OSError when the file cannot be written.
    """
    timings = list(timings)
    start = min((timing.start for timing in timings), default=0.0)
    events = [
        {
            "name": f"{timing.class_type} (node {timing.node_id})",
            "cat": timing.class_type,
            "ph": "X",
            "ts": round((timing.start - start) * 1e6, 1),
            "dur": round((timing.end - timing.start) * 1e6, 1),
            "pid": 1,
            "tid": 1,
            "args": {"node": timing.node_id},
        }
        for timing in timings
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
