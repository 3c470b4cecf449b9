"""A workflow as the graph editor holds it after loading: nodes with sockets and widgets, and graphs within nodes.

Source: ComfyUI frontend 1.27 (`LGraph.configure`, `SubgraphNode`, `litegraphService`, `migrateWidgetsValues`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .graph import NodeClasses, UnsupportedNodeError, check_class
from .groups import GROUP_PREFIXES, GroupDefinition, read_group
from .widgets import Widget, get_widgets
from .workflow import WorkflowError

MODE_MUTED = 2
MODE_BYPASSED = 4
VIRTUAL_TYPES = frozenset({"Note", "MarkdownNote", "PrimitiveNode", "Reroute"})
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
# The ids of the two ends of a subgraph, as its links name them.
INPUT_END, OUTPUT_END = "-10", "-20"


@dataclass
class Slot:
    """An input socket of a node in the editor.

    Attributes:
        name: the input's name.
        type: its type, or a comma list of types.
        link: the id of its link, None while unconnected.
        promoted: for an input of a subgraph's instance, the widget that it shows there.
    """

    name: str
    type: Any
    link: int | str | None = None
    promoted: Widget | None = None


@dataclass
class Node:
    """A node as the editor holds it: definition and saved values merged.

    Attributes:
        id: the id in the prompt, which leads through the instances of subgraphs: ``outer:inner``.
        local_id: the id in its own graph.
        graph: the graph that holds it.
        inner: the graph within it, for an instance of a subgraph or a group node.
    """

    id: str
    local_id: str
    type: str
    title: str
    mode: int
    inputs: list[Slot]
    output_types: list[Any]
    widgets: list[Widget]
    properties: Mapping[str, Any]
    saved: Mapping[str, Any] = field(repr=False)
    graph: Canvas = field(repr=False)
    inner: Canvas | None = field(default=None, repr=False)

    @property
    def is_virtual(self) -> bool:
        return self.type in VIRTUAL_TYPES

    @property
    def is_active(self) -> bool:
        return self.mode not in (MODE_MUTED, MODE_BYPASSED)

    @property
    def label(self) -> str:
        return f"{self.type} (node {self.id})"

    def get_widget(self, name: str) -> Widget | None:
        """Returns the widget of this name, or None."""
        return next((widget for widget in self.widgets if widget.name == name), None)


@dataclass(frozen=True)
class Library:
    """What a workflow's nodes are made of: classes, their display names, subgraphs and group nodes."""

    classes: NodeClasses
    display_names: Mapping[str, str]
    subgraphs: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, workflow: Mapping[str, Any], classes: NodeClasses, display_names: Mapping[str, str]) -> Library:
        """Collects the definitions of a workflow, those nested in other definitions too."""
        subgraphs: dict[str, Mapping[str, Any]] = {}
        holders: list[Any] = [workflow]
        for holder in holders:  # grows while it is walked
            definitions = holder.get("definitions")
            listed = definitions.get("subgraphs") if isinstance(definitions, Mapping) else None
            for subgraph in listed or []:
                if isinstance(subgraph, Mapping) and str(subgraph.get("id")) not in subgraphs:
                    subgraphs[str(subgraph.get("id"))] = subgraph
                    holders.append(subgraph)
        extra = workflow.get("extra")
        groups = extra.get("groupNodes") if isinstance(extra, Mapping) else None
        return cls(classes, display_names, subgraphs, groups if isinstance(groups, Mapping) else {})


