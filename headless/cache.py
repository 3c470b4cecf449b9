"""What one run leaves for the next: results by what produced them, node objects by where they stand.

Source: ComfyUI 0.3.64's classic cache, and its caches within nodes that expand. Keys are compared together with
the types of constants, so that 1 and True are different inputs here, and NaN never equals anything, whichever
object it is.
"""

from __future__ import annotations

import logging
import math
import sys
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .calling import call_over_lists, get_call_inputs
from .expansion import is_blocker
from .graph import Graph, is_link

logger = logging.getLogger(__name__)

MOST_NUMBERS = 1_000_000  # numbers of nodes of past runs, after which the cache starts anew
# Where a result stands: the nodes that expanded into the node it is of, outermost first, each as (id, class).
Scope = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class CachedResult:
    """What a node left.

    Attributes:
        outputs: one list of values per output; None while the node has only shown something, and waits for the
            graph that it expanded into.
        ui: what the node showed, None if nothing.
    """

    outputs: list[list[Any]] | None
    ui: dict[str, list[Any]] | None


class Cache:
    """Results of the last run that the graph of the next one can reuse.

    Args:
        limit: None keeps the results of the last run only. A number of bytes keeps those of earlier runs too,
            while all of them together stay below it; the ones unused for longest go first.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._results: dict[tuple[Scope, Hashable], CachedResult] = {}
        self._objects: dict[tuple[Scope, str, str], Any] = {}
        self._keys: dict[str, tuple[Scope, Hashable]] = {}
        self._numbers: dict[Hashable, int] = {}

    def set_graph(self, graph: Graph) -> None:
        """Prepares for a run: keys of all its nodes, and everything forgotten that it does not name."""
        self.graph = graph
        if len(self._numbers) > MOST_NUMBERS:
            self._numbers, self._results = {}, {}
        self.signatures = Signatures(graph, self._numbers)
        self._keys = {}
        self._set_keys(graph.prompt, ())
        if self.limit is not None:
            self.trim()

    def add_nodes(self, parent: str, node_ids: Iterable[str]) -> None:
        """Makes room for the nodes that `parent` expanded into, and forgets what its last expansion left."""
        self._set_keys(node_ids, (*self._get_scope(parent), (parent, self.graph.get_class_type(parent))))

    def _set_keys(self, node_ids: Iterable[str], scope: Scope) -> None:
        places = {(node_id, self.graph.get_class_type(node_id)) for node_id in node_ids}
        keys = {node_id: (scope, self.signatures.get_key(node_id)) for node_id, _ in places}
        self._keys |= keys
        kept = set(keys.values())
        depth = len(scope)

        def is_kept(owner: Scope, is_own: bool) -> bool:
            if owner == scope:
                return is_own
            return owner[:depth] != scope or owner[depth] in places

        if self.limit is None:
            self._results = {key: value for key, value in self._results.items() if is_kept(key[0], key in kept)}
        self._objects = {key: node for key, node in self._objects.items() if is_kept(key[0], key[1:] in places)}

    def _get_scope(self, node_id: str) -> Scope:
        scope: list[tuple[str, str]] = []
        parent = self.graph.get_parent_node_id(node_id)
        while parent is not None:
            scope.insert(0, (parent, self.graph.get_class_type(parent)))
            parent = self.graph.get_parent_node_id(parent)
        return tuple(scope)

    def get(self, node_id: str) -> CachedResult | None:
        """Returns the result of a node of the current graph, or None when it has to run."""
        result = self._results.get(self._keys[node_id]) if node_id in self._keys else None
        if result is None or result.outputs is None:
            return None
        if self.limit is not None:  # the order of the dictionary is that of the last use
            self._results[self._keys[node_id]] = self._results.pop(self._keys[node_id])
        return result

    def get_ui(self, node_id: str) -> dict[str, list[Any]] | None:
        """Returns what a node of the current graph showed, if only in the part of it that has run."""
        result = self._results.get(self._keys[node_id]) if node_id in self._keys else None
        return result.ui if result else None

    def set_ui(self, node_id: str, ui: dict[str, list[Any]]) -> None:
        """Keeps what a node showed before it has outputs."""
        self._results[self._keys[node_id]] = CachedResult(outputs=None, ui=ui)

    def set_outputs(self, node_id: str, outputs: list[list[Any]]) -> CachedResult:
        """Keeps the outputs of a node beside what it showed. Returns both."""
        key = self._keys[node_id]
        result = replace(self._results.get(key, CachedResult(outputs=None, ui=None)), outputs=outputs)
        self._results[key] = result
        return result

    def get_object(self, node_id: str) -> Any:
        """Returns the node's instance; it lives as long as the node keeps its id and class."""
        place = (self._get_scope(node_id), node_id, self.graph.get_class_type(node_id))
        if place not in self._objects:
            self._objects[place] = self.graph.get_class(node_id)()
        return self._objects[place]

    def trim(self) -> None:
        """Drops the results unused for longest until the rest fits the memory limit, if there is one."""
        if self.limit is None:
            return
        sizes = {key: measure_bytes(result.outputs) for key, result in self._results.items()}
        total = sum(sizes.values())
        for key in list(self._results):
            if total <= self.limit:
                break
            total -= sizes[key]
            del self._results[key]


