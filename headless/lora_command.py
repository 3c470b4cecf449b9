"""The commands ``kolors convert-lora`` and ``kolors inspect-lora``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ..lora.formats import Lora
    from ..lora.names import UNetNames

DONE, INVALID = 0, 2
_SHOWN_KEYS = 5
_SHOWN_CHARACTERS = 120
# Entries of a header that say what a file was trained on.
_BASE_MODEL_KEYS = ("base_model", "ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")


def add_lora_commands(commands: Any) -> None:
    """Adds the two commands to the command line's subparsers."""
    from ..lora.names import WRITABLE

    convert = commands.add_parser(
        "convert-lora",
        help="write a LoRA file in another format",
        description="Reads a LoRA file of any format and writes it as another. Exit status: 0 done, 2 not possible.",
    )
    convert.add_argument("source", metavar="IN", help="the LoRA file")
    convert.add_argument("target", metavar="OUT", help="the new file: .safetensors, or .ckpt for diffsynth")
    convert.add_argument("--to", required=True, choices=WRITABLE, dest="format", help="the new file's format")
    convert.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="the alpha to write, in place of the file's own; DiffSynth's files store none, give the training's",
    )
    convert.set_defaults(handler=run_convert)
    inspect = commands.add_parser(
        "inspect-lora",
        help="say what a LoRA file holds",
        description="Says a LoRA file's format, kind, rank, alpha, modules, number format and metadata, and what of "
        "it would not be used. Exit status: 0 done, 2 no usable LoRA.",
    )
    inspect.add_argument("source", metavar="FILE", help="the LoRA file")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(handler=run_inspect)
    convert.add_argument("--ignore-unknown", action="store_true", help="leave out tensors that fit nothing")
    for command in (convert, inspect):
        command.add_argument("--demo", action="store_true", help="the LoRA is for the small bundled model")
        command.add_argument("--verbose", action="store_true", help="show log messages")


def run_convert(options: argparse.Namespace, out: TextIO) -> int:
    """The command ``kolors convert-lora``. Returns the exit status."""
    return _run(convert, options, out)


def run_inspect(options: argparse.Namespace, out: TextIO) -> int:
    """The command ``kolors inspect-lora``. Returns the exit status."""
    return _run(inspect, options, out)


def _run(command: Callable[[argparse.Namespace, TextIO], None], options: argparse.Namespace, out: TextIO) -> int:
    from ..lora.formats import LoraError
    from .command import show_log

    try:
        with show_log(sys.stderr, options.verbose):
            command(options, out)
    except (LoraError, OSError) as error:
        if getattr(options, "json", False):
            print(json.dumps({"file": options.source, "error": str(error)}), file=out)
        else:
            print(f"error: {error}", file=sys.stderr)
        return INVALID
    return DONE


def convert(options: argparse.Namespace, out: TextIO) -> None:
    """Reads, changes the alpha if asked, writes, and prints the new file's path.

    Raises:
        LoraError: the file cannot be read or cannot be written in this format.
        OSError: it is missing, or the new one cannot be written.
    """
    from ..lora.files import load_lora, save_lora

    lora = load_lora(options.source, get_names(options.demo), ignore_unknown=options.ignore_unknown)
    if options.alpha is not None:
        lora = lora.with_alpha(options.alpha)
    elif lora.lacks_alpha:
        print(
            f"warning: {options.source} stores no alpha, so none is written, and readers take alpha = rank, a scale "
            "of 1. If it was trained with another, give it with --alpha.",
            file=sys.stderr,
        )
    metadata = {}
    if not any(key in lora.metadata for key in _BASE_MODEL_KEYS):
        metadata["base_model"] = "kolors-shapes" if options.demo else "Kwai-Kolors/Kolors"
    print(save_lora(lora, options.target, options.format, metadata=metadata), file=out)


def inspect(options: argparse.Namespace, out: TextIO) -> None:
    """Reads and prints what is there; tensors that fit nothing are listed.

    Raises:
        LoraError: the file is damaged, or nothing in it fits.
        OSError: it is missing.
    """
    from ..lora.files import load_lora

    names = get_names(options.demo)
    lora = load_lora(options.source, names, ignore_unknown=True)
    if options.json:
        print(json.dumps({"file": options.source, **describe(lora)}), file=out)
        return
    for title, text in _list_lines(lora, Path(options.source)):
        print(f"{title:<10}{text}", file=out)


def get_names(is_demo: bool) -> UNetNames:
    """Gives the module names of Kolors' UNet, or of the bundled model's, without reading weights."""
    from ..lora.names import get_kolors_names, get_unet_names

    if not is_demo:
        return get_kolors_names()
    from ..kolors.checkpoint import read_json
    from ..kolors.unet import build_unet

    config = Path(__file__).parents[1] / "demo" / "kolors-shapes" / "unet" / "config.json"
    return get_unet_names(build_unet(read_json(config), device="meta"))


def describe(lora: Lora) -> dict[str, Any]:
    """Gives what is known of a LoRA as plain values."""
    tensors = [tensor for adapter in lora.adapters.values() for tensor in adapter.tensors.values()]
    modules = {name.rpartition(".")[0] for name in lora.adapters}
    return {
        "format": lora.format,
        "kinds": dict(lora.kinds),
        "ranks": dict(lora.ranks),
        "alphas": {"none" if alpha is None else f"{alpha:g}": count for alpha, count in lora.alphas.items()},
        "scales": dict(Counter(adapter.scale for adapter in lora.adapters.values() if adapter.rank is not None)),
        "modules": len(modules),
        "attention_modules": sum(lora.names.by_diffusers[name].is_attention for name in modules),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        "metadata": dict(lora.metadata),
        "left_out": list(lora.text_keys),
        "unused": list(lora.unknown_keys),
    }


def _list_lines(lora: Lora, path: Path) -> list[tuple[str, str]]:
    """Gives what is known of a LoRA as titles and texts for a reader."""
    found = describe(lora)
    attention = sum(module.is_attention for module in lora.names.modules)
    others = found["modules"] - found["attention_modules"]
    alpha = _count(found["alphas"])
    if lora.lacks_alpha:
        alpha += ": not stored, alpha = rank is assumed, a scale of 1"
    elif found["scales"]:
        alpha += f" (alpha / rank: {_count({f'{scale:g}': count for scale, count in found['scales'].items()})})"
    lines = [
        ("file", f"{path} ({path.stat().st_size / 1e6:.1f} MB)"),
        ("format", found["format"]),
        ("kind", _count(found["kinds"])),
        ("rank", _count(found["ranks"]) or "none"),
        ("alpha", alpha or "none"),
        ("modules", f"{found['attention_modules']} of {attention} in attention, {others} others"),
        ("dtype", _count(found["dtypes"])),
        ("left out", _show(found["left_out"], "for text encoders that Kolors lacks")),
        ("not used", _show(found["unused"], "that fit nothing in the UNet")),
    ]
    for key, value in sorted(found["metadata"].items()):
        text = json.dumps(value, ensure_ascii=False)  # a header is foreign text: control characters are escaped
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}… ({len(value)} characters)"
        lines.append(("metadata", f"{json.dumps(key, ensure_ascii=False)}: {shown}"))
    return lines


def _count(counts: dict[Any, int]) -> str:
    """Gives one value bare, and several with how often each is there, the most frequent first."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count})" for value, count in sorted(counts.items(), key=lambda item: -item[1]))


def _show(keys: list[str], what: str) -> str:
    if not keys:
        return "nothing"
    more = ", …" if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} tensors {what}: {', '.join(keys[:_SHOWN_KEYS])}{more}"
