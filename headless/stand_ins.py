"""Stand-ins for the core nodes of ComfyUI that Kolors graphs use."""

from __future__ import annotations

from .graph import NodeClasses

NODE_CLASS_MAPPINGS: dict[str, type] = {}


def with_stand_ins(nodes: NodeClasses) -> dict[str, type]:
    """Returns `nodes` with the stand-ins added under the names that it lacks."""
    return {**NODE_CLASS_MAPPINGS, **nodes}
