"""In which order the nodes of a graph run.

Source: ComfyUI 0.3.64, `comfy_execution.graph.ExecutionList`.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable

from .graph import Graph, is_link

# How far from an output the search goes for the node that shows something soonest.
FARTHEST = 3


class DependencyCycleError(Exception):
    """The nodes that remain wait for each other."""


class NodeInputError(Exception):
    """A node asks for an input that nothing is linked to."""


class NodeNotFoundError(Exception):
    """A link leads to a node that is not there."""


class Schedule:
    """Which node runs next. A node waits for all it is linked to, lazy inputs only once it asks for them."""

    def __init__(self, graph: Graph, is_cached: Callable[[str], bool]):
        self.graph = graph
        self.is_cached = is_cached
        self.waits_for: dict[str, set[str]] = {}
        self.holds_up: dict[str, dict[str, None]] = {}
        self._place: dict[str, int] = {}
        self._ranks: dict[str, int] = {}
        self._ready: list[tuple[int, int, str]] | None = None

    def add(self, node_id: str) -> None:
        """Schedules a node and everything it needs that has no result yet.

        Raises:
            NodeNotFoundError: one of them is not in the graph.
        """
        nodes = [node_id]
        links = []
        while nodes:
            current = nodes.pop()
            if current in self.waits_for:
                continue
            if not self.graph.has_node(current):
                raise NodeNotFoundError(f"A link leads to the node {current}, which is not there.")
            self.waits_for[current] = set()
            self.holds_up[current] = {}
            self._place[current] = len(self._place)
            for name, origin, _ in self.graph.get_links(current):
                spec = self.graph.get_input_spec(current, name)
                is_lazy = spec is not None and spec.options.get("lazy", False)
                if not is_lazy and not self.is_cached(origin):
                    nodes.append(origin)
                    links.append((origin, current))
        for origin, current in links:
            self._link(origin, current)
        self._ready = None

    def require(self, node_id: str, name: str) -> None:
        """Makes a scheduled node wait for one of its lazy inputs.

        Raises:
            NodeInputError: the node has no such input, or it is a constant.
        """
        value = self.graph.get_inputs(node_id).get(name)
        if not is_link(value):
            found = "a constant" if name in self.graph.get_inputs(node_id) else "not there"
            raise NodeInputError(
                f"check_lazy_status asks for the input {name!r}, which is {found}. It may only ask for linked inputs."
            )
        self.wait_for(node_id, value[0])

    def wait_for(self, node_id: str, origin: str) -> None:
        """Makes a scheduled node wait for another, unless that has its result."""
        if not self.is_cached(origin):
            self.add(origin)
            self._link(origin, node_id)

    def _link(self, origin: str, node_id: str) -> None:
        self.waits_for[node_id].add(origin)
        self.holds_up[origin][node_id] = None
        self._ready = None

    def park(self, node_id: str) -> None:
        """Keeps a node from being picked until `unpark`: it waits for something outside of the graph."""
        self.waits_for[node_id].add(node_id)

    def unpark(self, node_id: str) -> None:
        """Lets a parked node be picked again."""
        self.waits_for[node_id].discard(node_id)
        self.put_back(node_id)

    def put_back(self, node_id: str) -> None:
        """Lets a node that was picked, and has not run to its end, be picked again when it waits for nothing."""
        self._offer(node_id)

    def is_parked(self) -> bool:
        """Tells whether any node is parked."""
        return any(node_id in origins for node_id, origins in self.waits_for.items())

    def pick(self) -> str | None:
        """Returns the node to run next, or None when all are done or parked.

        Raises:
            DependencyCycleError: nodes remain, and each waits for another.
        """
        if self._ready is None:
            self._ranks = {}
            self._ready = []
            for node_id in self.waits_for:
                self._offer(node_id)
        while self._ready:
            _, _, node_id = heapq.heappop(self._ready)
            if node_id in self.waits_for and not self.waits_for[node_id]:
                return node_id
        if self.waits_for and not self.is_parked():
            remaining = ", ".join(self.waits_for)
            raise DependencyCycleError(f"Dependency cycle detected among the nodes {remaining}.")
        return None

    def _offer(self, node_id: str) -> None:
        if self._ready is not None and not self.waits_for[node_id]:
            heapq.heappush(self._ready, (self._get_rank(node_id, FARTHEST), self._place[node_id], node_id))

    def _get_rank(self, node_id: str, farthest: int) -> int:
        """Outputs and coroutines first, then what is closest to an output: a picture shows as soon as there is one."""
        for rank in range(farthest):
            if self._leads_to_output(node_id, rank):
                return rank
        return farthest

    def _leads_to_output(self, node_id: str, distance: int) -> bool:
        if distance == 0:
            return self.graph.is_output(node_id) or self._is_coroutine(node_id)
        return any(self._is_near_output(consumer, distance - 1) for consumer in self.holds_up[node_id])

    def _is_near_output(self, node_id: str, distance: int) -> bool:
        if distance == 0:
            return self.graph.is_output(node_id)
        if node_id not in self._ranks:
            self._ranks[node_id] = int(any(self.graph.is_output(consumer) for consumer in self.holds_up[node_id]))
        return bool(self._ranks[node_id])

    def _is_coroutine(self, node_id: str) -> bool:
        node_class = self.graph.get_class(node_id)
        return inspect.iscoroutinefunction(getattr(node_class, node_class.FUNCTION, None))

    def complete(self, node_id: str) -> None:
        """Takes a node that has run off the schedule."""
        del self.waits_for[node_id]
        for consumer in self.holds_up.pop(node_id):
            self.waits_for[consumer].discard(node_id)
            self._offer(consumer)
