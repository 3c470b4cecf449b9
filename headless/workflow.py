"""Workflow files: what ComfyUI saves, as JSON or inside a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkflowError(ValueError):
    """A file or dictionary that cannot be read as a ComfyUI workflow, or not be turned into a prompt."""


def load_workflow(path: str | Path) -> dict[str, Any]:
    """Reads a workflow from a JSON file, or from the metadata of a PNG that ComfyUI or this runner saved.

    Args:
        path: a ``.json`` file in UI or API format, or a ``.png`` with a ``workflow`` or ``prompt`` text chunk.
            As in ComfyUI, ``workflow`` is preferred.

    Returns:
        The dictionary as it was saved, in either format.

    Raises:
        WorkflowError: the file is missing or unreadable, is not JSON, or is a picture without a workflow.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        text = _read_png_workflow(path)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise WorkflowError(
                f"{path}: neither JSON text nor a PNG picture. Give a workflow saved by ComfyUI (.json), "
                "or a PNG that it saved."
            ) from error
    try:
        workflow = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkflowError(
            f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}). "
            "Save the workflow from ComfyUI again."
        ) from error
    if not is_ui_workflow(workflow) and not is_api_prompt(workflow):
        raise WorkflowError(f"{path}: {describe_non_workflow(workflow)}")
    return workflow


def _read_png_workflow(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text chunks may stand after the pixels
            chunks = dict(image.info)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise WorkflowError(f"{path}: a damaged PNG picture ({error}).") from error
    for key in ("workflow", "prompt"):
        if isinstance(chunks.get(key), str):
            return chunks[key]
    raise WorkflowError(
        f"{path}: this PNG carries no workflow. Only pictures saved with their metadata do; "
        "editors and chat programs strip it. Use the workflow's .json file instead."
    )


def is_ui_workflow(workflow: object) -> bool:
    """Tells whether a dictionary is a workflow in the UI format (0.4 or 1.0)."""
    return isinstance(workflow, Mapping) and isinstance(workflow.get("nodes"), list)


def is_api_prompt(workflow: object) -> bool:
    """Tells whether a dictionary is an API prompt: node ids, each with a dictionary that names a class."""
    return (
        isinstance(workflow, Mapping)
        and len(workflow) > 0
        and all(isinstance(node, Mapping) for node in workflow.values())
        and any("class_type" in node for node in workflow.values())
    )


def describe_non_workflow(workflow: object) -> str:
    """Says what was found in a workflow's place, and what was expected."""
    found = (
        f"an object with the keys {sorted(workflow)[:6]}"
        if isinstance(workflow, Mapping)
        else (f"a {type(workflow).__name__}")
    )
    return (
        f"JSON, but not a ComfyUI workflow: it is {found}. Expected an object with a list `nodes` (UI format), or "
        "one entry per node with `class_type` and `inputs` (API format)."
    )


def check_workflow(workflow: Mapping[str, Any]) -> None:
    """Checks the parts of a UI workflow that are read, those of its subgraphs and group nodes too.

    Raises:
        WorkflowError: one of them has another form than ComfyUI gives it.
    """
    _check_graph(workflow, "the workflow")
    definitions = _get_typed(workflow, "definitions", Mapping, "the workflow") or {}
    for subgraph in _get_typed(definitions, "subgraphs", list, "definitions") or []:
        _require(isinstance(subgraph, Mapping), "a subgraph", subgraph)
        place = f"the subgraph {subgraph.get('name')!r}"
        check_workflow(subgraph) if subgraph.get("definitions") else _check_graph(subgraph, place)
        for key in ("inputs", "outputs"):
            for slot in _get_typed(subgraph, key, list, place) or []:
                _require(isinstance(slot, Mapping), f"an entry of `{key}` in {place}", slot)
    extra = _get_typed(workflow, "extra", Mapping, "the workflow") or {}
    for name, group in (_get_typed(extra, "groupNodes", Mapping, "extra") or {}).items():
        place = f"the group node {name!r}"
        _require(isinstance(group, Mapping), place, group)
        _get_typed(group, "links", list, place)
        _get_typed(group, "config", Mapping, place)
        for node in _get_typed(group, "nodes", list, place) or []:
            _check_node(node, place)
        for entry in _get_typed(group, "external", list, place) or []:
            is_output = isinstance(entry, list) and len(entry) >= 2 and all(isinstance(part, int) for part in entry[:2])
            _require(is_output, f"an entry of `external` in {place}", entry)


def _check_graph(graph: Mapping[str, Any], place: str) -> None:
    for node in _get_typed(graph, "nodes", list, place) or []:
        if not isinstance(node, Mapping) or not _is_id(node.get("id")) or not isinstance(node.get("type"), str):
            raise WorkflowError(f"A node of {place} has no `id` or no `type`: {str(node)[:120]}.")
        _check_node(node, place)
    for link in _get_typed(graph, "links", list, place) or []:
        if isinstance(link, Mapping):
            parts = [link.get(key) for key in ("id", "origin_id", "origin_slot")]
        else:
            parts = link[:3] if isinstance(link, list) and len(link) >= 5 else [None]
        is_sound = _is_id(parts[0]) and _is_id(parts[1]) and (parts[2] is None or _is_index(parts[2]))
        _require(is_sound, f"a link of {place}", link)


def _check_node(node: Any, place: str) -> None:
    _require(isinstance(node, Mapping) and isinstance(node.get("type"), str), f"a node of {place}", node)
    name = f"the node {node.get('id', node['type'])} of {place}"
    _require(isinstance(node.get("title"), (str, type(None))), f"the title of {name}", node.get("title"))
    values = node.get("widgets_values")
    _require(values is None or isinstance(values, (list, Mapping)), f"`widgets_values` of {name}", values)
    for key in ("inputs", "outputs"):
        for slot in _get_typed(node, key, list, name) or []:
            _require(isinstance(slot, Mapping), f"an entry of `{key}` of {name}", slot)
            for part in ("name", "label"):
                text = slot.get(part)
                _require(text is None or isinstance(text, str), f"the {part} of an entry of `{key}` of {name}", text)
            link = slot.get("link")
            _require(link is None or _is_id(link), f"the link of an entry of `{key}` of {name}", link)


def _get_typed(holder: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    value = holder.get(key)
    _require(value is None or isinstance(value, kind), f"`{key}` of {place}", value)
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000


def _require(is_sound: bool, what: str, value: object) -> None:
    if not is_sound:
        raise WorkflowError(
            f"{what[0].upper()}{what[1:]} is {str(value)[:80]}, which is not the form that ComfyUI gives it. "
            "Save the workflow from ComfyUI again."
        )
