"""An API prompt together with the node classes it names: what every later stage asks about a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = dict[str, dict[str, Any]]
NodeClasses = Mapping[str, type]


def is_link(value: object) -> bool:
    """Tells whether an input value is a link, ``[node id, output index]``, and not a constant."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))
    )


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What a node class declares about one input.

    Attributes:
        type: a socket type such as ``"LATENT"``, or the list of choices of a combo.
        category: ``"required"``, ``"optional"`` or ``"hidden"``.
        options: the dictionary beside the type (``default``, ``min``, ``max``, ``lazy`` …).
    """

    type: Any
    category: str
    options: Mapping[str, Any]


class UnsupportedNodeError(TypeError):
    """A class that is no node of the kind this runner runs."""


def check_class(class_type: str, node_class: Any) -> None:
    """Raises UnsupportedNodeError for a class of ComfyUI's V3 API, or one that declares no inputs at all."""
    if hasattr(node_class, "define_schema") or hasattr(node_class, "GET_SCHEMA"):
        raise UnsupportedNodeError(
            f"{class_type} is written for ComfyUI's V3 API (define_schema), which this runner does not support. "
            "Run this graph in ComfyUI, or use a version of the pack with INPUT_TYPES."
        )
    if not hasattr(node_class, "INPUT_TYPES"):
        raise UnsupportedNodeError(f"{class_type} is no node class: it has no INPUT_TYPES.")


@dataclass(frozen=True)
class Graph:
    """An API prompt and the classes of its nodes, together with the nodes that others expanded into.

    ``INPUT_TYPES`` is asked once per class and graph: it may list a models folder, and every stage needs it.
    """

    prompt: Prompt
    classes: NodeClasses
    expanded: Prompt = field(default_factory=dict)
    _parents: dict[str, str] = field(default_factory=dict)
    _displays: dict[str, str] = field(default_factory=dict)
    _input_types: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add_nodes(self, parent: str, nodes: Prompt) -> None:
        """Adds the nodes that a node expanded into. Their ids must be new."""
        for node_id, node in nodes.items():
            self.expanded[node_id] = node
            self._parents[node_id] = parent
            self._displays[node_id] = node.get("override_display_id", parent)

    # The names below are those of ComfyUI's DynamicPrompt, which nodes get as the hidden input DYNPROMPT.

    def get_node(self, node_id: str) -> dict[str, Any]:
        """Returns the entry of a node. Raises KeyError for an unknown id."""
        return self.expanded[node_id] if node_id in self.expanded else self.prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        """Tells whether there is a node of this id."""
        return node_id in self.prompt or node_id in self.expanded

    def all_node_ids(self) -> set[str]:
        """Returns the ids of all nodes."""
        return {*self.prompt, *self.expanded}

    def get_original_prompt(self) -> Prompt:
        """Returns the prompt itself."""
        return self.prompt

    def get_parent_node_id(self, node_id: str) -> str | None:
        """Returns the node that expanded into this one, or None."""
        return self._parents.get(node_id)

    def get_real_node_id(self, node_id: str) -> str:
        """Returns the node of the prompt that this one stems from."""
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    def get_display_node_id(self, node_id: str) -> str:
        """Returns the node of the prompt at which this one's results are shown."""
        while node_id in self._displays:
            node_id = self._displays[node_id]
        return node_id

    def get_class(self, node_id: str) -> type:
        """Returns the class of a node. Raises KeyError for an unknown node or class."""
        return self.classes[self.get_node(node_id)["class_type"]]

    def get_class_type(self, node_id: str) -> str:
        """Returns the registered name of a node's class."""
        return self.get_node(node_id)["class_type"]

    def get_inputs(self, node_id: str) -> dict[str, Any]:
        """Returns the inputs of a node, constants and links, as the prompt holds them."""
        return self.get_node(node_id)["inputs"]

    def get_input_types(self, node_id: str) -> Mapping[str, Any]:
        """Returns what the node's class answers to ``INPUT_TYPES``."""
        class_type = self.get_class_type(node_id)
        if class_type not in self._input_types:
            self._input_types[class_type] = self.get_class(node_id).INPUT_TYPES()
        return self._input_types[class_type]

    def get_input_spec(self, node_id: str, name: str) -> InputSpec | None:
        """Returns the declaration of one input, or None when the class declares no such input."""
        input_types = self.get_input_types(node_id)
        for category in ("required", "optional", "hidden"):
            # `in` and not `.get`: packs declare open-ended inputs by a dict that answers yes to any name.
            if category in input_types and name in input_types[category]:
                spec = input_types[category][name]
                if category == "hidden":
                    return InputSpec(type=spec, category=category, options={})
                return InputSpec(type=spec[0], category=category, options=spec[1] if len(spec) > 1 else {})
        return None

    def get_links(self, node_id: str) -> Iterator[tuple[str, str, int]]:
        """Yields (input name, linked node id, output index) of every linked input, in the prompt's order."""
        for name, value in self.get_inputs(node_id).items():
            if is_link(value):
                yield name, value[0], value[1]

    def is_output(self, node_id: str) -> bool:
        """Tells whether a node is an output node: one that is run for its own sake."""
        return getattr(self.get_class(node_id), "OUTPUT_NODE", False) is True

    def get_ancestors(self, node_id: str) -> list[str]:
        """Returns all nodes that a node depends on, in an order that depends on input names only.

        Depth first along the inputs sorted by name, so that two graphs of the same shape list corresponding
        nodes at the same positions, whatever their ids. A node missing from the prompt is listed, and not
        followed.
        """
        found: dict[str, None] = {}
        stack = [iter(self.get_sorted_links(node_id))]
        while stack:
            ancestor = next(stack[-1], None)
            if ancestor is None:
                stack.pop()
            elif ancestor not in found:
                found[ancestor] = None
                stack.append(iter(self.get_sorted_links(ancestor)))
        return list(found)

    def get_sorted_links(self, node_id: str) -> list[str]:
        """Returns the nodes that a node is linked to, by the names of its inputs; none for a missing node."""
        if not self.has_node(node_id):
            return []
        inputs = self.get_node(node_id).get("inputs", {})
        return [inputs[name][0] for name in sorted(inputs) if is_link(inputs[name])]
