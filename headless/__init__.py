"""Runs ComfyUI graphs without ComfyUI. Importing this loads neither torch nor a node."""

from .conversion import to_prompt
from .expansion import ExecutionBlocker, GraphBuilder
from .graph import Graph
from .host import HeadlessHost, Interrupted, get_running_host
from .runner import Runner, RunResult
from .workflow import WorkflowError, load_workflow

__all__ = [
    "ExecutionBlocker",
    "Graph",
    "GraphBuilder",
    "HeadlessHost",
    "Interrupted",
    "RunResult",
    "Runner",
    "WorkflowError",
    "get_running_host",
    "load_workflow",
    "to_prompt",
]
