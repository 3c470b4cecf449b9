"""Conversion of a workflow into an API prompt, as ComfyUI's frontend does it.

Source: ComfyUI frontend 1.27 (`graphToPrompt`, `ExecutableNodeDTO`, the widget constructors). One thing
differs on purpose: where the frontend draws from global randomness, the same file always gives the same
prompt here.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from .graph import NodeClasses, Prompt
from .stand_ins import with_stand_ins
from .widgets import Widget, get_widgets, resolve_dynamic_prompt
from .workflow import WorkflowError, describe_non_workflow, is_api_prompt, is_ui_workflow

MODE_MUTED = 2
MODE_BYPASSED = 4
VIRTUAL_TYPES = frozenset({"Note", "MarkdownNote", "PrimitiveNode", "Reroute"})
# Nodes whose `filename_prefix` may name dates and other nodes' widgets.
SAVING_TYPES = frozenset(
    "SaveImage SaveSVGNode SaveVideo SaveAnimatedWEBP SaveWEBM SaveAudio SaveAudioMP3 SaveAudioOpus SaveGLB "
    "SaveAnimatedPNG CLIPSave VAESave ModelSave LoraSave SaveLatent".split()
)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def to_prompt(
    workflow: Mapping[str, Any], nodes: NodeClasses, *, now: datetime | None = None, seed: int = 0
) -> Prompt:
    """Converts a UI-format workflow into an API prompt.

    Args:
        workflow: the workflow; an API prompt is returned as a deep copy.
        nodes: the node classes by name. Stand-ins for the core nodes are added where a name is missing.
        now: local time for ``%date:…%`` in file names, default the current time.
        seed: seed of the choices in ``dynamicPrompts`` texts, which the frontend draws afresh each time.

    Returns:
        ``{node id: {"class_type", "inputs", "_meta"}}``, nodes in the order in which they depend on each
        other, muted, bypassed and virtual nodes resolved away.

    Raises:
        WorkflowError: the dictionary is no workflow, a link it uses is missing or circular, or it holds a
            subgraph or group node that would have to run.
    """
    if not is_ui_workflow(workflow):
        if not is_api_prompt(workflow):
            raise WorkflowError(f"The workflow is {describe_non_workflow(workflow)}")
        return {str(node_id): copy.deepcopy(dict(node)) for node_id, node in workflow.items()}
    editor = _Editor(workflow, with_stand_ins(nodes), now or datetime.now(), random.Random(seed))
    return editor.to_prompt()


@dataclass
class _Slot:
    """An input socket of a node in the editor."""

    name: str
    type: Any
    link: int | str | None = None


@dataclass
class _Node:
    """A node as the editor holds it after loading: definition and saved values merged."""

    id: str
    type: str
    title: str
    mode: int
    inputs: list[_Slot]
    output_types: list[Any]
    widgets: list[Widget]
    properties: Mapping[str, Any]
    saved: Mapping[str, Any] = field(repr=False)

    @property
    def is_virtual(self) -> bool:
        return self.type in VIRTUAL_TYPES

    @property
    def is_emitted(self) -> bool:
        return not self.is_virtual and self.mode not in (MODE_MUTED, MODE_BYPASSED)

    @property
    def label(self) -> str:
        return f"{self.type} (node {self.id})"

    def get_widget(self, name: str) -> Widget | None:
        return next((widget for widget in self.widgets if widget.name == name), None)


class _Editor:
    """The part of ComfyUI's graph editor that decides what a saved workflow means."""

    def __init__(self, workflow: Mapping[str, Any], classes: NodeClasses, now: datetime, rng: random.Random):
        self.now = now
        self.rng = rng
        self.links = _read_links(workflow)
        self.subgraphs = {
            str(subgraph.get("id")): str(subgraph.get("name", ""))
            for subgraph in (workflow.get("definitions") or {}).get("subgraphs") or []
        }
        self.nodes = {
            node.id: node for node in (self._load_node(saved, classes) for saved in workflow["nodes"])
        }

    def to_prompt(self) -> Prompt:
        self._apply_primitives()
        prompt = {node.id: self._emit(node) for node in self._sort_nodes() if node.is_emitted}
        for node in prompt.values():
            # A link to a muted node leaves the input without any value, not even the widget's.
            node["inputs"] = {
                name: value
                for name, value in node["inputs"].items()
                if not (isinstance(value, list) and value[0] not in prompt)
            }
        return prompt

    def _load_node(self, saved: Mapping[str, Any], classes: NodeClasses) -> _Node:
        if not isinstance(saved, Mapping) or "id" not in saved or not isinstance(saved.get("type"), str):
            raise WorkflowError(f"A node of the workflow has no `id` or no `type`: {str(saved)[:120]}.")
        node_type = saved["type"]
        node_class = classes.get(node_type)
        node = _Node(
            id=str(saved["id"]),
            type=node_type,
            title=saved.get("title") or getattr(node_class, "DISPLAY_NAME", node_type),
            mode=saved.get("mode", 0),
            inputs=[_Slot(s.get("name"), s.get("type"), s.get("link")) for s in saved.get("inputs") or []],
            output_types=[slot.get("type") for slot in saved.get("outputs") or []],
            widgets=[],
            properties=saved.get("properties") or {},
            saved=saved,
        )
        self._refuse_nested_graph(node)
        if node_class is not None and not node.is_virtual:
            _apply_definition(node, node_class)
        return node

    def _refuse_nested_graph(self, node: _Node) -> None:
        if node.mode in (MODE_MUTED, MODE_BYPASSED):
            return  # its inner nodes do not run
        name = None
        if node.type in self.subgraphs or UUID.fullmatch(node.type):
            name = f"the subgraph {self.subgraphs.get(node.type) or node.title!r}"
        elif node.type.startswith(("workflow>", "workflow/")):
            name = f"the group node {node.type[len('workflow>'):]!r}"
        if name:
            raise WorkflowError(
                f"Node {node.id} is {name}, which this runner cannot open yet. In ComfyUI, unpack it or use "
                "Export (API), and run that file."
            )

    def _apply_primitives(self) -> None:
        for primitive in self.nodes.values():
            values = primitive.saved.get("widgets_values")
            if primitive.type != "PrimitiveNode" or not isinstance(values, list) or not values:
                continue
            value = values[0]
            if value and primitive.properties.get("Run widget replace on values"):
                value = self._replace_text(str(value))
            for target in self.nodes.values():
                for slot in target.inputs:
                    link = self.links.get(slot.link)
                    widget = target.get_widget(slot.name)
                    if link and link[0] == primitive.id and widget:
                        widget.value = value

    def _sort_nodes(self) -> list[_Node]:
        """Dependencies first, otherwise in the file's order; nodes on a cycle come last."""
        targets: dict[str, list[str]] = {node_id: [] for node_id in self.nodes}
        waiting = dict.fromkeys(self.nodes, 0)
        for node in self.nodes.values():
            for slot in node.inputs:
                link = self.links.get(slot.link)
                if link and link[0] in targets:
                    targets[link[0]].append(node.id)
                    waiting[node.id] += 1
        ready = [node_id for node_id, count in waiting.items() if count == 0]
        for node_id in ready:  # grows while it is walked
            for target in targets[node_id]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    ready.append(target)
        on_cycle = [node_id for node_id, count in waiting.items() if count > 0]
        return [self.nodes[node_id] for node_id in ready + on_cycle]

    def _emit(self, node: _Node) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for widget in node.widgets:
            if not widget.is_input:
                continue
            value = self._serialize(node, widget)
            # A bare list would be read as a link.
            inputs[widget.name] = {"__value__": value} if isinstance(value, list) else value
        for index, slot in enumerate(node.inputs):
            source = self._resolve_input(node, index)
            if source:
                inputs[slot.name] = [source[0], source[1]]
        return {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title}}

    def _serialize(self, node: _Node, widget: Widget) -> Any:
        if widget.name == "filename_prefix" and node.type in SAVING_TYPES and isinstance(widget.value, str):
            return self._replace_text(widget.value)
        if widget.is_dynamic_prompt and isinstance(widget.value, str):
            return resolve_dynamic_prompt(widget.value, self.rng)
        return widget.value

    def _resolve_input(
        self, node: _Node, index: int, type_: Any = None, visited: tuple[tuple[str, int], ...] = ()
    ) -> tuple[str, int] | None:
        """Follows a link back to the output of a node that runs, through reroutes and bypassed nodes."""
        slot = node.inputs[index]
        if slot.link is None:
            return None
        if (node.id, index) in visited:
            path = " -> ".join(node_id for node_id, _ in visited)
            raise WorkflowError(
                f"{node.label}: the link of its input {slot.name!r} goes round in a circle ({path} -> {node.id}). "
                "Remove one of these links."
            )
        if slot.link not in self.links:
            raise WorkflowError(
                f"{node.label}: its input {slot.name!r} uses link {slot.link}, which is missing from the file's "
                "list of links. Connect it again in ComfyUI and save the workflow."
            )
        origin_id, origin_slot = self.links[slot.link]
        if origin_id not in self.nodes:
            raise WorkflowError(
                f"{node.label}: its input {slot.name!r} is linked to node {origin_id}, which is not in the file. "
                "Connect it again in ComfyUI and save the workflow."
            )
        origin = self.nodes[origin_id]
        visited = (*visited, (node.id, index))
        type_ = slot.type if type_ is None else type_
        if origin.mode == MODE_BYPASSED:
            match = _find_bypass_input(origin, origin_slot, type_)
            return None if match is None else self._resolve_input(origin, match, visited=visited)
        if origin.is_virtual:
            if origin_slot >= len(origin.inputs):
                return None
            return self._resolve_input(origin, origin_slot, type_, visited)
        return origin.id, origin_slot

    def _replace_text(self, text: str) -> str:
        """Replaces ``%date:FORMAT%`` and ``%Node.widget%``; anything else between percent signs stays."""
        return re.sub(r"%([^%]+)%", self._replace_match, text)

    def _replace_match(self, match: re.Match[str]) -> str:
        parts = match[1].split(".")
        if len(parts) != 2:
            return _format_date(parts[0][5:], self.now) if parts[0].startswith("date:") else match[0]
        named = [node for node in self.nodes.values() if _get_replacement_name(node) == parts[0]]
        named = named or [node for node in self.nodes.values() if node.title == parts[0]]
        widget = named[0].get_widget(parts[1]) if named else None
        if widget is None:
            return match[0]
        return re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", _to_javascript_text(widget.value))


