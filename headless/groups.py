"""Legacy group nodes, read as if they were subgraphs.

Source: ComfyUI frontend 1.27, `groupNode.ts`: which sockets, outputs and widgets a group node has, and their order.
Different on purpose: an input that its class forces to be a socket is one here too; that frontend takes it for a
widget and loses its link.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .graph import NodeClasses
from .widgets import Widget, get_widgets

GROUP_PREFIXES = ("workflow>", "workflow/")


@dataclass
class GroupDefinition:
    """A group node's definition in the form of a subgraph's.

    Attributes:
        definition: nodes, links, inputs and outputs as a subgraph has them.
        widget_places: for each value of an instance's ``widgets_values``, the inner widgets that it sets:
            node id, widget name, and the value where an instance has none. None for a value that only the
            editor uses.
    """

    definition: dict[str, Any]
    widget_places: list[list[tuple[str, str, Any]]] = field(default_factory=list)


def read_group(data: Mapping[str, Any], classes: NodeClasses) -> GroupDefinition:
    """Reads an entry of ``extra.groupNodes``: ``nodes`` by index, ``links`` between them, ``external`` outputs."""
    reader = _Reader(data, classes)
    for index in range(len(reader.nodes)):
        reader.add_node(index)
    for index, names in reader.converted.items():
        for name in names:
            reader.add_socket(index, name, is_widget=True)
    reader.add_outputs()
    definition = {
        "nodes": reader.nodes, "links": reader.links, "inputs": reader.inputs, "outputs": reader.outputs
    }  # fmt: skip
    return GroupDefinition(definition, reader.widget_places)


class _Reader:
    def __init__(self, data: Mapping[str, Any], classes: NodeClasses):
        self.classes = classes
        self.config = data.get("config") if isinstance(data.get("config"), Mapping) else {}
        self.nodes = [copy.deepcopy(dict(node)) for node in data.get("nodes") or [] if isinstance(node, Mapping)]
        self.links: list[dict[str, Any]] = []
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []
        self.widget_places: list[list[tuple[str, str, Any]]] = []
        self.converted: dict[int, list[str]] = {}
        self.seen: dict[str, int] = {}
        self.external = {(entry[0], entry[1]) for entry in data.get("external") or []}
        for index, node in enumerate(self.nodes):
            node["id"] = index
            node["inputs"] = [slot for slot in node.get("inputs") or [] if isinstance(slot, dict)]
            for slot in node["inputs"]:
                slot["link"] = None
        for link in data.get("links") or []:
            self._link_inside(link)

    def _link_inside(self, link: Any) -> None:
        if not isinstance(link, list) or len(link) < 4 or link[0] is None:
            return  # a link from outside at the time when the group was made
        origin, output, target, index = link[:4]
        if not all(isinstance(part, int) for part in link[:4]) or not 0 <= origin < len(self.nodes):
            return
        if 0 <= target < len(self.nodes) and 0 <= index < len(self.nodes[target]["inputs"]):
            self._add_link(origin, output, target, self.nodes[target]["inputs"][index])

    def _add_link(self, origin: int, output: int, target: int, slot: dict[str, Any]) -> None:
        slot["link"] = len(self.links) + 1
        self.links.append({
            "id": slot["link"], "origin_id": origin, "origin_slot": output,
            "target_id": target, "target_slot": self.nodes[target]["inputs"].index(slot),
        })  # fmt: skip

    def add_node(self, index: int) -> None:
        """Adds what an inner node shows on the group: first its widgets, then its unconnected sockets."""
        node = self.nodes[index]
        if node.get("type") == "PrimitiveNode":
            return self._add_primitive(index)
        if node.get("type") == "Reroute":
            return self._add_reroute(index)
        node_class = self.classes.get(str(node.get("type")))
        if node_class is None:
            return None
        input_types = node_class.INPUT_TYPES()
        widgets = self._get_widgets(index)
        by_slot = [slot.get("name") for slot in node["inputs"] if slot.get("widget")]
        skipped = False
        for widget in widgets:
            if widget.is_input or not skipped:  # the control values of a converted widget went with it
                skipped = widget.name in by_slot
            if skipped:
                continue
            if widget.is_input:
                self._name_input(index, widget.name)
            if widget.is_saved:
                self.widget_places.append([(str(index), widget.name, widget.value)] if widget.is_input else [])
        self.converted[index] = by_slot
        declared = {**(input_types.get("required") or {}), **(input_types.get("optional") or {})}
        names = {widget.name for widget in widgets}
        for name in declared:
            if name not in names:
                self.add_socket(index, name)
        return None

    def add_socket(self, index: int, name: str, is_widget: bool = False) -> None:
        """Adds a socket of an inner node to the group, unless it is connected inside or hidden."""
        node = self.nodes[index]
        slot = next((slot for slot in node["inputs"] if slot.get("name") == name), None)
        if slot is None:
            slot = {"name": name, "type": "*", "link": None}
            node["inputs"].append(slot)
        if slot["link"] is not None:
            return
        shown = self._name_input(index, name)
        if self._get_config(index, "input", name).get("visible") is False:
            return
        if is_widget:
            defaults = {widget.name: widget.value for widget in self._get_widgets(index)}
            self.widget_places.append([(str(index), name, defaults.get(name))])
        self.inputs.append({"name": shown, "type": slot.get("type")})
        slot["link"] = len(self.links) + 1
        self.links.append({
            "id": slot["link"], "origin_id": -10, "origin_slot": len(self.inputs) - 1,
            "target_id": index, "target_slot": node["inputs"].index(slot),
        })  # fmt: skip

    def _add_primitive(self, index: int) -> None:
        targets = [link for link in self.links if link["origin_id"] == index]
        if not targets:
            return
        values = self.nodes[index].pop("widgets_values", None) or [None]
        places = [(str(link["target_id"]), self._get_slot(link)["name"], values[0]) for link in targets]
        self._name_input(index, "value")
        is_list = self._get_slot(targets[0]).get("type") == "COMBO"
        self.widget_places += [places, *([[]] * (2 if is_list else 1))]

    def _add_reroute(self, index: int) -> None:
        node = self.nodes[index]
        if not node["inputs"]:
            node["inputs"].append({"name": "", "type": "*", "link": None})
        if node["inputs"][0]["link"] is not None:
            return
        kinds = [self._get_slot(link).get("type") for link in self.links if link["origin_id"] == index]
        kind = str(next((kind for kind in kinds if kind not in (None, "*")), "*"))
        node["inputs"][0]["name"] = kind
        self.add_socket(index, kind)

    def _get_widgets(self, index: int) -> list[Widget]:
        class_type = str(self.nodes[index]["type"])
        return get_widgets(self.classes[class_type].INPUT_TYPES(), None, class_type)

    def _get_slot(self, link: Mapping[str, Any]) -> dict[str, Any]:
        return self.nodes[link["target_id"]]["inputs"][link["target_slot"]]

    def _get_config(self, index: int, kind: str, name: str) -> Mapping[str, Any]:
        entry = self.config.get(str(index))
        for key in (kind, name):
            entry = entry.get(key) if isinstance(entry, Mapping) else None
        return entry if isinstance(entry, Mapping) else {}

    def _name_input(self, index: int, name: str) -> str:
        """Returns the name of an inner input on the group: with the node's title in front where it is taken."""
        node = self.nodes[index]
        label = next((slot.get("label") for slot in node["inputs"] if slot.get("name") == name), None)
        shown = key = self._get_config(index, "input", name).get("name") or label or name
        if (node.get("type") == "PrimitiveNode" and node.get("title")) or shown in self.seen:
            prefix = f"{node.get('title') or node.get('type')} "
            shown = key = f"{prefix}{name}"
            if shown in self.seen:
                shown = f"{prefix}{self.seen[shown]} {name}"
        self.seen[key] = self.seen.get(key, 1) + 1
        return shown

    def add_outputs(self) -> None:
        """Adds the outputs that lead out of the group: those not connected inside, or outside as well."""
        for index, node in enumerate(self.nodes):
            node_class = self.classes.get(str(node.get("type")))
            types = list(getattr(node_class, "RETURN_TYPES", ())) if node.get("type") != "Reroute" else ["*"]
            inside = {link["origin_slot"] for link in self.links if link["origin_id"] == index}
            for output, kind in enumerate(types):
                is_shown = output not in inside or (index, output) in self.external
                if not self._get_config(index, "output", str(output)).get("visible", is_shown):
                    continue
                self.outputs.append({"name": str(kind), "type": kind})
                self.links.append({
                    "id": len(self.links) + 1, "origin_id": index, "origin_slot": output,
                    "target_id": -20, "target_slot": len(self.outputs) - 1,
                })  # fmt: skip
