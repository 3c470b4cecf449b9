"""What a node may bring to change the graph while it runs: further nodes, and blockers of what follows.

Source: ComfyUI 0.3.64, `comfy_execution.graph_utils`. A pack that runs in both hosts imports them from ComfyUI and,
where that fails, from here.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

_prefix: ContextVar[tuple[str, int]] = ContextVar("kolors_graph_prefix", default=("", 0))
_graphs: ContextVar[int] = ContextVar("kolors_graph_index", default=0)


class ExecutionBlocker:
    """An output that keeps the nodes which take it from running.

    Attributes:
        message: told as an error once, by the first node that is blocked; None blocks silently.
    """

    def __init__(self, message: str | None):
        self.message = message


def is_blocker(value: object) -> bool:
    """Tells whether a value is an execution blocker, ours or of a class of the same name that a pack brings."""
    return any(kind.__name__ == "ExecutionBlocker" for kind in type(value).__mro__)


class GraphBuilder:
    """Builds the graph that a node returns under ``expand``. Its ids are unique and the same in every run.

    Args:
        prefix: what all ids start with; default: the id of the running node, the number of its call and of the
            graph within that call.
    """

    def __init__(self, prefix: str | None = None):
        if prefix is None:
            node_id, call = _prefix.get()
            index = _graphs.get()
            _graphs.set(index + 1)
            prefix = f"{node_id}.{call}.{index}."
        self.prefix = prefix
        self.nodes: dict[str, GraphNode] = {}

    def node(self, class_type: str, id: str | None = None, **inputs: Any) -> GraphNode:
        """Adds a node; a second one of the same `id` is the first again. An input is a constant or an ``out``."""
        node_id = self.prefix + (str(len(self.nodes) + 1) if id is None else id)
        return self.nodes.setdefault(node_id, GraphNode(node_id, class_type, inputs))

    def lookup_node(self, id: str) -> GraphNode | None:
        """Returns the node added under this id, or None."""
        return self.nodes.get(self.prefix + id)

    def finalize(self) -> dict[str, dict[str, Any]]:
        """Returns the graph as an API prompt."""
        return {node_id: node.serialize() for node_id, node in self.nodes.items()}


class GraphNode:
    """A node of a graph that is being built."""

    def __init__(self, node_id: str, class_type: str, inputs: dict[str, Any]):
        self.id = node_id
        self.class_type = class_type
        self.inputs = inputs
        self.override_display_id: str | None = None

    def out(self, index: int) -> list[Any]:
        """Returns the link to an output of this node."""
        return [self.id, index]

    def set_input(self, name: str, value: Any) -> None:
        """Sets an input; None removes it."""
        if value is None:
            self.inputs.pop(name, None)
        else:
            self.inputs[name] = value

    def set_override_display_id(self, node_id: str) -> None:
        """Makes the node show its results at another node."""
        self.override_display_id = node_id

    def serialize(self) -> dict[str, Any]:
        """Returns the node's entry in the API prompt."""
        entry: dict[str, Any] = {"class_type": self.class_type, "inputs": self.inputs}
        if self.override_display_id is not None:
            entry["override_display_id"] = self.override_display_id
        return entry


def set_graph_prefix(node_id: str, call: int) -> None:
    """Makes `GraphBuilder` name its graphs after a call of a node."""
    _prefix.set((node_id, call))
    _graphs.set(0)
