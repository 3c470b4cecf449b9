"""Execution of a validated graph: in which order its nodes run, and what happens when one does.

Source: ComfyUI 0.3.64, `PromptExecutor`. Not here yet: graphs that nodes expand into, blocked outputs, and
asynchronous nodes side by side (they run one after another).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cache import Cache, CachedResult
from .calling import call_over_lists, get_call_inputs, merge_results
from .graph import Graph, is_link
from .host import HeadlessHost, Interrupted
from .validation import get_type_name

logger = logging.getLogger(__name__)

EventSink = Callable[[str, dict[str, Any]], None]


class DependencyCycleError(Exception):
    """The nodes that remain wait for each other."""


class NodeInputError(Exception):
    """A node asks for an input that nothing is linked to."""


class Schedule:
    """Which node runs next. A node waits for all it is linked to, lazy inputs only once it asks for them."""

    def __init__(self, graph: Graph, is_cached: Callable[[str], bool]):
        self.graph = graph
        self.is_cached = is_cached
        self.waits_for: dict[str, set[str]] = {}
        self.holds_up: dict[str, dict[str, None]] = {}

    def add(self, node_id: str) -> None:
        """Schedules a node and everything it needs that has no result yet."""
        nodes = [node_id]
        links = []
        while nodes:
            current = nodes.pop()
            if current in self.waits_for:
                continue
            self.waits_for[current] = set()
            self.holds_up[current] = {}
            for name, origin, _ in self.graph.get_links(current):
                spec = self.graph.get_input_spec(current, name)
                is_lazy = spec is not None and spec.options.get("lazy", False)
                if not is_lazy and not self.is_cached(origin):
                    nodes.append(origin)
                    links.append((origin, current))
        for origin, current in links:
            self._link(origin, current)

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
        if not self.is_cached(value[0]):
            self.add(value[0])
            self._link(value[0], node_id)

    def _link(self, origin: str, node_id: str) -> None:
        self.waits_for[node_id].add(origin)
        self.holds_up[origin][node_id] = None

    def pick(self) -> str | None:
        """Returns the node to run next, or None when all are done.

        Raises:
            DependencyCycleError: nodes remain, and each waits for another.
        """
        if not self.waits_for:
            return None
        ready = [node_id for node_id, origins in self.waits_for.items() if not origins]
        if not ready:
            remaining = ", ".join(self.waits_for)
            raise DependencyCycleError(f"Dependency cycle detected among the nodes {remaining}.")
        # Outputs first, then what is closest to one: the user sees a picture as soon as there is one.
        for distance in range(3):
            for node_id in ready:
                if self._leads_to_output(node_id, distance):
                    return node_id
        return ready[0]

    def _leads_to_output(self, node_id: str, distance: int) -> bool:
        if distance == 0:
            return self.graph.is_output(node_id)
        return any(self._leads_to_output(consumer, distance - 1) for consumer in self.holds_up[node_id])

    def complete(self, node_id: str) -> None:
        """Takes a node that has run off the schedule."""
        del self.waits_for[node_id]
        for consumer in self.holds_up.pop(node_id):
            self.waits_for[consumer].discard(node_id)


@dataclass
class Execution:
    """One run of a validated graph.

    Attributes:
        executed: ids of the nodes that ran, in order of completion.
        error: what stopped the run, None if nothing did.
        was_interrupted: the run stopped because it was asked to.
    """

    graph: Graph
    cache: Cache
    host: HeadlessHost
    emit: EventSink
    extra_data: Mapping[str, Any]
    executed: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    was_interrupted: bool = False

    def run(self, targets: Iterable[str]) -> None:
        """Runs the targets and what they need, and stops at the first node that fails."""
        schedule = Schedule(self.graph, lambda node_id: self.cache.get(node_id) is not None)
        for target in targets:
            schedule.add(target)
        node_id = None
        inputs: dict[str, Any] = {}
        try:
            while (node_id := schedule.pick()) is not None:
                cached = self.cache.get(node_id)
                if cached is not None:
                    self._emit_executed(node_id, cached)
                    schedule.complete(node_id)
                    continue
                inputs, missing = self._start(node_id)
                with use_inference_mode():
                    is_done = self._run_node(schedule, node_id, inputs, missing)
                if is_done:
                    schedule.complete(node_id)
        except Interrupted as error:
            self.was_interrupted = True
            self._fail(node_id, error, {})
        except Exception as error:  # a node may raise anything
            self._fail(node_id, error, inputs)

    def _start(self, node_id: str) -> tuple[dict[str, Any], set[str]]:
        self.host.on_progress = lambda step, total, preview: self.emit(
            "progress", {"node": node_id, "value": step, "max": total, "preview": preview}
        )
        self.emit("executing", {"node": node_id, "class_type": self.graph.get_class_type(node_id)})
        return get_call_inputs(
            self.graph, node_id, get_outputs=self._get_outputs, extra_data=self.extra_data, with_prompt=True
        )

    def _get_outputs(self, node_id: str) -> list[Any] | None:
        result = self.cache.get(node_id)
        return None if result is None else result.outputs

    def _run_node(self, schedule: Schedule, node_id: str, inputs: dict[str, Any], missing: set[str]) -> bool:
        """Runs one node. Returns False when it has to wait for lazy inputs that it asked for."""
        node = self.cache.get_object(self.graph, node_id)
        if getattr(node, "check_lazy_status", None) is not None:
            answers = call_over_lists(node, "check_lazy_status", inputs, self.host.raise_if_interrupted)
            asked = {name for answer in answers if isinstance(answer, list) for name in answer}
            wanted = [name for name in sorted(asked) if name not in inputs or name in missing]
            for name in wanted:
                schedule.require(node_id, name)
            if wanted:
                return False
        results = call_over_lists(node, node.FUNCTION, inputs, self.host.raise_if_interrupted)
        outputs, ui = merge_results(results, self.graph.get_class(node_id))
        result = CachedResult(outputs=outputs, ui=ui or None)
        self.cache.set(node_id, result)
        self.executed.append(node_id)
        self._emit_executed(node_id, result)
        return True

    def _emit_executed(self, node_id: str, result: CachedResult) -> None:
        self.emit("executed", {"node": node_id, "output": result.ui})

    def _fail(self, node_id: str | None, error: Exception, inputs: Mapping[str, Any]) -> None:
        if node_id is None:  # no node is at fault alone: the rest of the graph goes round in a circle
            node_id = next(iter(self.graph.prompt))
        logger.debug("node %s failed", node_id, exc_info=error)
        self.error = {
            "node_id": node_id,
            "node_type": self.graph.get_class_type(node_id),
            "exception_type": get_type_name(type(error)),
            "exception_message": str(error),
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {name: [_format(value) for value in values] for name, values in inputs.items()},
        }
        event = "execution_interrupted" if self.was_interrupted else "execution_error"
        self.emit(event, {**self.error, "executed": list(self.executed)})


def _format(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, bool, str)) else str(value)


def use_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """Returns torch's inference mode, in which ComfyUI runs every node, or nothing while torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch.inference_mode() if torch is not None else contextlib.nullcontext()
