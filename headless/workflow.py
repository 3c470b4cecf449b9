"""Workflow files: what ComfyUI saves, as JSON or inside a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkflowError(ValueError):
    """A file or dictionary that cannot be read as a ComfyUI workflow, or not be turned into a prompt."""


def load_workflow(path: str | Path) -> dict[str, Any]:
    """Reads a workflow from a JSON file, or from the metadata of a PNG that ComfyUI or this runner saved.

    Args:
        path: a ``.json`` file in UI or API format, or a ``.png`` with a ``workflow`` or ``prompt`` text chunk.
            As in ComfyUI, ``workflow`` is preferred.

    Returns:
        The dictionary as it was saved, in either format.

    Raises:
        WorkflowError: the file is missing or unreadable, is not JSON, or is a picture without a workflow.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        text = _read_png_workflow(path)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise WorkflowError(
                f"{path}: neither JSON text nor a PNG picture. Give a workflow saved by ComfyUI (.json), "
                "or a PNG that it saved."
            ) from error
    try:
        workflow = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkflowError(
            f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg}). "
            "Save the workflow from ComfyUI again."
        ) from error
    if not is_ui_workflow(workflow) and not is_api_prompt(workflow):
        raise WorkflowError(f"{path}: {describe_non_workflow(workflow)}")
    return workflow


def _read_png_workflow(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text chunks may stand after the pixels
            chunks = dict(image.info)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise WorkflowError(f"{path}: a damaged PNG picture ({error}).") from error
    for key in ("workflow", "prompt"):
        if isinstance(chunks.get(key), str):
            return chunks[key]
    raise WorkflowError(
        f"{path}: this PNG carries no workflow. Only pictures saved with their metadata do; "
        "editors and chat programs strip it. Use the workflow's .json file instead."
    )


def is_ui_workflow(workflow: object) -> bool:
    """Tells whether a dictionary is a workflow in the UI format (0.4 or 1.0)."""
    return isinstance(workflow, Mapping) and isinstance(workflow.get("nodes"), list)


def is_api_prompt(workflow: object) -> bool:
    """Tells whether a dictionary is an API prompt: node ids, each with a dictionary that names a class."""
    return (
        isinstance(workflow, Mapping)
        and len(workflow) > 0
        and all(isinstance(node, Mapping) for node in workflow.values())
        and any("class_type" in node for node in workflow.values())
    )


def describe_non_workflow(workflow: object) -> str:
    """Says what was found in a workflow's place, and what was expected."""
    found = f"an object with the keys {sorted(workflow)[:6]}" if isinstance(workflow, Mapping) else (
        f"a {type(workflow).__name__}"
    )
    return (
        f"JSON, but not a ComfyUI workflow: it is {found}. Expected an object with a list `nodes` (UI format), or "
        "one entry per node with `class_type` and `inputs` (API format)."
    )