def measure_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Returns about how many bytes a node's outputs hold: tensors, arrays, texts, and containers of them."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    nbytes = getattr(value, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    if isinstance(value, Mapping):
        return sum(measure_bytes(item, seen) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return sum(measure_bytes(item, seen) for item in value)
    return sys.getsizeof(value)


class Signatures:
    """Keys that are equal for nodes that must give equal results: same classes, constants and wiring.

    Node ids are no part of a key, except for nodes that ask for their id or are declared not idempotent. Whether
    one node feeds two inputs or two equal nodes do is part of it, as in ComfyUI.

    Args:
        graph: the prompt and its classes.
        numbers: remembers, over several runs, a number for each node together with all that it depends on.
    """

    def __init__(self, graph: Graph, numbers: dict[Hashable, int]):
        self.graph = graph
        self._numbers = numbers
        self._changed: dict[str, Hashable] = {}
        self._number_of: dict[str, Hashable] = {}
        self._bit_of: dict[str, int] = {}
        self._links: dict[str, list[str]] = {}
        # Sets of nodes as bits: the ancestors of each node, the nodes of each number, and where those are several.
        self._ancestors: dict[str, int] = {}
        self._same: dict[Hashable, int] = {}
        self._twins: dict[Hashable, int] = {}

    def get_key(self, node_id: str) -> Hashable:
        """Returns the key of a node: its own signature and those of all it depends on."""
        self._number_all(node_id)
        number = self._number_of[node_id]
        ancestors = self._ancestors[node_id]
        if not any((ancestors & twins).bit_count() > 1 for twins in self._twins.values()):
            return number  # equal numbers mean equal wiring, when no two ancestors are equal
        return (number, self._describe_sharing(node_id))

    def _describe_sharing(self, node_id: str) -> bytes:
        """Returns, for each link met on a walk through the ancestors, where the walk first met its origin, else -1."""
        met: dict[str, int] = {}
        found = array("l")
        stack = [node_id]
        while stack:
            current = stack.pop()
            if current in met:
                found.append(met[current])
            else:
                met[current] = len(met)
                found.append(-1)
                stack += self._links[current]
        return found.tobytes()

    def _number_all(self, node_id: str) -> None:
        """Numbers a node and all it depends on, these first; a node on a circle gets a number of its own."""
        stack = [node_id]
        while stack:
            current = stack[-1]
            if current in self._bit_of and current in self._number_of:
                stack.pop()
                continue
            if current not in self._bit_of:
                self._bit_of[current] = len(self._bit_of)
                self._links[current] = self.graph.get_sorted_links(current)[::-1]
                stack += [link for link in self._links[current] if link not in self._bit_of]
                continue
            stack.pop()
            self._number(current)

    def _number(self, node_id: str) -> None:
        links = self._links[node_id]
        mask = 0
        for link in links:
            mask |= self._ancestors.get(link, 0) | 1 << self._bit_of[link]
        self._ancestors[node_id] = mask
        signature = self._get_signature(node_id) if all(link in self._number_of for link in links) else _Unequal()
        number = self._numbers.setdefault(signature, len(self._numbers))
        self._number_of[node_id] = number
        self._same[number] = self._same.get(number, 0) | 1 << self._bit_of[node_id]
        if self._same[number].bit_count() > 1:
            self._twins[number] = self._same[number]

    def _get_signature(self, node_id: str) -> Hashable:
        if not self.graph.has_node(node_id):
            return _Unequal()
        node_class = self.graph.get_class(node_id)
        try:
            hidden = self.graph.get_input_types(node_id).get("hidden") or {}
        except Exception as error:  # such a class fails the validation: nothing that runs depends on this node
            logger.debug("%s (node %s): INPUT_TYPES failed: %s", node_class.__name__, node_id, error)
            return _Unequal()
        is_bound_to_id = getattr(node_class, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in hidden.values()
        inputs = tuple(
            (name, ("link", self._number_of[value[0]], value[1]) if is_link(value) else to_hashable(value))
            for name, value in sorted(self.graph.get_node(node_id).get("inputs", {}).items())
        )
        own_id = node_id if is_bound_to_id else None
        return (self.graph.get_class_type(node_id), self._get_changed(node_id), own_id, inputs)

    def _get_changed(self, node_id: str) -> Hashable:
        """Returns what the class answers to ``IS_CHANGED``, asked once per run with constants only."""
        if node_id not in self._changed:
            node_class = self.graph.get_class(node_id)
            changed: Hashable = None
            if hasattr(node_class, "IS_CHANGED"):
                try:
                    inputs, _ = get_call_inputs(self.graph, node_id)
                    answers = call_over_lists(node_class, "IS_CHANGED", inputs)
                    changed = to_hashable([None if is_blocker(answer) else answer for answer in answers])
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
