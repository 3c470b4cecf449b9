"""Conversion, compared with what ComfyUI's frontend 1.27.10 made of the same workflows.

``frontend.json`` holds workflows over the stub pack, and the prompt that the real frontend, in a browser, made of
each (``app.loadGraphData``, then ``app.graphToPrompt``). Where this runner differs on purpose, ``here`` is its own
prompt and ``why`` says the reason. ``record_frontend.js`` renews the prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolors_nodes.headless import to_prompt

RECORDED = json.loads(Path(__file__).with_name("frontend.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", RECORDED, ids=[case["name"] for case in RECORDED])
def test_workflows_convert_as_the_frontend_does(stubs, case):
    # Equal as dictionaries: the order of the nodes, which a browser sorts by number, has no meaning.
    assert to_prompt(case["workflow"], stubs) == case.get("here", case["prompt"])


def test_every_difference_has_a_reason():
    for case in RECORDED:
        assert ("here" in case) == bool(case.get("why"))
        assert case.get("here") != case["prompt"]


def test_the_recording_covers_the_editor():
    assert len(RECORDED) >= 100
