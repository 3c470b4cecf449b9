"""Settings from the command line: ``NODE.INPUT=VALUE`` puts a constant into a prompt."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .graph import Graph, InputSpec
from .widgets import UNSET, get_widgets


class SettingError(ValueError):
    """A setting that names no node or input of the workflow, or more than one."""


def apply_settings(graph: Graph, settings: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Puts constants into the graph's prompt, in place.

    Args:
        graph: the prompt and its classes.
        settings: texts such as ``14.steps=20``. The node is an id, or a title or class that only one node has.
            A link in that place is replaced.

    Returns:
        ``{(node id, input): value}`` as set.

    Raises:
        SettingError: a text of another form, or a node or input that is unknown or not unique.
    """
    applied = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        node, dot, name = path.strip().rpartition(".")
        if not equals or not dot or not node or not name:
            raise SettingError(f"--set {setting}: expected NODE.INPUT=VALUE, for example --set 14.steps=20.")
        node_id = find_node(graph, node, f"--set {setting}")
        value = parse_value(text, _find_input(graph, node_id, name, f"--set {setting}"))
        graph.prompt[node_id].setdefault("inputs", {})[name] = value
        applied[node_id, name] = value
    return applied


def set_inputs(graph: Graph, values: Mapping[str, Any]) -> None:
    """Puts values into the graph's prompt, in place.

    Args:
        graph: the prompt and its classes.
        values: by ``NODE.INPUT`` or ``NODE__INPUT``, where NODE is an id, or a title or class that only one node
            has; or by ``INPUT``, where only one node has such an input.

    Raises:
        SettingError: a node or input that is unknown or not unique.
    """
    for key, value in values.items():
        node, _, name = key.rpartition("." if "." in key else "__")
        if node:
            node_id = find_node(graph, node, key)
        else:
            node_id = _find_node_with_input(graph, key)
        _find_input(graph, node_id, name, key)
        graph.prompt[node_id].setdefault("inputs", {})[name] = value


def _find_node_with_input(graph: Graph, name: str) -> str:
    found = [
        node_id for node_id, node in graph.prompt.items()
        if node.get("class_type") in graph.classes and graph.get_input_spec(node_id, name)
    ]  # fmt: skip
    if len(found) != 1:
        nodes = f"the nodes {', '.join(found)} have" if found else "no node has"
        raise SettingError(f"{name}: {nodes} an input of this name. Name the node too: NODE__{name}.")
    return found[0]


def find_node(graph: Graph, name: str, setting: str) -> str:
    """Returns the id of the node that a setting means: by id, then title, then class."""
    if name in graph.prompt:
        return name
    titles = {
        node_id: node["_meta"].get("title") if isinstance(node.get("_meta"), Mapping) else None
        for node_id, node in graph.prompt.items()
    }
    classes = {node_id: node.get("class_type") for node_id, node in graph.prompt.items()}
    for names in (titles, classes):
        found = [node_id for node_id, candidate in names.items() if candidate == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise SettingError(f"{setting}: {name} names the nodes {', '.join(found)}. Use one of these ids.")
    there = ", ".join(f"{node_id} ({class_type})" for node_id, class_type in classes.items())
    raise SettingError(f"{setting}: the workflow has no node {name}. It has: {there}.")


def _find_input(graph: Graph, node_id: str, name: str, setting: str) -> InputSpec:
    class_type = graph.prompt[node_id].get("class_type")
    if class_type not in graph.classes:
        raise SettingError(f"{setting}: node {node_id} is a {class_type}, which this runner does not know.")
    spec = graph.get_input_spec(node_id, name)
    if spec is not None and spec.category != "hidden":
        return spec
    input_types = graph.get_input_types(node_id)
    names = [*(input_types.get("required") or {}), *(input_types.get("optional") or {})]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise SettingError(f"{setting}: {class_type} has no input {name}.{hint} It has: {', '.join(names)}.")


def parse_value(text: str, spec: InputSpec) -> Any:
    """Reads a value as the input's type asks: text stays text, a choice is found in the list, the rest is JSON.

    A text that does not fit stays as it is; the validation of the prompt tells what is wrong with it.
    """
    if spec.type == "STRING":
        return text
    if isinstance(spec.type, list):
        return next((choice for choice in spec.type if str(choice) == text), text)
    if spec.type == "BOOLEAN" and text.strip().lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
        return text.strip().lower() in ("true", "yes", "on", "1")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def apply_to_workflow(
    workflow: Mapping[str, Any], applied: Mapping[tuple[str, str], Any], classes: Mapping[str, type]
) -> dict[str, Any]:
    """Returns a copy of a UI workflow whose widgets show the settings, for the metadata of saved pictures.

    An input that is linked keeps its link there; only the prompt says what it was set to.
    """
    workflow = copy.deepcopy(dict(workflow))
    for node in workflow["nodes"]:
        changes = {name: value for (node_id, name), value in applied.items() if node_id == str(node.get("id"))}
        if not changes or node.get("type") not in classes:
            continue
        widgets = get_widgets(classes[node["type"]].INPUT_TYPES(), node.get("widgets_values"), node["type"])
        for widget in widgets:
            widget.value = changes.get(widget.name, widget.value)
        if isinstance(node.get("widgets_values"), Mapping):
            node["widgets_values"] = {**node["widgets_values"], **changes}
        else:
            shown = [widget.value for widget in widgets if widget.is_saved]
            node["widgets_values"] = [None if value is UNSET else value for value in shown]
    return workflow