class Canvas:
    """One graph of the editor: the workflow's own, or that within an instance of a subgraph or a group node.

    Args:
        saved: the workflow, or the definition of the subgraph.
        library: what the nodes are made of.
        owner: the instance that this graph is within, None for the workflow's own.
        path: ids of the definitions that lead here.

    Raises:
        WorkflowError: a node without id or type, a class that cannot tell its inputs, a definition that is
            missing or contains itself.
    """

    def __init__(
        self, saved: Mapping[str, Any], library: Library, owner: Node | None = None, path: tuple[str, ...] = ()
    ):
        self.library = library
        self.owner = owner
        self.path = path
        self.links = _read_links(saved)
        self.output_ends = _read_output_ends(saved)
        self.nodes: dict[str, Node] = {}
        for entry in saved.get("nodes") or []:
            node = self._load_node(entry)
            self.nodes[node.local_id] = node

    def iterate_nodes(self) -> Iterator[Node]:
        """Yields all nodes, those within instances right after their instance."""
        for node in self.nodes.values():
            yield node
            if node.inner:
                yield from node.inner.iterate_nodes()

    def _load_node(self, saved: Any) -> Node:
        if not isinstance(saved, Mapping) or "id" not in saved or not isinstance(saved.get("type"), str):
            raise WorkflowError(f"A node of the workflow has no `id` or no `type`: {str(saved)[:120]}.")
        node_type = saved["type"]
        local_id = str(saved["id"])
        node_class = self.library.classes.get(node_type)
        default_title = getattr(node_class, "DISPLAY_NAME", node_type)
        node = Node(
            id=f"{self.owner.id}:{local_id}" if self.owner else local_id,
            local_id=local_id,
            type=node_type,
            title=saved.get("title") or self.library.display_names.get(node_type, default_title),
            mode=saved.get("mode", 0),
            inputs=[Slot(str(s.get("name")), s.get("type"), s.get("link")) for s in _get_slots(saved, "inputs")],
            output_types=[slot.get("type") for slot in _get_slots(saved, "outputs")],
            widgets=[],
            properties=saved.get("properties") if isinstance(saved.get("properties"), Mapping) else {},
            saved=saved,
            graph=self,
        )
        if node_type in self.library.subgraphs:
            self._open_subgraph(node, self.library.subgraphs[node_type])
        elif UUID.fullmatch(node_type) and node.is_active:
            raise WorkflowError(
                f"Node {node.id} is the subgraph {node.title!r}, whose definition is not in the file "
                "(`definitions.subgraphs`). Save the workflow from ComfyUI again."
            )
        elif node_type.startswith(GROUP_PREFIXES) and node.is_active:
            self._open_group(node, node_type[len(GROUP_PREFIXES[0]) :])
        elif node_class is not None and not node.is_virtual:
            _apply_definition(node, node_class)
        return node

    def _open(self, node: Node, key: str, definition: Mapping[str, Any]) -> None:
        if key in self.path:
            raise WorkflowError(f"{node.label}: the subgraph {node.title!r} contains itself. Remove it from within.")
        node.inner = Canvas(definition, self.library, owner=node, path=(*self.path, key))
        ends = [slot for slot in definition.get("outputs") or [] if isinstance(slot, Mapping)]
        node.output_types = [slot.get("type") for slot in ends]
        links = {slot.name: slot.link for slot in node.inputs}
        declared = [slot for slot in definition.get("inputs") or [] if isinstance(slot, Mapping)]
        names = [str(slot.get("name")) for slot in declared]
        extras = [slot for slot in node.inputs if slot.name not in names]
        types = [slot.get("type") for slot in declared]
        node.inputs = [Slot(name, kind, links.get(name)) for name, kind in zip(names, types, strict=True)] + extras

    def _open_subgraph(self, node: Node, definition: Mapping[str, Any]) -> None:
        self._open(node, node.type, definition)
        if not node.saved.get("title"):
            node.title = str(definition.get("name") or node.type)
        assert node.inner is not None
        targets = node.inner.list_input_targets()
        for index, slot in enumerate(node.inputs):
            shown = next((widget for *_, widget in targets.get(index, []) if widget), None)
            if shown:
                slot.promoted = Widget(slot.name, shown.value)
        node.widgets = [slot.promoted for slot in node.inputs if slot.promoted]
        values = node.saved.get("widgets_values")
        for widget, value in zip(node.widgets, values if isinstance(values, list) else [], strict=False):
            widget.value = value

    def _open_group(self, node: Node, name: str) -> None:
        data = self.library.groups.get(name)
        if not isinstance(data, Mapping):
            raise WorkflowError(
                f"Node {node.id} is the group node {name!r}, whose definition is not in the file "
                "(`extra.groupNodes`). Save the workflow from ComfyUI again."
            )
        group: GroupDefinition = read_group(data, self.library.classes)
        self._open(node, f"group {name}", group.definition)
        assert node.inner is not None
        values = node.saved.get("widgets_values")
        values = values if isinstance(values, list) else []
        for index, place in enumerate(group.widget_places):
            for local_id, widget_name, default in place:
                widget = node.inner.nodes[local_id].get_widget(widget_name)
                if widget:
                    widget.value = values[index] if index < len(values) else default

    def list_input_targets(self) -> dict[int, list[tuple[Node, Slot, Widget | None]]]:
        """Returns, by index of this graph's own inputs, the sockets they lead to and the widgets behind those."""
        targets: dict[int, list[tuple[Node, Slot, Widget | None]]] = {}
        for link_id, (origin, index) in self.links.items():
            if origin != INPUT_END:
                continue
            for node in self.nodes.values():
                for slot in node.inputs:
                    if slot.link == link_id:
                        found = (node, slot, slot.promoted or node.get_widget(slot.name))
                        targets.setdefault(index, []).append(found)
        return targets


