"""Calling a node class: what its method is given, once per item of its input lists, and what it returns."""

from __future__ import annotations

import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .expansion import is_blocker
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


def split_calls(target: Any, inputs: ValueLists) -> list[dict[str, Any]]:
    """Returns the arguments of each call that value lists ask for.

    One per item of the longest list, a shorter list repeating its last item. A class with ``INPUT_IS_LIST`` is
    called once with the whole lists, a node without inputs once without arguments.
    """
    if getattr(target, "INPUT_IS_LIST", False):
        return [inputs]
    length = max((len(values) for values in inputs.values()), default=0)
    return [
        {name: values[min(index, len(values) - 1)] for name, values in inputs.items()} for index in range(length)
    ] or [{}]


def find_blocker(target: Any, arguments: Mapping[str, Any]) -> Any:
    """Returns the first execution blocker among the arguments of a call, or None."""
    for value in arguments.values():
        found = [value]
        if getattr(target, "INPUT_IS_LIST", False) and isinstance(value, (list, tuple)):
            found += value
        for item in found:
            if is_blocker(item):
                return item
    return None


def call_over_lists(target: Any, function: str, inputs: ValueLists) -> list[Any]:
    """Calls a method of a class once per item of its input lists, and waits for coroutines.

    Returns:
        What it returned each time; the blocker itself where an argument is one.
    """
    results = []
    for arguments in split_calls(target, inputs):
        blocker = find_blocker(target, arguments)
        result = blocker if blocker is not None else getattr(target, function)(**arguments)
        results.append(_await_result(result) if inspect.iscoroutine(result) else result)
    return results


async def call_node(
    node: Any,
    function: str,
    inputs: ValueLists,
    before_call: Callable[[int], None],
    on_blocked: Callable[[Any], Any] = lambda blocker: blocker,
) -> list[Any]:
    """Calls a method of a node once per item of its input lists, from within an event loop.

    Args:
        node: the node's instance.
        function: the name of its method.
        inputs: its value lists.
        before_call: called with the number of each call before it.
        on_blocked: called with the blocker of a call that is blocked; gives what stands for its result.

    Returns:
        What it returned each time, and a task for each coroutine that has not come to its end at once.
    """
    import asyncio  # here and below: it takes longer to import than the rest of the runner

    results = []
    for index, arguments in enumerate(split_calls(node, inputs)):
        before_call(index)
        blocker = find_blocker(node, arguments)
        if blocker is not None:
            results.append(on_blocked(blocker))
            continue
        result = getattr(node, function)(**arguments)
        if inspect.iscoroutine(result):
            task = asyncio.ensure_future(result)
            await asyncio.sleep(0)
            result = task.result() if task.done() else task
        results.append(result)
    return results


def is_pending(results: list[Any]) -> bool:
    """Tells whether a call among them has not come to its end."""
    import asyncio

    return any(isinstance(result, asyncio.Task) and not result.done() for result in results)


def get_results(results: list[Any]) -> list[Any]:
    """Returns what calls gave, all of which have come to their end. Raises what the first failed one raised."""
    import asyncio

    return [result.result() if isinstance(result, asyncio.Task) else result for result in results]


def _await_result(coroutine: Any) -> Any:
    """Runs a coroutine to its end, in a thread of its own: this one may run an event loop (a notebook does)."""
    import asyncio

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


@dataclass
class Returned:
    """What the calls of a node returned, merged.

    Attributes:
        outputs: one list of values per output; None where a call returned a graph to expand.
        ui: one list per ``ui`` entry.
        expansions: per call, the graph to expand (or None) and the returned tuple.
    """

    outputs: list[list[Any]] | None
    ui: dict[str, list[Any]]
    expansions: list[tuple[Mapping[str, Any] | None, Any]]


def merge_results(results: list[Any], node_class: type) -> Returned:
    """Merges what the calls of a node returned.

    Raises:
        TypeError: a call returned neither a tuple (or list) nor a dictionary nor a blocker, or a graph to expand
            without a tuple of links into it.
    """
    uis = []
    expansions: list[tuple[Mapping[str, Any] | None, Any]] = []
    for result in results:
        graph = None
        if isinstance(result, Mapping):
            if "ui" in result:
                uis.append(result["ui"])
            graph = result.get("expand")
            if "result" not in result and "expand" not in result:
                continue
            result = result.get("result")
        if is_blocker(result):
            result = (result,) * len(node_class.RETURN_TYPES)
        if not isinstance(result, (tuple, list)):
            raise TypeError(
                f"{node_class.__name__}.{node_class.FUNCTION} returned a {type(result).__name__}. "
                "A node must return a tuple with one value per output."
            )
        expansions.append((graph, result))
    outputs = None
    if all(graph is None for graph, _ in expansions):
        outputs = merge_tuples([values for _, values in expansions], node_class)
    ui = {key: [item for entry in uis for item in entry[key]] for key in uis[0]} if uis else {}
    return Returned(outputs, ui, expansions)


def merge_tuples(tuples: list[Any], node_class: type) -> list[list[Any]]:
    """Returns one list of values per output, of one returned tuple per call."""
    if not tuples:
        return []
    width = len(tuples[0])
    is_list = getattr(node_class, "OUTPUT_IS_LIST", [False] * width)
    outputs = []
    for index in range(min(width, len(is_list))):
        values: list[Any] = []
        for returned in tuples:
            if is_list[index] and not is_blocker(returned[index]):
                values.extend(returned[index])
            else:
                values.append(returned[index])
        outputs.append(values)
    return outputs
