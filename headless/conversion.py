"""Conversion of a workflow into an API prompt, as ComfyUI's frontend does it.

Source: ComfyUI frontend 1.27 (`graphToPrompt`, `ExecutableNodeDTO`, the widget constructors). One thing
differs on purpose: where the frontend draws from global randomness, the same file always gives the same
prompt here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .canvas import INPUT_END, MODE_BYPASSED, MODE_MUTED, Canvas, Library, Node, Slot
from .graph import NodeClasses, Prompt
from .stand_ins import with_stand_ins
from .widgets import UNSET, Widget, resolve_dynamic_prompt
from .workflow import WorkflowError, check_workflow, describe_non_workflow, is_api_prompt, is_ui_workflow

if TYPE_CHECKING:
    import random

# Nodes whose `filename_prefix` may name dates and other nodes' widgets.
SAVING_TYPES = frozenset(
    "SaveImage SaveSVGNode SaveVideo SaveAnimatedWEBP SaveWEBM SaveAudio SaveAudioMP3 SaveAudioOpus SaveGLB "
    "SaveAnimatedPNG CLIPSave VAESave ModelSave LoraSave SaveLatent".split()
)


@dataclass(frozen=True)
class _Output:
    """Where a link begins: an output of a node that runs."""

    node_id: str
    index: int


@dataclass(frozen=True)
class _Constant:
    """Where a link begins: the widget that a subgraph shows on its instance."""

    value: Any


def to_prompt(
    workflow: Mapping[str, Any],
    nodes: NodeClasses,
    *,
    now: datetime | None = None,
    seed: int = 0,
    display_names: Mapping[str, str] | None = None,
) -> Prompt:
    """Converts a UI-format workflow into an API prompt.

    Args:
        workflow: the workflow; an API prompt is returned as a deep copy.
        nodes: the node classes by name. Stand-ins for the core nodes are added where a name is missing.
        now: local time for ``%date:…%`` in file names, default the current time.
        seed: seed of the choices in ``dynamicPrompts`` texts, which the frontend draws afresh each time.
        display_names: titles by class name, any ``NODE_DISPLAY_NAME_MAPPINGS``.

    Returns:
        ``{node id: {"class_type", "inputs", "_meta"}}``, nodes in the order in which they depend on each
        other, muted, bypassed and virtual nodes, subgraphs and group nodes resolved away.

    Raises:
        WorkflowError: the dictionary is no workflow, a link it uses is missing or circular, or the definition
            of a group node is missing.
    """
    if not is_ui_workflow(workflow):
        if not is_api_prompt(workflow):
            raise WorkflowError(f"The workflow is {describe_non_workflow(workflow)}")
        return {str(node_id): copy.deepcopy(dict(node)) for node_id, node in workflow.items()}
    check_workflow(workflow)
    import random  # here: it takes long to import

    library = Library.of(workflow, with_stand_ins(nodes), display_names or {})
    return _Converter(Canvas(workflow, library), now or datetime.now(), random.Random(seed)).to_prompt()


class _Converter:
    """What the graph editor does with its graph when the user queues it."""

    def __init__(self, canvas: Canvas, now: datetime, rng: random.Random):
        self.canvas = canvas
        self.now = now
        self.rng = rng

    def to_prompt(self) -> Prompt:
        self._push_values(self.canvas)
        prompt = {node.id: self._emit(node) for node in _iterate_sorted(self.canvas)}
        for node in prompt.values():
            # A link to a muted node leaves the input without any value, not even the widget's.
            node["inputs"] = {
                name: value
                for name, value in node["inputs"].items()
                if not (isinstance(value, list) and value[0] not in prompt)
            }
        return prompt

    def _push_values(self, canvas: Canvas) -> None:
        """Puts the values of primitives, and of widgets shown on instances, into the widgets that they stand for."""
        for primitive in canvas.nodes.values():
            values = primitive.saved.get("widgets_values")
            if primitive.type != "PrimitiveNode" or not isinstance(values, list) or not values:
                continue
            value = values[0]
            if value and primitive.properties.get("Run widget replace on values"):
                value = self._replace_text(str(value))
            for target in canvas.nodes.values():
                for slot in target.inputs:
                    link = canvas.links.get(slot.link)
                    widget = slot.promoted or target.get_widget(slot.name)
                    if link and link[0] == primitive.local_id and widget:
                        widget.value = value
        for instance in canvas.nodes.values():
            if instance.inner:
                for index, targets in instance.inner.list_input_targets().items():
                    shown = instance.inputs[index].promoted if index < len(instance.inputs) else None
                    for _, _, widget in targets:
                        if shown and widget:
                            widget.value = shown.value
                self._push_values(instance.inner)

    def _emit(self, node: Node) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for widget in node.widgets:
            if widget.is_input and widget.value is not UNSET:
                inputs[widget.name] = _wrap_list(self._serialize(node, widget))
        for index, slot in enumerate(node.inputs):
            source = self._resolve_input(node, index)
            if isinstance(source, _Constant):
                inputs[slot.name] = _wrap_list(source.value)
            elif source:
                inputs[slot.name] = [source.node_id, source.index]
        return {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title}}

    def _serialize(self, node: Node, widget: Widget) -> Any:
        if widget.name == "filename_prefix" and node.type in SAVING_TYPES and isinstance(widget.value, str):
            return self._replace_text(widget.value)
        if widget.is_dynamic_prompt and isinstance(widget.value, str):
            return resolve_dynamic_prompt(widget.value, self.rng)
        return widget.value

    def _resolve_input(
        self, node: Node, index: int, type_: Any = None, visited: tuple[str, ...] = ()
    ) -> _Output | _Constant | None:
        """Follows a link back to what feeds it, through reroutes, bypassed nodes and the borders of subgraphs."""
        slot = node.inputs[index]
        if slot.link is None:
            return None
        here = f"{node.id}.{slot.name}"
        if here in visited:
            raise WorkflowError(
                f"{node.label}: the link of its input {slot.name!r} goes round in a circle "
                f"({' -> '.join((*visited, here))}). Remove one of these links."
            )
        canvas = node.graph
        if slot.link not in canvas.links:
            raise WorkflowError(
                f"{node.label}: its input {slot.name!r} uses link {slot.link}, which is missing from the file's "
                "list of links. Connect it again in ComfyUI and save the workflow."
            )
        origin_id, origin_slot = canvas.links[slot.link]
        visited = (*visited, here)
        if origin_id == INPUT_END and canvas.owner:
            return self._resolve_border(canvas.owner, origin_slot, visited)
        if origin_id not in canvas.nodes:
            raise WorkflowError(
                f"{node.label}: its input {slot.name!r} is linked to node {origin_id}, which is not in the file. "
                "Connect it again in ComfyUI and save the workflow."
            )
        type_ = slot.type if type_ is None else type_
        return self._resolve_output(canvas.nodes[origin_id], origin_slot, type_, visited)

    def _resolve_border(self, instance: Node, index: int, visited: tuple[str, ...]) -> _Output | _Constant | None:
        """Follows a link out of a subgraph: to what is connected to its instance, else to the widget shown there."""
        if index >= len(instance.inputs):
            return None
        slot = instance.inputs[index]
        if slot.link is None:
            return _Constant(slot.promoted.value) if slot.promoted else None
        return self._resolve_input(instance, index, visited=visited)

    def _resolve_output(
        self, origin: Node, index: int, type_: Any, visited: tuple[str, ...]
    ) -> _Output | _Constant | None:
        if origin.mode == MODE_BYPASSED:
            match = _find_bypass_input(origin, index, type_)
            return None if match is None else self._resolve_input(origin, match, visited=visited)
        if origin.inner and origin.mode != MODE_MUTED:
            return self._resolve_inner(origin, index, type_, visited)
        if origin.is_virtual:
            if index >= len(origin.inputs):
                return None
            return self._resolve_input(origin, index, type_, visited)
        return _Output(origin.id, index)

    def _resolve_inner(
        self, instance: Node, index: int, type_: Any, visited: tuple[str, ...]
    ) -> _Output | _Constant | None:
        """Follows a link into a subgraph, from an output of its instance."""
        canvas = instance.inner
        assert canvas is not None
        if index >= len(canvas.output_ends) or canvas.output_ends[index] not in canvas.links:
            return None
        origin_id, origin_slot = canvas.links[canvas.output_ends[index]]
        here = f"{instance.id}[{index}]"
        if here in visited:
            raise WorkflowError(f"{instance.label}: the link of its output {index} goes round in a circle. Remove it.")
        if origin_id == INPUT_END:
            return self._resolve_border(instance, origin_slot, (*visited, here))
        origin = canvas.nodes.get(origin_id)
        return self._resolve_output(origin, origin_slot, type_, (*visited, here)) if origin else None

    def _replace_text(self, text: str) -> str:
        """Replaces ``%date:FORMAT%`` and ``%Node.widget%``; anything else between percent signs stays."""
        return re.sub(r"%([^%]+)%", self._replace_match, text)

    def _replace_match(self, match: re.Match[str]) -> str:
        parts = match[1].split(".")
        if len(parts) != 2:
            return _format_date(parts[0][5:], self.now) if parts[0].startswith("date:") else match[0]
        nodes = list(self.canvas.iterate_nodes())
        named = [node for node in nodes if _get_replacement_name(node) == parts[0]]
        named = named or [node for node in nodes if node.title == parts[0]]
        widget = named[0].get_widget(parts[1]) if named else None
        if widget is None:
            return match[0]
        return re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", _to_javascript_text(widget.value))


def _wrap_list(value: Any) -> Any:
    """A bare list would be read as a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _iterate_sorted(canvas: Canvas) -> Iterator[Node]:
    """Yields the nodes that run: dependencies first, otherwise in the file's order; nodes on a cycle come last."""
    targets: dict[str, list[str]] = {node_id: [] for node_id in canvas.nodes}
    waiting = dict.fromkeys(canvas.nodes, 0)
    for node in canvas.nodes.values():
        for slot in node.inputs:
            link = canvas.links.get(slot.link)
            if link and link[0] in targets:
                targets[link[0]].append(node.local_id)
                waiting[node.local_id] += 1
    ready = [node_id for node_id, count in waiting.items() if count == 0]
    for node_id in ready:  # grows while it is walked
        for target in targets[node_id]:
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    on_cycle = [node_id for node_id, count in waiting.items() if count > 0]
    for node_id in ready + on_cycle:
        node = canvas.nodes[node_id]
        if not node.is_active:
            continue
        if node.inner:
            yield from _iterate_sorted(node.inner)
        elif not node.is_virtual:
            yield node


def _find_bypass_input(node: Node, output_index: int, type_: Any) -> int | None:
    """Returns the index of the input that a bypassed node passes on for an output wanted as `type_`."""
    if type_ in ("*", ""):
        return output_index if output_index < len(node.inputs) else (0 if node.inputs else None)
    output_type = node.output_types[output_index] if output_index < len(node.output_types) else "*"

    def fits(slot: Slot) -> bool:
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


def _get_replacement_name(node: Node) -> str | None:
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
