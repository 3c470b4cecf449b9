"""Files that are whole or absent: written beside, flushed, then renamed. The same content gives the same bytes.

And what a cached result is called: its name says of which model and of which input it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file so that a reader finds the old content or the new one, never a part, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are for their maker alone
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def remove_parts(folder: Path) -> None:
    """Removes what writers that were killed left behind in a folder."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def serialize(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Gives a safetensors file's bytes, with a sorted header: the library orders metadata anew in every process."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file, whole or not at all."""
    return write_bytes(path, serialize(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """Reads a safetensors file of our own: tensors and metadata, or None where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}, dict(opened.metadata() or {})
    except (SafetensorError, OSError):
        return None


def get_identity(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Gives a model's identity: a digest of names, shapes and 64 values spread over every tensor.

    Reads little of a file that is mapped into memory. The precision does not count as far as values survive it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().astype("<f4")
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()


def get_cache_name(*parts: object) -> str:
    """Gives the file name of what was computed from these parts: model, precision, input."""
    return f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.safetensors"
