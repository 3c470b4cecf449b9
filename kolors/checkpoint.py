"""Checkpoint files on disk: finding them, reading them memory-mapped, putting them into a module."""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from safetensors import safe_open

# Preference in a folder of the diffusers layout: half precision first, safetensors before pickles.
_FILE_STEMS = ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model", "model.fp16", "model", "pytorch_model")
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
# The header's word for a number format → torch's; another one is kept as it is, in lower case.
_DTYPES: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
     "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
)  # fmt: skip
# How a file begins that bears a checkpoint's name and is none: beginning → what it is.
_IMPOSTORS: Mapping[bytes, str] = MappingProxyType(
    {
        b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: the repository was cloned without "
        "LFS. Fetch the file itself",
        b"GGUF": "is a GGUF file, which is not read. Take a .safetensors file",
        b"<": "is a web page, probably the error page of a failed download. Fetch the file again",
    }
)

# Called with (done, total, text), in bytes, while something loads or downloads. May raise to stop the work.
OnProgress = Callable[[int, int, str], None]


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model. The message names the file and the next step."""


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor.

    Attributes:
        shape: of the stored tensor.
        dtype: torch's name of its number format, such as ``float16``.
    """

    shape: tuple[int, ...]
    dtype: str


def find_weight_files(path: Path) -> list[Path]:
    """Finds the weight files of one component (``unet``, ``text_encoder``, ``vae``): a file is its own answer.

    A folder has single files (``diffusion_pytorch_model.fp16.safetensors``, …), shards listed in an
    ``….index.json``, ChatGLM's ``pytorch_model-0000x-of-00007.bin``, or a file of another name that is the only
    one, as people save it by hand.

    Raises:
        CheckpointError: there are no weights, or a shard that the index lists is missing.
    """
    if path.is_file():
        return [path]
    for suffix in ("safetensors", "bin"):
        for stem in _FILE_STEMS:
            single = path / f"{stem}.{suffix}"
            if single.is_file():
                return [single]
            index = _find_index(path, stem, suffix)
            if index:
                return _read_index(index)
        shards = sorted(path.glob(f"*-of-*.{suffix}"))
        if shards:
            return _check_shards(shards)
    for suffix in ("safetensors", "bin"):
        others = sorted(path.glob(f"*.{suffix}"))
        if len(others) == 1:
            return others
    raise CheckpointError(f"No weights found in {path}: expected a .safetensors file, or .bin shards.")


def _find_index(folder: Path, stem: str, suffix: str) -> Path | None:
    base, _, variant = stem.partition(".")
    names = (f"{stem}.{suffix}.index.json", f"{base}.{suffix}.index.{variant}.json" if variant else "")
    return next((folder / name for name in names if name and (folder / name).is_file()), None)


def _read_index(index: Path) -> list[Path]:
    files = [index.parent / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index} lists {len(files)} files, missing: {', '.join(missing)}. Download them.")
    return files


def _check_shards(shards: list[Path]) -> list[Path]:
    expected = int(shards[0].stem.rsplit("-of-", 1)[1])
    if len(shards) != expected:
        raise CheckpointError(
            f"{shards[0].parent} holds {len(shards)} of {expected} weight files. Download the missing ones."
        )
    return shards


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"Missing file: {path}. The model folder is incomplete; download it again.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def read_config(path: Path, default: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Reads the config.json of a model's folder, or the one beside a single file.

    Args:
        path: the folder or the file.
        default: for a file with none beside it, or with another model's, as in a folder of many models' files.
        key: entry whose value in ``default`` marks the configurations of this model.

    Raises:
        CheckpointError: a folder has none, or it is unreadable.
    """
    if path.is_dir():
        return read_json(path / "config.json")
    beside = path.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    return config if config.get(key) == default[key] else default


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and memory-mapped tensors, file by file; nothing is read before a tensor is used.

    Raises:
        CheckpointError: a file is truncated, no checkpoint, or a pickle that holds more than tensors.
    """
    for file in files:
        if is_pickle(file):
            yield from _read_pickle(file).items()
            continue
        with _open_safetensors(file) as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Reads what tensors files hold, without the tensors: name → shape and number format.

    Tables within a pickled table are flattened, with dots between the names.

    Raises:
        CheckpointError: as ``iterate_tensors``.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        if is_pickle(file):
            for name, tensor in _flatten(_unpickle(file)):
                found[name] = TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            continue
        with _open_safetensors(file) as opened:
            for name in opened.keys():
                stored = opened.get_slice(name)
                dtype = str(stored.get_dtype())
                found[name] = TensorInfo(tuple(stored.get_shape()), _DTYPES.get(dtype, dtype.lower()))
    return found


