"""Execution of a validated graph: what happens when a node runs, fails, waits, expands or is blocked.

Source: ComfyUI 0.3.64, `PromptExecutor`. Different on purpose: an interruption is noticed while coroutines are
waited for, too.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .cache import Cache, CachedResult
from .calling import Returned, call_node, get_call_inputs, get_results, is_pending, merge_results, merge_tuples
from .expansion import ExecutionBlocker, set_graph_prefix
from .graph import Graph, is_link
from .host import HeadlessHost, Interrupted
from .schedule import NodeInputError, Schedule
from .validation import get_type_name

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger(__name__)

EventSink = Callable[[str, dict[str, Any]], None]
POLL_SECONDS = 0.05  # how often an interruption is looked for while coroutines are waited for


class DuplicateNodeError(Exception):
    """A node expands into a graph with the id of a node that is there already."""


class UnknownClassError(Exception):
    """A node expands into a graph with a class that is not there."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When a node was at work, in seconds of `time.perf_counter`.

    Attributes:
        node_id: the node; one that took several goes (lazy inputs, coroutines, expansion) has several timings.
        class_type: the registered name of its class.
        start: when it began.
        end: when it stopped.
    """

    node_id: str
    class_type: str
    start: float
    end: float


@dataclass
class Execution:
    """One run of a validated graph.

    Attributes:
        executed: ids of the nodes that ran, in order of completion.
        timings: when each node was at work, in order.
        blocked: messages of execution blockers, by the first node that each kept from running.
        error: what stopped the run, None if nothing did.
        was_interrupted: the run stopped because it was asked to.
    """

    graph: Graph
    cache: Cache
    host: HeadlessHost
    emit: EventSink
    extra_data: Mapping[str, Any]
    executed: list[str] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    blocked: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    was_interrupted: bool = False

    def __post_init__(self) -> None:
        self._schedule = Schedule(self.graph, lambda node_id: self.cache.get(node_id) is not None)
        self._waiting: dict[str, list[Any]] = {}
        self._expanding: dict[str, Returned] = {}
        self._started: dict[str, float] = {}
        self._inputs: dict[str, Any] = {}

    def run(self, targets: Iterable[str]) -> None:
        """Runs the targets and what they need, and stops at the first node that fails."""
        run_in_loop(self._run(list(targets)))

    async def _run(self, targets: list[str]) -> None:
        node_id = None
        with contextlib.ExitStack() as modes:
            has_mode = False
            try:
                for target in targets:
                    self._schedule.add(target)
                while self._schedule.waits_for:
                    if not has_mode and "torch" in sys.modules:
                        modes.enter_context(sys.modules["torch"].inference_mode())
                        has_mode = True
                    node_id = None
                    node_id = await self._pick()
                    await self._step(node_id)
            except Interrupted as error:
                self.was_interrupted = True
                self._fail(node_id, error)
            except Exception as error:  # a node may raise anything
                self._fail(node_id, error)

    async def _pick(self) -> str:
        """Returns the node to run next, after waiting for a coroutine if there is no other."""
        import asyncio  # here and below: it takes longer to import than the rest of the runner

        while (node_id := self._schedule.pick()) is None:
            self.host.raise_if_interrupted()
            tasks = [task for results in self._waiting.values() for task in results if isinstance(task, asyncio.Task)]
            await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            self._unpark_done()
        return node_id

    def _unpark_done(self) -> None:
        for node_id, results in self._waiting.items():
            if not is_pending(results) and node_id in self._schedule.waits_for[node_id]:
                self._schedule.unpark(node_id)

    async def _step(self, node_id: str) -> None:
        cached = self.cache.get(node_id)
        if cached is not None:
            self._waiting.pop(node_id, None)  # an equal node has come to its end first
            self._emit_executed(node_id, cached.ui)
            self._schedule.complete(node_id)
            return
        self._inputs = {}
        start = time.perf_counter()
        try:
            is_done = await self._run_node(node_id)
        finally:
            class_type = self.graph.get_class_type(node_id)
            self.timings.append(Timing(node_id=node_id, class_type=class_type, start=start, end=time.perf_counter()))
        if is_done:
            self.executed.append(node_id)
            self._schedule.complete(node_id)
        else:
            self._schedule.put_back(node_id)
        self._unpark_done()

    async def _run_node(self, node_id: str) -> bool:
        """Runs one node as far as it goes. Returns False when it has to wait for something."""
        node_class = self.graph.get_class(node_id)
        if node_id in self._expanding:
            tuples = [self._resolve(*expansion) for expansion in self._expanding.pop(node_id).expansions]
            self.cache.set_outputs(node_id, merge_tuples(tuples, node_class))
            return True
        if node_id in self._waiting:
            results = self._waiting.pop(node_id)
        else:
            results = await self._call(node_id)
            if results is None:
                return False
            if is_pending(results):
                self._waiting[node_id] = results
                self._schedule.park(node_id)
                return False
        returned = merge_results(get_results(results), node_class)
        if returned.ui:
            self.cache.set_ui(node_id, returned.ui)
        if returned.outputs is None:
            self._emit_executed(node_id, returned.ui or None)
            self._expand(node_id, returned)
            return False
        result: CachedResult = self.cache.set_outputs(node_id, returned.outputs)
        self._emit_executed(node_id, result.ui)
        return True

    async def _call(self, node_id: str) -> list[Any] | None:
        """Calls a node's method. Returns None when the node asks for lazy inputs first."""
        self.host.on_progress = lambda step, total, preview: self.emit(
            "progress", {"node": node_id, "value": step, "max": total, "preview": preview}
        )
        self.emit("executing", self._name(node_id))
        self._inputs, missing = get_call_inputs(
            self.graph, node_id, get_outputs=self._get_outputs, extra_data=self.extra_data, with_prompt=True
        )
        node = self.cache.get_object(node_id)

        def before_call(index: int) -> None:
            self.host.raise_if_interrupted()
            set_graph_prefix(node_id, index)

        if getattr(node, "check_lazy_status", None) is not None:
            answers = await call_node(node, "check_lazy_status", self._inputs, before_call)
            answers = [await answer if is_pending([answer]) else answer for answer in answers]
            asked = {name for answer in get_results(answers) if isinstance(answer, list) for name in answer}
            wanted = [
                name for name in sorted(name for name in asked if isinstance(name, str))
                if name not in self._inputs or name in missing
            ]  # fmt: skip
            for name in wanted:
                self._schedule.require(node_id, name)
            if wanted and not self._schedule.waits_for[node_id]:
                raise NodeInputError(
                    f"check_lazy_status asks for {', '.join(wanted)} again and again: the linked node has run, and "
                    "gave nothing there. (ComfyUI would not come to an end with this.)"
                )
            if wanted:
                return None

        def on_blocked(blocker: Any) -> Any:
            message = getattr(blocker, "message", None)
            return blocker if message is None else self._tell_blocked(node_id, message)

        return await call_node(node, node.FUNCTION, self._inputs, before_call, on_blocked)

    def _tell_blocked(self, node_id: str, message: str) -> ExecutionBlocker:
        """Tells the message of a blocker once. Returns a silent blocker in its place."""
        self.blocked[node_id] = str(message)
        self.emit("execution_error", {
            "node_id": node_id, "node_type": self.graph.get_class_type(node_id),
            "exception_type": "ExecutionBlocked", "exception_message": f"Execution Blocked: {message}",
            "traceback": [], "current_inputs": {}, "executed": list(self.executed),
        })  # fmt: skip
        return ExecutionBlocker(None)

    def _expand(self, node_id: str, returned: Returned) -> None:
        """Adds the nodes that a node expands into, and makes it wait for those that its outputs link to."""
        added: list[str] = []
        origins: list[str] = []
        for graph, values in returned.expansions:
            if graph is None:
                continue
            for new_id, node in graph.items():
                if self.graph.has_node(new_id):
                    raise DuplicateNodeError(
                        f"The node expands into a node {new_id}, an id that is taken. Ids must be unique and the "
                        "same in every run; GraphBuilder makes such ids."
                    )
                if node["class_type"] not in self.graph.classes:
                    raise UnknownClassError(f"The node expands into a {node['class_type']}, which is not there.")
            self.graph.add_nodes(node_id, dict(graph))
            added += graph
            origins += [value[0] for value in values if is_link(value)]
        self.cache.add_nodes(node_id, added)
        self._expanding[node_id] = returned
        for new_id in added:
            if self.graph.is_output(new_id):
                self._schedule.add(new_id)
        for origin in origins:
            self._schedule.wait_for(node_id, origin)

    def _resolve(self, graph: Mapping[str, Any] | None, values: Any) -> Any:
        """Returns a tuple with the results of the expanded nodes in place of the links to them."""
        if graph is None:
            return values
        resolved: list[Any] = []
        for value in values:
            if is_link(value):
                outputs = self._get_outputs(value[0])
                assert outputs is not None
                resolved += outputs[int(value[1])]
            else:
                resolved.append(value)
        return tuple(resolved)

    def _get_outputs(self, node_id: str) -> list[Any] | None:
        result = self.cache.get(node_id)
        return None if result is None else result.outputs

    def _name(self, node_id: str) -> dict[str, Any]:
        return {
            "node": node_id,
            "display_node": self.graph.get_display_node_id(node_id),
            "class_type": self.graph.get_class_type(node_id),
        }

    def _emit_executed(self, node_id: str, ui: dict[str, Any] | None) -> None:
        self.emit("executed", {**self._name(node_id), "output": ui})

    def _fail(self, node_id: str | None, error: Exception) -> None:
        if node_id is None:  # no node is at fault alone: the rest of the graph goes round in a circle, or waits
            node_id = next(iter(self._schedule.waits_for), next(iter(self.graph.prompt)))
        logger.debug("node %s failed", node_id, exc_info=error)
        real_id = self.graph.get_real_node_id(node_id)
        self.error = {
            "node_id": real_id,
            "node_type": self.graph.get_class_type(real_id),
            "exception_type": get_type_name(type(error)),
            "exception_message": str(error),
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {} if self.was_interrupted else _format_inputs(self._inputs),
        }
        if real_id != node_id:
            self.error |= {"expanded_node_id": node_id, "expanded_node_type": self.graph.get_class_type(node_id)}
        event = "execution_interrupted" if self.was_interrupted else "execution_error"
        self.emit(event, {**self.error, "executed": list(self.executed)})


def _format_inputs(inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [_format(value) for value in values] for name, values in inputs.items()}


def _format(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, bool, str)) else str(value)


def run_in_loop(coroutine: Any) -> None:
    """Runs a coroutine to its end, in a thread of its own where this one runs an event loop (a notebook does)."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with _use_loop() as loop:
            loop.run_until_complete(coroutine)
        return
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            with _use_loop() as loop:
                loop.run_until_complete(coroutine)
        except BaseException as error:  # carried over to the calling thread, whatever it is
            outcome.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    if outcome:
        raise outcome[0]


@contextlib.contextmanager
def _use_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Gives an event loop, and ends what still runs in it. Unlike asyncio.run, Ctrl-C stops a node at once."""
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
