"""Validation, execution and caching, compared with a real ComfyUI on generated sequences of prompts.

``host.json`` holds sequences and what ComfyUI 0.3.64 did with them; it is compared everywhere. With ``COMFYUI_PATH``
(the folder of a ComfyUI 0.3.64) and ``COMFYUI_PYTHON`` (the Python it runs in, default: this one), fresh sequences run
in both; ``KOLORS_PARITY_SEED`` chooses others, and ``python test_host_parity.py`` rewrites the file.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kolors_nodes.headless import Runner

HERE = Path(__file__).parent
RECORDED = HERE / "host.json"
SEQUENCES, LENGTH = 90, 5
# What each generated class takes: a link to a number, text or list ("INT" …), or values to choose from.
MAKERS: dict[str, dict[str, Any]] = {
    "Number": {"value": [0, 3, 3, 7, "5", 2.7, 100]},
    "Add": {"a": "INT", "b": [1, 2, "INT"]},
    "Spread": {"count": [0, 1, 3]},
    "Gather": {"items": "INT", "sep": ["+", "-"]},
    "LazyChoice": {"first": [True, False], "a": "INT", "b": "INT"},
    "Greedy": {"a": [1, "INT"]},
    "Fail": {"value": "INT"},
    "Changing": {"value": [1, 2]},
    "Hidden": {"value": [1, "INT"]},
    "Counter": {"salt": [0, 1]},
    "Checked": {"value": [1, 5, 5, 13, 99], "other": [1, 5]},
    "AnyType": {"value": "INT"},
    "Async": {"value": [1, "INT"]},
    "Expand": {"value": "INT", "count": [0, 1, 2], "fault": ["none", "none", "node", "double id", "show"]},
    "ExpandAgain": {"value": "INT", "depth": [0, 1, 2]},
    "Block": {"value": "INT", "how": ["silent", "message", "all", "result"]},
    "BlockList": {"count": [1, 3], "whole": [True, False]},
    "AsyncWait": {"value": [1, "INT"], "milliseconds": [0, 1]},
    "AsyncLazy": {"a": "INT", "limit": [5, 8, 8, 8, 11]},
    "RawLink": {"value": "INT"},
    "AllChecked": {"value": [1, 50], "kind": ["x", "x", "y", "z", "w"], "more": [0.5, -1]},
    "OnlyTypes": {"value": "ANY"},
    "NotIdempotent": {"value": [1]},
    "ShowOnly": {"value": "INT"},
    "Show": {"value": "ANY"},
}
RARE = {"Fail": 0.3, "Greedy": 0.3, "Changing": 0.5, "Checked": 0.5, "AllChecked": 0.5}
OUTPUT_TYPES = {"Gather": ["STRING"], "Expand": ["INT", "STRING"], "Spread": ["INT", "INT"], "Block": ["INT", "INT"]}
FAULTS = [
    None, "text", -5, 10**6, 200, 101, [], ["1"], ["99", 0], ["1", 9], [1, 0], ["1", 0, 0], {"__value__": 4}, {"a": 1},
    "7", True,
]  # fmt: skip


def make_prompt(rng: random.Random) -> dict[str, Any]:
    """Returns a random prompt; its links lead to earlier nodes, so that it has no circles."""
    prompt: dict[str, Any] = {}
    for index in range(rng.randint(2, 9)):
        choices = [name for name in MAKERS if rng.random() < RARE.get(name, 1)]
        choices += ["Expand", "Block", "BlockList"]  # twice as often
        class_type = rng.choice(choices) if index else "Number"
        inputs = {name: choose(rng, prompt, kind) for name, kind in MAKERS[class_type].items()}
        prompt[str(index + 1)] = {"class_type": class_type, "inputs": inputs}
    for index in range(rng.randint(1, 2)):
        prompt[f"{90 + index}"] = {"class_type": "Show", "inputs": {"value": choose(rng, prompt, "ANY")}}
    return prompt


def choose(rng: random.Random, prompt: dict[str, Any], kind: Any) -> Any:
    if isinstance(kind, list):
        kind = rng.choice(kind)
    if kind not in ("INT", "ANY"):
        return kind
    outputs = [
        [node_id, index]
        for node_id, node in prompt.items()
        for index, given in enumerate(OUTPUT_TYPES.get(node["class_type"], ["INT"]))
        if kind in (given, "ANY") and node["class_type"] not in ("Show", "RawLink")
    ]
    return rng.choice(outputs[-4:])  # mostly what came last, so that much of the graph is needed


def change(rng: random.Random, prompt: dict[str, Any]) -> dict[str, Any]:
    """Returns the prompt as a user may send it next: the same, with another value, other ids, or a mistake."""
    prompt = copy.deepcopy(prompt)
    node = prompt[rng.choice(list(prompt))]
    what = rng.random()
    if what < 0.2:
        return prompt
    if what < 0.3:
        names = {node_id: str(int(node_id) + 200) for node_id in prompt}
        renamed = {names[node_id]: entry for node_id, entry in prompt.items()}
        for entry in renamed.values():
            for name, value in entry["inputs"].items():
                if isinstance(value, list) and len(value) == 2:
                    entry["inputs"][name] = [names.get(value[0], value[0]), value[1]]
        return renamed
    if what < 0.6:
        constants = [name for name, kind in MAKERS[node["class_type"]].items() if isinstance(kind, list)]
        for name in constants[:1]:
            values = [value for value in MAKERS[node["class_type"]][name] if value != "INT"]
            node["inputs"][name] = rng.choice(values)
        return prompt
    name = rng.choice(list(node["inputs"]) or ["value"])
    if what < 0.65:
        node["inputs"].pop(name, None)
    elif what < 0.97:
        node["inputs"][name] = rng.choice(FAULTS)
    else:
        node.pop(rng.choice(["class_type", "inputs"]))
    return prompt


def make_sequences(seed: int) -> list[list[dict[str, Any]]]:
    sequences = []
    for index in range(SEQUENCES):
        rng = random.Random(f"{seed} {index}")
        sound = make_prompt(rng)
        sequence = [sound]
        while len(sequence) < LENGTH:
            sequence.append(change(rng, sound))
            if all(set(node) == {"class_type", "inputs"} for node in sequence[-1].values()) and rng.random() < 0.5:
                sound = sequence[-1] if all(node["class_type"] in MAKERS for node in sequence[-1].values()) else sound
        sequences.append(sequence)
    return sequences


def describe(runner: Runner, prompt: dict[str, Any]) -> dict[str, Any]:
    """Runs a prompt and tells what happened, as `host_side.run_prompt` does."""
    result = runner.run(prompt)
    record: dict[str, Any] = {
        "status": result.status,
        "node_errors": {
            node_id: sorted([one["type"], one["extra_info"].get("input_name", "")] for one in entry["errors"])
            for node_id, entry in result.node_errors.items()
        },
    }
    if result.status == "invalid":
        return record | {"error": result.error["type"]}
    failed = result.error
    return record | {
        "error": [failed["node_id"], failed["exception_type"].split(".")[-1]] if failed else None,
        "executed": sorted(result.executed),
        "cached": sorted(result.cached),
        "outputs": result.outputs,
        "blocked": sorted(result.blocked),
        "inputs": {node_id: node.get("inputs") for node_id, node in result.prompt.items()},
    }


def normalize(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record as JSON gives it back, without what ComfyUI notes in the prompt for itself."""
    record = json.loads(json.dumps(record, default=str))
    for ui in (record.get("outputs") or {}).values():
        for entry in ui.get("seen", []):
            for node in entry["prompt"].values():
                node.pop("is_changed", None)
    return record