def is_pickle(file: Path) -> bool:
    """Tells by its name whether a file is one of ``torch.save``; every other is read as safetensors.

    Raises:
        CheckpointError: it is missing or empty, or its beginning is not that of such a file.
    """
    try:
        with file.open("rb") as opened:
            beginning = opened.read(32)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error}).") from error
    if not beginning:
        raise CheckpointError(f"{file} is empty: the download never began. Fetch it again.")
    for impostor, text in _IMPOSTORS.items():
        if beginning.startswith(impostor):
            raise CheckpointError(f"{file} {text}.")
    if file.suffix.lower() not in _PICKLE_SUFFIXES:
        return False
    if not beginning.startswith(b"PK"):  # as every file of torch.save begins
        raise CheckpointError(f"{file} is damaged, or no file of PyTorch 1.6 or later. Fetch it again.")
    return True


@contextmanager
def _open_safetensors(file: Path) -> Iterator[safe_open]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or an incomplete download ({error}). Fetch it again.") from error


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    content = _unpickle(file)
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is no flat table of tensors.")
    return content


def _flatten(table: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in table.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _flatten(value))


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and is refused: loading it could run foreign code. "
            "Use a .safetensors file."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or an incomplete download ({error}). Fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no table of tensors.")
    return content


def load_weights_(
    module: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype | None,
    source: Path,
    ignored: frozenset[str] = frozenset(),
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Puts tensors into a module built on the meta device.

    A tensor that has the wanted dtype stays mapped to its file; another is converted, one at a time.

    Args:
        module: on the meta device.
        tensors: every parameter and persistent buffer of the module, under its name.
        dtype: floating tensors get this dtype; None: keep their own.
        source: the file or folder, for messages.
        ignored: names that may be there and are not used.
        on_progress: called after each tensor with the bytes (without a dtype: those of the module as it was built)
            that the module holds by then. Each tensor is read from the disk for it, which would else happen at its
            first use.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs; up to five are shown.
    """
    state = module.state_dict()
    expected = {name: tensor.shape for name, tensor in state.items()}
    sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in state.items()}
    total, done = sum(sizes.values()), 0
    loaded: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors:
        if name in ignored:
            continue
        if name not in expected:
            unknown.append(name)
        else:
            _check_shape(name, tensor.shape, expected[name], source)
            is_converted = dtype and tensor.is_floating_point() and tensor.dtype != dtype
            if on_progress or is_converted:
                read_pages(tensor)
            loaded[name] = tensor.to(dtype) if is_converted else tensor
            done += sizes[name]
            if on_progress:
                on_progress(done, total, f"Loading {source.name}: {describe_bytes(done, total)}")
    _check_names(expected, [*loaded, *unknown], source)
    module.load_state_dict(loaded, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def describe_bytes(done: int, total: int) -> str:
    """Says how much of how many bytes is done, in powers of 1000: ``2.1 of 5.2 GB``."""
    unit, factor = next(((unit, factor) for unit, factor in (("GB", 1e9), ("MB", 1e6)) if total >= factor), ("kB", 1e3))
    return f"{done / factor:.1f} of {total / factor:.1f} {unit}"


def check_fit(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, source: Path) -> None:
    """Checks names and shapes of a checkpoint, before anything of it is read.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs; up to five are shown.
    """
    for name, shape in found.items():
        if name in expected:
            _check_shape(name, shape, expected[name], source)
    _check_names(expected, found, source)


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], source: Path) -> None:
    if tuple(shape) != tuple(expected):
        raise CheckpointError(
            f"{source} does not fit: {name} has the shape {tuple(shape)}, expected {tuple(expected)}."
        )


def _check_names(expected: Iterable[str], found: Iterable[str], source: Path) -> None:
    expected, found = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} of {len(expected)} tensors are missing{_show(missing)}, "
            f"{len(unknown)} are unknown{_show(unknown)}."
        )


def read_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Reads a mapped tensor from the disk into the system's cache, by one byte of each page, and gives it back.

    One page after the other: torch's own operations read at as many places as there are threads, which the system's
    read-ahead does not follow. From a cold cache that took 3 to 6 s where this takes 0.8 s (1.4 GB, measured).
    """
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel():
        tensor.detach().flatten().view(torch.uint8).numpy()[:: mmap.PAGESIZE].sum()
    return tensor


def _show(names: list[str]) -> str:
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""