def _get_slots(saved: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    slots = saved.get(key)
    return [slot for slot in slots if isinstance(slot, Mapping)] if isinstance(slots, list) else []


def _read_links(saved: Mapping[str, Any]) -> dict[Any, tuple[str, int]]:
    """Returns link id -> (origin node id, origin output index), from either format of links."""
    links = {}
    for link in saved.get("links") or []:
        try:
            if isinstance(link, Mapping):
                links[link.get("id")] = (str(link.get("origin_id")), int(link.get("origin_slot") or 0))
            elif isinstance(link, list) and len(link) >= 5:
                links[link[0]] = (str(link[1]), int(link[2] or 0))
        except (TypeError, ValueError) as error:
            raise WorkflowError(
                f"The link {str(link)[:120]} has an id or an output index that is none. Save the workflow again."
            ) from error
    return links


def _read_output_ends(definition: Mapping[str, Any]) -> list[Any]:
    """Returns the id of the link that leads to each output of a subgraph, None for an unconnected one."""
    ends: list[Any] = [None] * len(definition.get("outputs") or [])
    for link in reversed(definition.get("links") or []):
        if isinstance(link, Mapping) and str(link.get("target_id")) == OUTPUT_END:
            index = link.get("target_slot") or 0
            if isinstance(index, int) and 0 <= index < len(ends):
                ends[index] = link.get("id")
    return ends


def _apply_definition(node: Node, node_class: type) -> None:
    """Merges the class definition into a loaded node: sockets first, then the widgets' sockets, then extras."""
    try:
        check_class(node.type, node_class)
        input_types = node_class.INPUT_TYPES()
        return_types = [*getattr(node_class, "RETURN_TYPES", ())]
    except UnsupportedNodeError as error:
        raise WorkflowError(f"Node {node.id}: {error}") from error
    except Exception as error:  # a pack may raise anything here, most likely about a folder it lists
        reason = f"{type(error).__name__}: {error}"
        raise WorkflowError(f"{node.label}: its class cannot tell its inputs ({reason}).") from error
    node.widgets = get_widgets(input_types, node.saved.get("widgets_values"), node.type)
    widget_names = [widget.name for widget in node.widgets if widget.has_socket]
    hidden_names = {widget.name for widget in node.widgets if not widget.has_socket}
    declared = {**(input_types.get("required") or {}), **(input_types.get("optional") or {})}
    types = {name: "COMBO" if isinstance(spec[0], list) else spec[0] for name, spec in declared.items()}
    links = {slot.name: slot.link for slot in node.inputs}
    order = [name for name in declared if name not in widget_names and name not in hidden_names] + widget_names
    extras = [slot for slot in node.inputs if slot.name not in order]
    node.inputs = [Slot(name, types[name], links.get(name)) for name in order] + extras
    output_types = ["COMBO" if isinstance(kind, list) else kind for kind in return_types]
    node.output_types = output_types + node.output_types[len(output_types) :]
