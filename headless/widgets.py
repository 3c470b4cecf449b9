"""Widgets: which inputs of a node class hold a value in the editor, and how a workflow file stores them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

SEED_NAMES = ("seed", "noise_seed")
UPLOAD_OPTIONS = ("image_upload", "video_upload", "animated_image_upload")
# Nodes that the editor gives a player, which ends up in the prompt as an empty text.
AUDIO_TYPES = frozenset({"LoadAudio", "SaveAudio", "PreviewAudio", "SaveAudioMP3", "SaveAudioOpus"})
# What a fresh widget shows, by its kind, where the class gives no default. The kinds without a value here have
# their own rules.
DEFAULTS = {
    "INT": 0, "FLOAT": 0, "BOOLEAN": False, "STRING": "", "MARKDOWN": "", "COMBO": None, "COLOR": "#000000",
    "TEXTAREA": "", "MULTISELECT": [], "TREESELECT": "", "SELECTBUTTON": "", "CHART": {}, "GALLERIA": [],
    "IMAGECOMPARE": ["", ""], "FILEUPLOAD": "",
}  # fmt: skip
UNSET: Any = object()  # the value of a choice among nothing: it does not get into the prompt


@dataclass
class Widget:
    """A widget of a node in the editor.

    Attributes:
        name: the input's name; control and upload widgets have names of their own.
        value: the saved value, else the default of the class, `UNSET` if there is none.
        is_input: its value goes into the prompt. Otherwise only the editor uses it.
        is_saved: it has a place in ``widgets_values``.
        has_socket: something may be connected in its place.
        is_dynamic_prompt: the editor chooses among ``{a|b}`` in its text.
    """

    name: str
    value: Any
    is_input: bool = True
    is_saved: bool = True
    has_socket: bool = True
    is_dynamic_prompt: bool = False


def get_widgets(
    input_types: Mapping[str, Any], saved: Sequence[Any] | Mapping[str, Any] | None = None, class_type: str = ""
) -> list[Widget]:
    """Returns the widgets of a node in the order in which a workflow file stores their values.

    Args:
        input_types: what the class answers to ``INPUT_TYPES``.
        saved: ``widgets_values`` of the file: a list by position, or a dictionary by name. Values that are
            missing keep the default of the class.
        class_type: the registered name of the class; the editor adds widgets to some.
    """
    required, optional = (_get_specs(input_types, category) for category in ("required", "optional"))
    widgets = [
        widget for name, (kind, options) in {**required, **optional}.items()
        for widget in _get_input_widgets(name, kind, options)
    ]  # fmt: skip
    has_upload = next((True for kind, options in required.values() if _has_upload(kind, options)), False)
    if class_type in AUDIO_TYPES:
        widgets.append(Widget("audioUI", "", is_saved=False, has_socket=False))
    if has_upload or (required.get("audio") or (None, {}))[1].get("audio_upload") is True:
        widgets.append(Widget("upload", "image" if has_upload else "", is_input=False, has_socket=False))
    if isinstance(saved, Mapping):
        for widget in widgets:
            widget.value = saved.get(widget.name, widget.value)
        return widgets
    values = _drop_values_of_sockets(list(saved or []), {**required, **optional}, {widget.name for widget in widgets})
    for widget, value in zip((widget for widget in widgets if widget.is_saved), values, strict=False):
        widget.value = value
    return widgets


def _get_specs(input_types: Mapping[str, Any], category: str) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    specs = input_types.get(category) or {}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


def _drop_values_of_sockets(
    values: list[Any], specs: Mapping[str, tuple[Any, Mapping[str, Any]]], widget_names: set[str]
) -> list[Any]:
    """Drops the values that files from before frontend 1.16 hold for inputs which are sockets only.

    As there: such a file is recognised by the number of its values, and the values are taken by the place of
    their input, so that control values before a forced socket shift them.
    """
    added = [name for name in ("audioUI", "upload") if name in widget_names and name not in specs]
    shown = [name for name, (_, options) in specs.items() if name in widget_names or options.get("forceInput")]
    count = len(added) + sum(
        2 if specs[name][1].get("control_after_generate") or name in SEED_NAMES else 1 for name in shown
    )
    if count != len(values):
        return values
    forced = {index for index, name in enumerate(shown) if specs[name][1].get("forceInput")}
    return [value for index, value in enumerate(values) if index not in forced]


def _has_upload(kind: Any, options: Mapping[str, Any]) -> bool:
    is_combo = isinstance(kind, list) or kind == "COMBO"
    return is_combo and any(options.get(option) is True for option in UPLOAD_OPTIONS)


def _get_input_widgets(name: str, input_type: Any, options: Mapping[str, Any]) -> list[Widget]:
    """Returns the widget of one input, followed by its control widget if it has one; none for a socket."""
    kind = _get_kind(input_type, options)
    if kind not in DEFAULTS or options.get("forceInput"):
        return []
    widget = Widget(
        name,
        get_default(input_type, options),
        has_socket=not options.get("socketless"),
        is_dynamic_prompt=options.get("dynamicPrompts") is True,
    )
    control = options.get("control_after_generate")
    if control is None and kind == "INT":
        control = name in SEED_NAMES
    if not control or kind not in ("INT", "COMBO") or options.get("multi_select"):
        return [widget]
    control_name = control if kind == "INT" and isinstance(control, str) else "control_after_generate"
    controls = [Widget(control_name, "randomize", is_input=False, has_socket=False)]
    if kind == "COMBO":
        controls.append(Widget("control_filter_list", "", is_input=False, has_socket=False))
    return [widget, *controls]


def _get_kind(input_type: Any, options: Mapping[str, Any]) -> Any:
    if options.get("widgetType"):
        return options["widgetType"]
    return "COMBO" if isinstance(input_type, list) else input_type


def get_default(input_type: Any, options: Mapping[str, Any]) -> Any:
    """Returns the value a fresh widget shows: the declared default, else the frontend's for its kind."""
    kind = _get_kind(input_type, options)
    if kind == "COMBO":
        choices = input_type if isinstance(input_type, list) else options.get("options") or []
        if options.get("multi_select"):
            return []
        return options.get("default") or (choices[0] if choices else UNSET)
    default = options.get("default")
    if default is not None:
        return default
    inner = options.get("options")
    values = inner.get("values") if isinstance(inner, Mapping) else None
    if kind == "SELECTBUTTON" and values:
        return values[0]
    return copy.deepcopy(DEFAULTS.get(kind, ""))


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
