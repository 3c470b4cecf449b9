"""Runs prompts over the stub pack in a real ComfyUI 0.3.64, without its server, and tells what happened.

    PYTHONHASHSEED=0 python host_side.py COMFYUI_FOLDER < sequences.json > results.json

in the Python that ComfyUI runs in. The input is a list of sequences of prompts; each sequence has an executor, and so
a cache, of its own. The output has one record per prompt; `describe` in test_host_parity.py makes the same of ours.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

SECONDS = 4  # after which a prompt of a few numbers will not end


class Hang(BaseException):
    """A prompt that ComfyUI does not come to an end with. No Exception, which the executor would catch."""


def stop(*_: object) -> None:
    raise Hang


class Server:
    """What the executor tells its clients, of which only blocked nodes matter here."""

    client_id = None
    last_node_id = None

    def __init__(self) -> None:
        self.blocked: list[str] = []

    def send_sync(self, event: str, data: dict[str, Any], sid: object = None) -> None:
        if event == "execution_error" and data["exception_type"] == "ExecutionBlocked":
            self.blocked.append(data["node_id"])


def load_stub_nodes() -> dict[str, type]:
    spec = importlib.util.spec_from_file_location("stub_nodes", Path(__file__).with_name("stub_nodes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def run_sequence(execution: Any, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    server = Server()
    executor = execution.PromptExecutor(server)
    records: list[dict[str, Any]] = []
    for prompt in prompts:
        if records and records[-1]["status"] in ("crash", "hang"):
            records.append(dict(records[-1]))  # there is no going on after that
            continue
        signal.alarm(SECONDS)
        try:
            records.append(run_prompt(execution, executor, server, copy.deepcopy(prompt)))
        except Hang:
            records.append({"status": "hang"})
        finally:
            signal.alarm(0)
    return records


def run_prompt(execution: Any, executor: Any, server: Server, prompt: dict[str, Any]) -> dict[str, Any]:
    try:
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    except Exception as error:  # the server answers with a page about an internal error
        return {"status": "crash", "error": f"{type(error).__name__}: {error}"}
    record: dict[str, Any] = {
        "status": "invalid",
        "node_errors": {
            node_id: sorted([one["type"], one["extra_info"].get("input_name", "")] for one in entry["errors"])
            for node_id, entry in node_errors.items()
        },
    }
    if not valid:
        return record | {"error": error["type"]}
    executed: list[str] = []
    original = execution.execute

    async def execute(*args: Any) -> Any:
        answer = await original(*args)
        executed[:] = sorted(args[5])
        return answer

    execution.execute = execute
    server.blocked = []
    try:
        executor.execute(prompt, "prompt", {}, [node_id for node_id in prompt if node_id in outputs])
    except Exception as error:  # the server's worker ends with it
        return record | {"status": "crash", "error": f"{type(error).__name__}: {error}"}
    finally:
        execution.execute = original
    told = dict(executor.status_messages)
    failed = told.get("execution_error")
    return record | {
        "status": "error" if failed else "success",
        "error": [failed["node_id"], failed["exception_type"].split(".")[-1]] if failed else None,
        "executed": executed,
        "cached": sorted(told["execution_cached"]["nodes"]),
        "outputs": executor.history_result["outputs"],
        "blocked": sorted(set(server.blocked)),
        "inputs": {node_id: node["inputs"] for node_id, node in prompt.items()},
    }


def main() -> None:
    sequences = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # ComfyUI and the nodes print
    os.chdir(sys.argv[1])
    sys.path.insert(0, sys.argv[1])
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    execution, nodes = (importlib.import_module(name) for name in ("execution", "nodes"))

    signal.signal(signal.SIGALRM, stop)
    logging.disable(logging.CRITICAL)
    nodes.NODE_CLASS_MAPPINGS.update(load_stub_nodes())
    json.dump([run_sequence(execution, prompts) for prompts in sequences], out, default=str)
    out.close()


if __name__ == "__main__":
    main()
