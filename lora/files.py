"""LoRA files on disk: reading tensors safely, each file once, and writing whole files."""

from __future__ import annotations

import io
import logging
import pickle
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from ..kolors.storage import write_bytes, write_tensors
from .formats import PEFT_METADATA, Lora, LoraError, parse_lora, to_tensors
from .names import DIFFSYNTH, DIFFUSERS, UNetNames

logger = logging.getLogger(__name__)

# What torch's reader raises on bytes that are no checkpoint, or half of one.
_UNREADABLE = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
               struct.error)  # fmt: skip


def load_lora(path: str | Path, names: UNetNames, *, ignore_unknown: bool = False) -> Lora:
    """Loads a LoRA file. The last few are kept, so that a file that has not changed is read once.

    Args:
        path: a safetensors file or a torch checkpoint; which one, its content decides.
        names: of the UNet that it is for.
        ignore_unknown: leave out what fits nothing, instead of raising.

    Raises:
        FileNotFoundError: there is no such file.
        LoraError: it is damaged, holds more than tensors, or does not fit.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"There is no LoRA file {path}.")
    return _load(path, _get_stamp(path), names, ignore_unknown)


def _get_stamp(path: Path) -> tuple[int, ...]:
    """Says whether a file is still the same; with peft's configuration beside it, which belongs to it."""
    config = _find_peft_config(path)
    stats = [file.stat() for file in (path, config) if file]
    return tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _load(path: Path, stamp: tuple[int, ...], names: UNetNames, ignore_unknown: bool) -> Lora:
    tensors, metadata = read_tensors(path)
    return parse_lora(tensors, names, metadata=metadata, source=str(path), ignore_unknown=ignore_unknown)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads a file's tensors onto the CPU, and the metadata of its header.

    Raises:
        LoraError: it is empty, damaged, or holds more than tensors.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise LoraError(f"{path} is empty. Its download or its saving was cut short; fetch it again.")
    is_torch = start.startswith((b"PK", b"\x80"))
    tensors, metadata = (_read_torch(path), {}) if is_torch else _read_safetensors(path)
    config = _find_peft_config(path)
    if config and PEFT_METADATA not in metadata:
        metadata[PEFT_METADATA] = config.read_text(encoding="utf-8", errors="replace")
    return tensors, metadata


def _find_peft_config(path: Path) -> Path | None:
    """Finds the configuration that peft saves beside its own files; another program's file has none."""
    config = path.with_name("adapter_config.json")
    return config if path.stem == "adapter_model" and config.is_file() else None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            # Copies: a mapped file could be overwritten by the next training run while its tensors are in use.
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise LoraError(
            f"{path} is damaged, an incomplete download, or neither safetensors nor a torch checkpoint ({error}). "
            "Fetch it again."
        ) from error


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open(path, "rb") as file:  # given a path, torch would go by its suffix
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoraError(
            f"{path} is refused: it holds more than tensors, or is damaged. Loading it in full could run foreign code. "
            "Ask for a .safetensors file, or fetch it again."
        ) from error
    except _UNREADABLE as error:
        raise LoraError(f"{path} is damaged or an incomplete download ({error}). Fetch it again.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise LoraError(f"{path} is no flat table of tensors, so no LoRA file.")
    return content


def save_lora(lora: Lora, path: str | Path, file_format: str, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a LoRA file, whole or not at all; a file that is there is replaced.

    Args:
        lora: what to write.
        path: ends with ``.safetensors``, or with ``.ckpt`` for DiffSynth.
        file_format: ``diffusers``, ``kohya`` or ``diffsynth``.
        metadata: more for the header, such as what training knew. A ``.ckpt`` has no header.

    Returns:
        The path.

    Raises:
        LoraError: the format cannot hold the LoRA, or the suffix is none of the format's.
    """
    path = Path(path)
    suffixes = (".safetensors", ".ckpt") if file_format == DIFFSYNTH else (".safetensors",)
    if path.suffix not in suffixes:
        raise LoraError(f"{path} cannot be written as {file_format}: expected a name ending with {_join(suffixes)}.")
    tensors, header = to_tensors(lora, file_format)
    if path.suffix == ".ckpt":
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        write_bytes(path, buffer.getvalue())
    else:
        write_tensors(path, tensors, {**header, **(metadata or {}), "format": "pt"})
    if file_format == DIFFUSERS and any(adapter.scale != 1 for adapter in lora.adapters.values()):
        _warn_of_alpha(path)
    return path


@lru_cache(maxsize=8)
def _warn_of_alpha(path: Path) -> None:
    """Once for each file: training writes the same one again and again."""
    logger.warning("%s says its alpha in the header, where diffusers reads it and ComfyUI does not. For ComfyUI's "
                   "own LoRA loader write it as kohya.", path)  # fmt: skip


def _join(words: tuple[str, ...]) -> str:
    return " or ".join(words)
