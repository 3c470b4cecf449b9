"""Calling a node class: what its method is given, once per item of its input lists, and what it returns."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from .graph import Graph, is_link

ValueLists = dict[str, Any]


def get_call_inputs(
    graph: Graph,
    node_id: str,
    *,
    get_outputs: Callable[[str], list[Any] | None] | None = None,
    extra_data: Mapping[str, Any] | None = None,
    with_prompt: bool = False,
) -> tuple[ValueLists, set[str]]:
    """Returns the value lists a node is called with, and the names of the inputs not available yet.

    Args:
        graph: the prompt and its classes.
        node_id: the node.
        get_outputs: the output lists of a node that has run, else None; without it every link is ``(None,)``.
        extra_data: source of the hidden ``EXTRA_PNGINFO``.
        with_prompt: fill the hidden ``PROMPT``, which is empty before execution.
    """
    inputs: ValueLists = {}
    missing: set[str] = set()
    for name, value in graph.get_inputs(node_id).items():
        spec = graph.get_input_spec(node_id, name)
        if is_link(value) and not (spec and spec.options.get("rawLink", False)):
            outputs = get_outputs(value[0]) if get_outputs else None
            if outputs is None or value[1] >= len(outputs):
                missing.add(name)
                inputs[name] = (None,)
            else:
                inputs[name] = outputs[int(value[1])]
        elif spec is not None:
            inputs[name] = [value]
    prompt = graph.prompt if with_prompt else {}
    hidden = {
        "PROMPT": prompt,
        "DYNPROMPT": graph if with_prompt else None,
        "EXTRA_PNGINFO": (extra_data or {}).get("extra_pnginfo"),
        "UNIQUE_ID": node_id,
        "AUTH_TOKEN_COMFY_ORG": (extra_data or {}).get("auth_token_comfy_org"),
        "API_KEY_COMFY_ORG": (extra_data or {}).get("api_key_comfy_org"),
    }
    for name, kind in (graph.get_input_types(node_id).get("hidden") or {}).items():
        if isinstance(kind, str) and kind in hidden:
            inputs[name] = [hidden[kind]]
    return inputs, missing


def call_over_lists(
    target: Any, function: str, inputs: ValueLists, before_call: Callable[[], None] | None = None
) -> list[Any]:
    """Calls ``target.function`` once per item of the longest list, and returns what it returned each time.

    A shorter list repeats its last item. A class with ``INPUT_IS_LIST`` is called once with the whole lists,
    a node without inputs once without arguments.
    """
    if getattr(target, "INPUT_IS_LIST", False):
        calls = [inputs]
    else:
        length = max((len(values) for values in inputs.values()), default=0)
        calls = [
            {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}
            for index in range(length)
        ] or [{}]
    results = []
    for arguments in calls:
        if before_call:
            before_call()
        result = getattr(target, function)(**arguments)
        results.append(_await_result(result) if inspect.iscoroutine(result) else result)
    return results


def _await_result(coroutine: Any) -> Any:
    """Runs a coroutine to its end, in a thread of its own: this one may run an event loop (a notebook does)."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, asyncio.run(coroutine)))
        except BaseException as error:  # carried over to the calling thread, whatever it is
            outcome.extend((False, error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]


def merge_results(results: list[Any], node_class: type) -> tuple[list[list[Any]], dict[str, list[Any]]]:
    """Merges what the calls of a node returned into one list per output, and one list per ``ui`` entry.

    Raises:
        TypeError: a call returned neither a tuple (or list) nor a dictionary.
        NotImplementedError: a call returned a graph to expand.
    """
    tuples, uis = [], []
    for result in results:
        if isinstance(result, Mapping):
            if "expand" in result:
                raise NotImplementedError(
                    "The node builds further nodes while it runs (`expand`), which this runner cannot do yet. "
                    "Run this graph in ComfyUI."
                )
            if "ui" in result:
                uis.append(result["ui"])
            if "result" not in result:
                continue
            result = result["result"]
        if not isinstance(result, (tuple, list)):
            raise TypeError(
                f"{node_class.__name__}.{node_class.FUNCTION} returned a {type(result).__name__}. "
                "A node must return a tuple with one value per output."
            )
        tuples.append(result)
    outputs = _merge_tuples(tuples, node_class) if tuples else []
    ui = {key: [item for entry in uis for item in entry[key]] for key in uis[0]} if uis else {}
    return outputs, ui


def _merge_tuples(tuples: list[Any], node_class: type) -> list[list[Any]]:
    width = len(tuples[0])
    is_list = getattr(node_class, "OUTPUT_IS_LIST", [False] * width)
    return [
        [item for values in tuples for item in values[index]] if is_list[index] else [v[index] for v in tuples]
        for index in range(min(width, len(is_list)))
    ]