def run_here(classes: dict[str, type], sequences: list[Any], folder: Path) -> list[list[dict[str, Any]]]:
    runners = [Runner(classes, output_dir=folder / str(index)) for index in range(len(sequences))]
    return [
        [normalize(describe(runner, prompt)) for prompt in prompts]
        for runner, prompts in zip(runners, sequences, strict=True)
    ]


def run_in_comfyui(sequences: list[Any]) -> list[list[dict[str, Any]]]:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, str(HERE / "host_side.py"), os.environ["COMFYUI_PATH"]]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, input=json.dumps(sequences), capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [[normalize(record) for record in records] for records in json.loads(done.stdout)]


def unify_blame(record: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with one name for a fault of an output node that feeds others too.

    ComfyUI checks its outputs in the order of a set, so that chance decides whether such a node is found at fault
    as an output or as an inner node.
    """
    outputs = {"Show", "ShowOnly", "Hidden", "Checked", "AllChecked", "RawLink"}
    record = copy.deepcopy(record)
    for node_id, errors in record.get("node_errors", {}).items():
        for error in errors:
            if prompt[node_id].get("class_type") in outputs and error[0] == "exception_during_inner_validation":
                error[:] = ["exception_during_validation", ""]
    return record


def find_differences(sequences: list[Any], theirs: list[Any], ours: list[Any]) -> list[str]:
    differences = []
    for index, (prompts, expected, found) in enumerate(zip(sequences, theirs, ours, strict=True)):
        for step, (prompt, theirs_, ours_) in enumerate(zip(prompts, expected, found, strict=True)):
            if theirs_["status"] in ("crash", "hang"):  # ComfyUI's worker is lost, with its cache; here it is told
                assert ours_["status"] in ("success", "error", "invalid")
                break
            theirs_, ours_ = unify_blame(theirs_, prompt), unify_blame(ours_, prompt)
            # An exception ends the check of a node's inputs, which ComfyUI takes in the order of a set: whether
            # other nodes had their values cast before, which is a part of what is cached, is chance.
            types = [kind for errors in theirs_["node_errors"].values() for kind, _ in errors]
            is_cut_short = any(kind.startswith("exception_during") for kind in types)
            left_out = ("inputs", "cached", "executed") if is_cut_short else ()
            keys = [key for key in theirs_ if key not in left_out and theirs_[key] != ours_.get(key)]
            if keys:
                shown = "; ".join(f"{key}: ComfyUI {theirs_[key]}, here {ours_.get(key)}" for key in keys)
                differences.append(f"sequence {index}, prompt {step}: {shown}\n{json.dumps(prompt)}")
            if keys or is_cut_short:
                break  # what follows in the sequence starts from another cache
    return differences


def test_recorded_prompts_run_as_in_comfyui(stubs, tmp_path):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    sequences = [[step["prompt"] for step in sequence] for sequence in recorded]
    theirs = [[step["result"] for step in sequence] for sequence in recorded]
    assert sum(map(len, sequences)) >= 200
    differences = find_differences(sequences, theirs, run_here(stubs, sequences, tmp_path))
    assert not differences, "\n".join(differences)


def test_the_recording_covers_what_may_happen():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    results = [step["result"] for sequence in recorded for step in sequence]
    assert {result["status"] for result in results} >= {"success", "error", "invalid"}
    types = {kind for result in results for errors in result["node_errors"].values() for kind, _ in errors}
    assert types >= {
        "required_input_missing", "bad_linked_input", "return_type_mismatch", "exception_during_validation",
        "invalid_input_type", "value_smaller_than_min", "value_bigger_than_max", "value_not_in_list",
        "custom_validation_failed", "exception_during_inner_validation",
    }  # fmt: skip
    assert any(result.get("cached") for result in results)
    assert any(result.get("blocked") for result in results)
    assert any("." in node_id for result in results for node_id in result.get("executed", []))  # expanded


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to the folder of a ComfyUI 0.3.64")
def test_fresh_prompts_run_as_in_comfyui(stubs, tmp_path):
    sequences = make_sequences(int(os.environ.get("KOLORS_PARITY_SEED", "2")))
    differences = find_differences(sequences, run_in_comfyui(sequences), run_here(stubs, sequences, tmp_path))
    assert not differences, "\n".join(differences)


if __name__ == "__main__":
    prompts = make_sequences(1)
    lines = [
        json.dumps([{"prompt": prompt, "result": result} for prompt, result in zip(*pair, strict=True)])
        for pair in zip(prompts, run_in_comfyui(prompts), strict=True)
    ]
    RECORDED.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