def _read_links(workflow: Mapping[str, Any]) -> dict[Any, tuple[str, int]]:
    """Returns link id -> (origin node id, origin output index), from either format of links."""
    links = {}
    for link in workflow.get("links") or []:
        if isinstance(link, Mapping):
            links[link.get("id")] = (str(link.get("origin_id")), int(link.get("origin_slot") or 0))
        elif isinstance(link, list) and len(link) >= 5:
            links[link[0]] = (str(link[1]), int(link[2] or 0))
    return links


def _apply_definition(node: _Node, node_class: type) -> None:
    """Merges the class definition into a loaded node: sockets first, then the widgets' sockets, then extras."""
    try:
        input_types = node_class.INPUT_TYPES()
    except Exception as error:  # a pack may raise anything here, most likely about a folder it lists
        reason = f"{type(error).__name__}: {error}"
        raise WorkflowError(f"{node.label}: its class cannot tell its inputs ({reason}).") from error
    node.widgets = get_widgets(input_types, node.saved.get("widgets_values"))
    widget_names = [widget.name for widget in node.widgets if widget.is_input]
    declared = {**(input_types.get("required") or {}), **(input_types.get("optional") or {})}
    types = {name: "COMBO" if isinstance(spec[0], list) else spec[0] for name, spec in declared.items()}
    links = {slot.name: slot.link for slot in node.inputs}
    order = [name for name in declared if name not in widget_names] + widget_names
    extras = [slot for slot in node.inputs if slot.name not in types]
    node.inputs = [_Slot(name, types[name], links.get(name)) for name in order] + extras
    output_types = ["COMBO" if isinstance(kind, list) else kind for kind in node_class.RETURN_TYPES]
    node.output_types = output_types + node.output_types[len(output_types):]


