"""Widgets: which inputs of a node class hold a value in the editor, and how a workflow file stores them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDGET_TYPES = frozenset({"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO", "MARKDOWN", "COLOR"})
SEED_NAMES = ("seed", "noise_seed")
UPLOAD_OPTIONS = ("image_upload", "video_upload", "animated_image_upload")


@dataclass
class Widget:
    """One entry of a node's ``widgets_values``.

    Attributes:
        name: the input's name; control and upload widgets have names of their own.
        value: the saved value, else the default of the class.
        is_input: it belongs to a declared input. Otherwise only the editor uses it.
        is_dynamic_prompt: the editor chooses among ``{a|b}`` in its text.
        is_forced_socket: not a widget any more, yet old files hold a value for it.
    """

    name: str
    value: Any
    is_input: bool = True
    is_dynamic_prompt: bool = False
    is_forced_socket: bool = False


def get_widgets(
    input_types: Mapping[str, Any], saved: Sequence[Any] | Mapping[str, Any] | None = None
) -> list[Widget]:
    """Returns the widgets of a node in the order in which a workflow file stores their values.

    Args:
        input_types: what the class answers to ``INPUT_TYPES``.
        saved: ``widgets_values`` of the file: a list by position, or a dictionary by name. Values that are
            missing keep the default of the class.
    """
    layout = _lay_out(input_types)
    widgets = [widget for widget in layout if not widget.is_forced_socket]
    if isinstance(saved, Mapping):
        for widget in widgets:
            widget.value = saved.get(widget.name, widget.value)
        return widgets
    values = list(saved or [])
    if len(layout) == len(values) and len(layout) != len(widgets):
        # Files from before frontend 1.16 also hold values of inputs that are sockets only.
        values = [value for value, widget in zip(values, layout, strict=True) if not widget.is_forced_socket]
    for widget, value in zip(widgets, values, strict=False):
        widget.value = value
    return widgets


def _lay_out(input_types: Mapping[str, Any]) -> list[Widget]:
    widgets: list[Widget] = []
    for category in ("required", "optional"):
        specs = input_types.get(category) or {}
        for name, spec in specs.items():
            widgets += _get_input_widgets(name, spec[0], spec[1] if len(spec) > 1 else {})
        if category == "required" and any(_has_upload(spec) for spec in specs.values()):
            widgets.append(Widget("upload", "image", is_input=False))
    return widgets


def _has_upload(spec: Sequence[Any]) -> bool:
    options = spec[1] if len(spec) > 1 else {}
    is_combo = isinstance(spec[0], list) or spec[0] == "COMBO"
    return is_combo and any(options.get(option) is True for option in UPLOAD_OPTIONS)


def _get_input_widgets(name: str, input_type: Any, options: Mapping[str, Any]) -> list[Widget]:
    """Returns the widget of one input, followed by its control widget if it has one; none for a socket."""
    kind = "COMBO" if isinstance(input_type, list) else options.get("widgetType", input_type)
    if kind not in WIDGET_TYPES:
        return []
    if options.get("forceInput"):
        return [Widget(name, None, is_forced_socket=True)]
    widget = Widget(name, get_default(input_type, options), is_dynamic_prompt=bool(options.get("dynamicPrompts")))
    control = options.get("control_after_generate")
    if control is None and kind == "INT":
        control = name in SEED_NAMES
    if not control or kind not in ("INT", "FLOAT", "COMBO"):
        return [widget]
    controls = [Widget("control_after_generate", "randomize", is_input=False)]
    if kind == "COMBO":
        controls.append(Widget("control_filter_list", "", is_input=False))
    return [widget, *controls]


def get_default(input_type: Any, options: Mapping[str, Any]) -> Any:
    """Returns the value a fresh widget shows: the declared default, else the frontend's for its type."""
    if "default" in options:
        return options["default"]
    kind = options.get("widgetType", input_type)
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options") or []
        return choices[0] if choices else None
    return {"INT": 0, "FLOAT": 0, "BOOLEAN": False, "COLOR": "#000000"}.get(kind, "")


def resolve_dynamic_prompt(text: str, rng: random.Random) -> str:
    """Strips C-style comments and replaces each ``{a|b|{c|d}}`` by one of its alternatives.

    A backslash keeps a brace or bar as it is. An unclosed brace is taken as closed at the end of the text.
    """
    text = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text)
    resolved, _ = _resolve_alternatives(text, 0, rng, nested=False)
    return re.sub(r"\\([{}|])", r"\1", resolved)


def _resolve_alternatives(text: str, start: int, rng: random.Random, nested: bool) -> tuple[str, int]:
    """Reads up to the closing brace (or the end), and returns one alternative and the position behind it."""
    alternatives = [""]
    position = start
    while position < len(text):
        char = text[position]
        position += 1
        if char == "\\" and position < len(text):
            alternatives[-1] += char + text[position]
            position += 1
        elif char == "{":
            chosen, position = _resolve_alternatives(text, position, rng, nested=True)
            alternatives[-1] += chosen
        elif nested and char == "}":
            break
        elif nested and char == "|":
            alternatives.append("")
        else:
            alternatives[-1] += char
    return rng.choice(alternatives), position
