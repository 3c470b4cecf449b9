"""What went wrong with a run, in a line or two per mistake: the node, the value, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .graph import Graph, NodeClasses, is_link
from .host import HeadlessHost, use_host
from .runner import RunResult
from .validation import LISTED_CHOICES

# Exceptions that speak of a slip in a node's code: their text alone says little.
CODE_ERRORS = frozenset(
    "ArithmeticError AssertionError AttributeError ImportError IndexError KeyError LookupError ModuleNotFoundError "
    "NameError RecursionError StopIteration TypeError UnboundLocalError ZeroDivisionError".split()
)


def describe_result(
    result: RunResult, nodes: NodeClasses, host: HeadlessHost, display_names: Mapping[str, str] | None = None
) -> list[str]:
    """Returns one text per mistake of a run, in the prompt's order; none for a run without any."""
    # A title that only repeats the class's display name says nothing: it is left out.
    titles = set((display_names or {}).values())
    prompt = {
        node_id: {**node, "_meta": {}} if _get_title(node) in titles else node
        for node_id, node in result.prompt.items()
    }
    graph = Graph(prompt, nodes)
    if result.status == "error":
        return [_describe_failure(graph, result.error or {})]
    with use_host(host):  # lists of files are asked for again
        findings = [
            _describe_error(graph, node_id, error, host)
            for node_id in result.prompt
            for error in result.node_errors.get(node_id, {}).get("errors", [])
        ]
        findings += [f"{label_node(graph, node_id)} did not run: {text}" for node_id, text in result.blocked.items()]
    if result.status == "invalid" and not findings:
        return [_describe_refusal(graph, result.error or {})]
    return list(dict.fromkeys(findings))


def _get_title(node: Mapping[str, Any]) -> str:
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return title if isinstance(title, str) else ""


def label_node(graph: Graph, node_id: str) -> str:
    """Returns how a node is named to the user: class, title where it has one of its own, id."""
    node = graph.prompt.get(node_id, {"class_type": "A node that another made"})
    class_type = str(node.get("class_type", "a node without class"))
    title = _get_title(node)
    defaults = {getattr(kind, "DISPLAY_NAME", "") for kind in graph.classes.values()}
    has_own = title not in defaults and title.replace(" ", "").lower() not in ("", class_type.lower())
    quoted = f' "{title}"' if has_own else ""
    return f"{class_type}{quoted} (node {node_id})"


def _describe_failure(graph: Graph, error: Mapping[str, Any]) -> str:
    label = label_node(graph, error["node_id"])
    kind = error["exception_type"].rsplit(".", 1)[-1]
    message = error["exception_message"]
    if kind == "Interrupted":
        return f"Interrupted at {label}."
    if kind in CODE_ERRORS or not message:
        message = f"{kind}: {message}" if message else kind
        return f"{label} failed with {message}\nThis looks like a fault in the node. --verbose shows where it happened."
    return f"{label}: {message}"


def _describe_refusal(graph: Graph, error: Mapping[str, Any]) -> str:
    if error["type"] == "invalid_prompt":
        for node_id, node in graph.prompt.items():
            if not isinstance(node.get("class_type", ""), str) or not isinstance(node.get("inputs", {}), Mapping):
                break
            if node.get("class_type") not in graph.classes:
                return _describe_unknown_class(graph, node_id)
    if error["type"] == "prompt_no_outputs":
        if error["details"]:
            return f"Nodes that were asked for are {error['details']}. It has the nodes {', '.join(graph.prompt)}."
        return (
            "The workflow has nothing to show: no node saves or previews anything, or those that do are muted or "
            "bypassed. Add a SaveImage or PreviewImage node."
        )
    return "\n".join(filter(None, (error["message"], error["details"])))


def _describe_unknown_class(graph: Graph, node_id: str) -> str:
    class_type = graph.prompt[node_id].get("class_type")
    if class_type is None:
        return f"Node {node_id} names no class (class_type). Export the workflow from ComfyUI again."
    near = difflib.get_close_matches(str(class_type), graph.classes, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"{label_node(graph, node_id)}: this runner knows no such node.{hint} Load the pack it comes from with "
        "--nodes FOLDER, or mute the node in ComfyUI."
    )


