"""The runner: a workflow in, what its nodes made out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cache import Cache, CachedResult
from .conversion import to_prompt
from .execution import EventSink, Execution, Timing
from .graph import Graph, NodeClasses, Prompt
from .host import HeadlessHost, use_host
from .packs import explain_host_imports
from .stand_ins import with_stand_ins
from .validation import validate_prompt
from .workflow import WorkflowError, is_ui_workflow, load_workflow


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run went.

    Attributes:
        status: ``"success"``, ``"error"`` (a node failed or the run was interrupted) or ``"invalid"`` (nothing
            ran).
        outputs: ``{node id: ui dictionary}`` of the nodes that showed something, such as
            ``{"images": [{"filename", "subfolder", "type"}]}``. Results reused from the last run are included.
        values: ``{node id: returned tuple}`` of the nodes named in ``outputs=``. A node that ran several times
            over a list has a list in each place.
        executed: ids of the nodes that ran, in order of completion.
        cached: ids of the nodes whose result was still there from the last run.
        error: None, or of a failed run ``node_id, node_type, exception_type, exception_message, traceback,
            current_inputs``, of a refused one ``type, message, details, extra_info``.
        node_errors: ``{node id: {"errors", "dependent_outputs", "class_type"}}`` as ComfyUI's server gives
            them; also of a run that succeeded for only some of its outputs.
        blocked: messages of execution blockers, by the first node that each kept from running.
        timings: when each node was at work, in order.
        prompt: the API prompt that was run, constants cast to their types.
    """

    status: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    executed: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    error: dict[str, Any] | None = None
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    prompt: Prompt = field(default_factory=dict)


class Runner:
    """Runs ComfyUI graphs without ComfyUI, and keeps the results of the last run for the next.

    Args:
        nodes: node classes by name, any ``NODE_CLASS_MAPPINGS``. Stand-ins for the core nodes that Kolors graphs
            use are added; a class of the same name in `nodes` wins.
        models_dir: folder with ComfyUI's layout; default: that of the ComfyUI the pack sits in, else
            ``./models``.
        input_dir: where LoadImage looks; default: that of the ComfyUI the pack sits in, else ``./input``.
        output_dir: where SaveImage writes; default: ``./output``. Previews go to its subfolder ``temp``.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; default: the best one available.
        display_names: titles of nodes by class name, any ``NODE_DISPLAY_NAME_MAPPINGS``.
        cache_limit: None keeps the results of the last run only, as ComfyUI does; a number of bytes keeps those
            of earlier runs too, as long as all of them together stay below it.
        on_event: called with (name, data) for ``execution_start``, ``execution_cached``, ``executing``,
            ``progress``, ``executed``, ``execution_success``, ``execution_error`` and
            ``execution_interrupted``.
    """

    def __init__(
        self,
        nodes: NodeClasses,
        *,
        models_dir: str | Path | None = None,
        input_dir: str | Path | None = None,
        output_dir: str | Path | None = None,
        device: str | None = None,
        display_names: Mapping[str, str] | None = None,
        cache_limit: int | None = None,
        on_event: EventSink | None = None,
    ):
        self.nodes = with_stand_ins(nodes)
        self.display_names = dict(display_names or {})
        self.host = HeadlessHost(models_dir=models_dir, input_dir=input_dir, output_dir=output_dir, device=device)
        self.on_event = on_event
        self._cache = Cache(cache_limit)

    def run(
        self,
        workflow_or_prompt: Mapping[str, Any] | str | Path,
        outputs: Iterable[str] | None = None,
        extra_data: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Runs a graph. Bad input and failing nodes are told in the result, not raised.

        Args:
            workflow_or_prompt: a workflow in UI format, an API prompt, or the path of a file with either.
            outputs: ids of nodes to compute, output nodes or not; default: every output node.
            extra_data: as sent to ComfyUI's server. Default for a UI workflow: the workflow itself under
                ``extra_pnginfo``, so that saved pictures carry it.
        """
        with use_host(self.host), explain_host_imports():
            try:
                workflow = workflow_or_prompt
                if not isinstance(workflow, Mapping):
                    workflow = load_workflow(workflow)
                prompt = to_prompt(workflow, self.nodes, display_names=self.display_names)
            except WorkflowError as error:
                details = {"type": "invalid_workflow", "message": str(error), "details": "", "extra_info": {}}
                return RunResult(status="invalid", error=details)
            extra_data = dict(extra_data or {})
            if is_ui_workflow(workflow):
                extra_data.setdefault("extra_pnginfo", {"workflow": copy.deepcopy(dict(workflow))})
            return self._run_prompt(prompt, outputs, extra_data)

    def interrupt(self) -> None:
        """Asks the run in progress to stop. May be called from another thread."""
        self.host.interrupt()

    def _run_prompt(self, prompt: Prompt, outputs: Iterable[str] | None, extra_data: Mapping[str, Any]) -> RunResult:
        graph = Graph(prompt, self.nodes)
        wanted = None if outputs is None else [str(node_id) for node_id in outputs]
        validation = validate_prompt(graph, wanted)
        if validation.error:
            return RunResult(
                status="invalid", error=validation.error, node_errors=validation.node_errors, prompt=prompt
            )
        import uuid

        prompt_id = str(uuid.uuid4())

        def emit(name: str, data: dict[str, Any]) -> None:
            if self.on_event:
                self.on_event(name, {**data, "prompt_id": prompt_id})

        self.host.clear_interrupt()
        needed = {member for target in validation.targets for member in [target, *graph.get_ancestors(target)]}
        emit("execution_start", {"nodes": [node_id for node_id in prompt if node_id in needed]})
        self._cache.set_graph(graph)
        cached = tuple(node_id for node_id in prompt if self._cache.get(node_id))
        emit("execution_cached", {"nodes": list(cached)})
        execution = Execution(graph, self._cache, self.host, emit, extra_data)
        execution.run(validation.targets)
        if execution.error is None:
            emit("execution_success", {})
        shown = [*prompt, *graph.expanded]
        outputs = {node_id: ui for node_id in shown if (ui := self._cache.get_ui(node_id)) is not None}
        values = {
            node_id: get_values(result, graph.get_class(node_id))
            for node_id in wanted or []
            if (result := self._cache.get(node_id))
        }
        self._cache.trim()
        return RunResult(
            status="success" if execution.error is None else "error",
            outputs=outputs,
            values=values,
            executed=tuple(execution.executed),
            cached=cached,
            error=execution.error,
            node_errors=validation.node_errors,
            blocked=execution.blocked,
            timings=tuple(execution.timings),
            prompt=prompt,
        )


def get_values(result: CachedResult, node_class: type) -> tuple[Any, ...]:
    """Returns a node's outputs as its method returned them; lists where it ran several times."""
    outputs = result.outputs or []
    is_list = getattr(node_class, "OUTPUT_IS_LIST", ()) or (False,) * len(outputs)
    return tuple(
        values if as_list or len(values) != 1 else values[0] for values, as_list in zip(outputs, is_list, strict=False)
    )