def _find_bypass_input(node: _Node, output_index: int, type_: Any) -> int | None:
    """Returns the index of the input that a bypassed node passes on for an output wanted as `type_`."""
    if type_ in ("*", ""):
        return output_index if output_index < len(node.inputs) else (0 if node.inputs else None)
    output_type = node.output_types[output_index] if output_index < len(node.output_types) else "*"

    def fits(slot: _Slot) -> bool:
        return _is_compatible(slot.type, output_type) and _is_compatible(slot.type, type_)

    if output_index < len(node.inputs) and fits(node.inputs[output_index]):
        return output_index
    exact = [index for index, slot in enumerate(node.inputs) if slot.type == type_]
    matching = exact or [index for index, slot in enumerate(node.inputs) if fits(slot)]
    return matching[0] if matching else None


def _is_compatible(left: Any, right: Any) -> bool:
    """The editor's rule: a wildcard takes anything, otherwise comma lists must share a name, in any case."""
    if left in ("", "*", None, 0) or right in ("", "*", None, 0):
        return True
    return not set(str(left).lower().split(",")).isdisjoint(str(right).lower().split(","))


def _get_replacement_name(node: _Node) -> str | None:
    default = None if node.type in SAVING_TYPES else node.type
    return node.properties.get("Node name for S&R", default)


def _format_date(pattern: str, now: datetime) -> str:
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def replace(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith("y"):
            return {2: f"{now.year % 100:02}", 4: str(now.year)}.get(len(token), token)
        return str(parts[token[0]]).zfill(len(token))

    return re.sub(r"dd?|MM?|hh?|mm?|ss?|yyy?y?", replace, pattern)


def _to_javascript_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