def _describe_error(graph: Graph, node_id: str, error: Mapping[str, Any], host: HeadlessHost) -> str:
    label = label_node(graph, node_id)
    info = error["extra_info"]
    name = info.get("input_name", "")
    value = graph.prompt[node_id].get("inputs", {}).get(name)
    spec = graph.get_input_spec(node_id, name) if name else None
    options = spec.options if spec else {}
    kind = _name_type(spec.type if spec else None)
    setting = f"--set {node_id}.{name}="
    match error["type"]:
        case "required_input_missing":
            if kind in ("a number", "a whole number", "text", "true or false", "a choice"):
                return f"{label}: {name} has no value. It takes {kind}: {setting}VALUE."
            return f"{label}: its input {name} is not connected. Connect {kind} to it."
        case "bad_linked_input":
            return f"{label}: {name} is the list {value!r}, but a link is [node id, output index]. Correct the file."
        case "return_type_mismatch":
            origin = label_node(graph, value[0])
            return (
                f"{label}: {name} takes {kind}, but output {value[1]} of {origin} is {info['received_type']}. "
                f"Connect {kind} to it."
            )
        case "invalid_input_type":
            return f"{label}: {name} is {value!r}, which is not {kind}. Correct it, for example {setting}VALUE."
        case "value_smaller_than_min":
            return f"{label}: {name} is {value}, less than its minimum {options['min']}.{_hint_range(options, setting)}"
        case "value_bigger_than_max":
            return f"{label}: {name} is {value}, more than its maximum {options['max']}.{_hint_range(options, setting)}"
        case "value_not_in_list":
            return _describe_choice(graph, node_id, name, value, host)
        case "custom_validation_failed":
            reason = error["details"].removeprefix(name).removeprefix(" - ")
            return f"{label}: {reason}" if reason else f"{label}: {name} is {value!r}, which the node refuses."
        case "dependency_cycle":
            return f"The links go round in a circle: {error['details']}. Remove one of them."
        case _:
            return _describe_exception(graph, node_id, label, error)


def _describe_choice(graph: Graph, node_id: str, name: str, value: Any, host: HeadlessHost) -> str:
    label = label_node(graph, node_id)
    spec = graph.get_input_spec(node_id, name)
    assert spec is not None
    choices = [str(choice) for choice in spec.type]
    files = getattr(graph.get_class(node_id), "MODEL_FILES", {}).get(name)
    listed = ", ".join(choices[:LISTED_CHOICES]) + (" …" if len(choices) > LISTED_CHOICES else "") or "nothing"
    if files:
        kind, command = files
        folder = host.get_folders(kind)[0]
        return (
            f"{label}: {name} is {value!r}, which is not in {folder} (there is: {listed}). "
            f'Fetch one that fits: {command} --models-dir "{host.models_dir}"'
        )
    near = difflib.get_close_matches(str(value), choices, n=1)
    choice = near[0] if near else (choices[0] if choices else "VALUE")
    return f"{label}: {name} is {value!r}, which is not one of: {listed}. For example --set {node_id}.{name}={choice}."


def _describe_exception(graph: Graph, node_id: str, label: str, error: Mapping[str, Any]) -> str:
    """A node that could not be checked: mostly a link that leads nowhere."""
    inputs = graph.prompt[node_id].get("inputs")
    if inputs is None:
        return f"{label}: it has no `inputs`. Export the workflow from ComfyUI again."
    for name, value in inputs.items():
        if not isinstance(value, list) or len(value) != 2:
            continue
        if not is_link(value) or value[0] not in graph.prompt:
            return (
                f"{label}: {name} is linked to node {value[0]!r}, which is not in the workflow. "
                "Connect it again in ComfyUI and save the workflow."
            )
        outputs = graph.get_class(value[0]).RETURN_TYPES
        if not -len(outputs) <= value[1] < len(outputs):
            return (
                f"{label}: {name} is linked to output {value[1]} of {label_node(graph, value[0])}, which has "
                f"{len(outputs)}, counted from 0. Connect it again in ComfyUI and save the workflow."
            )
    info = error["extra_info"]
    return f"{label}: checking it failed with {info.get('exception_type', 'an error')}: {error['details']}"


def _hint_range(options: Mapping[str, Any], setting: str) -> str:
    low, high = options.get("min"), options.get("max")
    if low is None or high is None:
        return f" For example {setting}{low if high is None else high}."
    return f" Take {low} to {high}, for example {setting}{options.get('default', high)}."


def _name_type(kind: Any) -> str:
    names = {"INT": "a whole number", "FLOAT": "a number", "STRING": "text", "BOOLEAN": "true or false"}
    if isinstance(kind, list) or kind == "COMBO":
        return "a choice"
    return names.get(kind, str(kind))
