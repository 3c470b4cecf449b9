"""Damaged workflows and prompts: whatever they hold, a run ends in success, error or invalid, and soon.

``KOLORS_FUZZ_EXAMPLES`` sets how many are tried (default 100, of each).
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kolors_nodes.headless import Runner
from kolors_nodes.headless.messages import describe_result

HERE = Path(__file__).parent
EXAMPLES = int(os.environ.get("KOLORS_FUZZ_EXAMPLES", "100"))
SECONDS = 1.0
WORKFLOWS = [case["workflow"] for case in json.loads((HERE / "frontend.json").read_text(encoding="utf-8"))]
PROMPTS = [step["prompt"] for steps in json.loads((HERE / "host.json").read_text(encoding="utf-8")) for step in steps]
# No number between these: a latent of a million pixels is slow, and no fault of the runner.
NUMBERS = [-(2**70), -1, 0, 1, 2, 3, 7, 2**63, 10**40, -0.5, 1e308, float("nan"), float("inf")]
TEXTS = ["", "1", "2", "-10", "a", "Add", "Reroute", "PrimitiveNode", "workflow>G", "\0", "../x", "{a|b", "%date:yy%"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3),
    max_leaves=4,
)


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*path, key), *list_places(item, (*path, key))]]


@st.composite
def damaged(draw: st.DrawFn, originals: list[Any]) -> Any:
    """A workflow or prompt with up to five values replaced, removed, moved or doubled."""
    workflow = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 5))):
        places = list_places(workflow)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        holder = workflow
        for step in path:
            holder = holder[step]
        what = draw(st.integers(0, 4))
        if what <= 1:
            holder[key] = draw(VALUES)
        elif what == 2:
            del holder[key]
        elif what == 3:
            holder[key] = copy.deepcopy(_get(workflow, draw(st.sampled_from(places))))
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[draw(st.sampled_from(TEXTS))] = copy.deepcopy(holder[key])
    return workflow


def _get(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


@pytest.fixture(scope="module")
def run_damaged(stub_pack, tmp_path_factory):
    """Runs a graph as `kolors run` does, messages included."""
    import torch  # noqa: F401  loading it takes longer than any graph may

    folder = tmp_path_factory.mktemp("fuzz")
    runner = Runner(stub_pack.NODE_CLASS_MAPPINGS, output_dir=folder, input_dir=folder, models_dir=folder, device="cpu")

    def run(workflow: Any) -> None:
        stub_pack.CALLS.clear()
        start = time.process_time()
        result = runner.run(workflow)
        messages = describe_result(result, runner.nodes, runner.host)
        taken = time.process_time() - start
        assert result.status in ("success", "error", "invalid")
        assert result.status == "success" or all(messages) and messages
        assert "headless" not in str((result.error or {}).get("traceback", ["calling.py"])[-1:]) or is_own(result)
        assert taken < SECONDS, f"{taken:.1f} s"

    return run


def is_own(result: Any) -> bool:
    """Tells whether an error comes from where the runner itself raises or calls the nodes, and not from a slip."""
    last = result.error["traceback"][-1]
    return "raise " in last or "calling.py" in last or "self._schedule" in last


SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@SETTINGS
@given(workflow=damaged(WORKFLOWS))
def test_damaged_workflows(run_damaged, workflow):
    run_damaged(workflow)


@SETTINGS
@given(prompt=damaged(PROMPTS))
def test_damaged_prompts(run_damaged, prompt):
    run_damaged(prompt)
