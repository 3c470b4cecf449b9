"""What one run leaves for the next: results by what produced them, node objects by where they stand.

Source: ComfyUI 0.3.64's classic cache. Keys are compared together with the types of constants, so that 1 and
True are different inputs here, and NaN never equals anything, whichever object it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .calling import call_over_lists, get_call_inputs
from .graph import Graph, is_link

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CachedResult:
    """What a node left.

    Attributes:
        outputs: one list of values per output.
        ui: what the node showed, None if nothing.
    """

    outputs: list[list[Any]]
    ui: dict[str, list[Any]] | None


class Cache:
    """Results of the last run that the graph of the next one can reuse."""

    def __init__(self) -> None:
        self._results: dict[Hashable, CachedResult] = {}
        self._objects: dict[tuple[str, str], Any] = {}
        self._keys: dict[str, Hashable] = {}

    def set_graph(self, graph: Graph) -> None:
        """Prepares for a run: keys of all its nodes, and everything forgotten that it does not name."""
        signatures = Signatures(graph)
        self._keys = {node_id: signatures.get_key(node_id) for node_id in graph.prompt}
        kept = set(self._keys.values())
        self._results = {key: result for key, result in self._results.items() if key in kept}
        places = {(node_id, graph.get_class_type(node_id)) for node_id in graph.prompt}
        self._objects = {place: node for place, node in self._objects.items() if place in places}

    def get(self, node_id: str) -> CachedResult | None:
        """Returns the result of a node of the current graph, or None when it has to run."""
        return self._results.get(self._keys[node_id])

    def set(self, node_id: str, result: CachedResult) -> None:
        """Keeps the result of a node."""
        self._results[self._keys[node_id]] = result

    def get_object(self, graph: Graph, node_id: str) -> Any:
        """Returns the node's instance; it lives as long as the node keeps its id and class."""
        place = (node_id, graph.get_class_type(node_id))
        if place not in self._objects:
            self._objects[place] = graph.get_class(node_id)()
        return self._objects[place]


class Signatures:
    """Keys that are equal for nodes that must give equal results: same classes, constants and wiring.

    Node ids are no part of a key, except for nodes that ask for their id or are declared not idempotent.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self._changed: dict[str, Hashable] = {}

    def get_key(self, node_id: str) -> Hashable:
        """Returns the key of a node: its own signature and those of all it depends on."""
        ancestors = self.graph.get_ancestors(node_id)
        positions = {ancestor: index for index, ancestor in enumerate(ancestors)}
        return tuple(self._get_signature(member, positions) for member in [node_id, *ancestors])

    def _get_signature(self, node_id: str, positions: Mapping[str, int]) -> Hashable:
        if node_id not in self.graph.prompt:
            return _Unequal()
        node_class = self.graph.get_class(node_id)
        try:
            hidden = self.graph.get_input_types(node_id).get("hidden") or {}
        except Exception as error:  # such a class fails the validation: nothing that runs depends on this node
            logger.debug("%s (node %s): INPUT_TYPES failed: %s", node_class.__name__, node_id, error)
            return _Unequal()
        is_bound_to_id = getattr(node_class, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in hidden.values()
        inputs = self.graph.prompt[node_id].get("inputs", {})
        links_and_constants = tuple(
            (name, ("ancestor", positions[value[0]], value[1]) if is_link(value) else to_hashable(value))
            for name, value in sorted(inputs.items())
        )
        own_id = node_id if is_bound_to_id else None
        return (self.graph.get_class_type(node_id), self._get_changed(node_id), own_id, links_and_constants)

    def _get_changed(self, node_id: str) -> Hashable:
        """Returns what the class answers to ``IS_CHANGED``, asked once per run with constants only."""
        if node_id not in self._changed:
            node_class = self.graph.get_class(node_id)
            changed: Hashable = None
            if hasattr(node_class, "IS_CHANGED"):
                try:
                    inputs, _ = get_call_inputs(self.graph, node_id)
                    changed = to_hashable(call_over_lists(node_class, "IS_CHANGED", inputs))
                except Exception as error:  # as in ComfyUI: a node that cannot tell is taken as changed
                    logger.debug("%s (node %s): IS_CHANGED failed: %s", node_class.__name__, node_id, error)
                    changed = _Unequal()
            self._changed[node_id] = changed
        return self._changed[node_id]


class _Unequal:
    """Stands for a value that equals nothing, so that a key with it is never found again."""


def to_hashable(value: Any) -> Hashable:
    """Returns a hashable stand-in for a constant; equal stand-ins mean equal constants of equal types."""
    if isinstance(value, float) and math.isnan(value):
        return _Unequal()
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: repr(item[0]))
        return ("mapping", tuple((to_hashable(key), to_hashable(item)) for key, item in items))
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return ("sequence", tuple(to_hashable(item) for item in value))
    return _Unequal()
