"""What of Kolors lies on the disk: which kind, how large, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

from .checkpoint import CheckpointError, TensorInfo, find_weight_files, read_config, read_headers
from .identify import FileKind, check_part, classify
from .unet_names import rename_tensors

_PRECISIONS: Mapping[str, str] = MappingProxyType(
    {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A file or folder with weights.

    Attributes:
        path: of the file, or of the folder in the diffusers layout.
        part: ``unet``, ``text_encoder`` or ``vae``: what it was looked at as.
        kind: what it is; None where that cannot be read.
        precision: the number format of most of its weights: ``fp16``, …, ``int8``, ``int4``; empty if unknown.
        size: bytes of its weight files.
        problem: why it is of no use, and what to do; empty if it is whole.
    """

    path: Path
    part: str
    kind: FileKind | None = None
    precision: str = ""
    size: int = 0
    problem: str = ""


def inspect_part(path: Path, part: str) -> Finding:
    """Looks at a file, or a folder, as one part of the model. Headers are read, no weights.

    Args:
        path: an existing file, or a folder of the diffusers layout.
        part: ``unet``, ``text_encoder`` or ``vae``.
    """
    try:
        files = find_weight_files(path)
        tensors = read_headers(files)
    except CheckpointError as error:
        return Finding(path=path, part=part, problem=str(error))
    kind, size = classify(tensors), sum(file.stat().st_size for file in files)
    found = {"path": path, "part": part, "kind": kind, "precision": get_precision(tensors, kind), "size": size}
    try:
        check_part(path, part)
        missing = find_missing_tensors(path, part, tensors)
    except CheckpointError as error:
        return Finding(**found, problem=str(error))
    if not missing:
        return Finding(**found)
    names = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
    return Finding(**found, problem=f"{path} lacks {len(missing)} tensors ({names}). Fetch it again.")


def read_precision(path: Path) -> str:
    """Reads which number format most weights of a file, or of a folder, have: ``fp16``, …, ``int8``, ``int4``.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    tensors = read_headers(find_weight_files(path))
    return get_precision(tensors, classify(tensors))


def get_precision(tensors: Mapping[str, TensorInfo], kind: FileKind) -> str:
    """Gives the number format that most of the weights have."""
    quantised = {FileKind.CHATGLM3_INT8: "int8", FileKind.CHATGLM3_INT4: "int4"}
    if kind in quantised:
        return quantised[kind]
    elements: Counter[str] = Counter()
    for info in tensors.values():
        elements[info.dtype] += prod(info.shape)
    dtype = max(elements, key=lambda name: elements[name], default="")
    return _PRECISIONS.get(dtype, dtype)


def find_missing_tensors(path: Path, part: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names the weights that a part needs and a header does not list.

    Raises:
        CheckpointError: the configuration in the folder is missing or unreadable.
    """
    expected = {"unet": _list_unet, "text_encoder": _list_text_encoder, "vae": _list_vae}[part]
    return expected(path, tensors)


def _list_unet(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    from .unet import KOLORS_UNET_CONFIG, build_unet

    unet = build_unet(read_config(path, KOLORS_UNET_CONFIG, "encoder_hid_dim_type"), device="meta")
    there = {name for name, _ in rename_tensors(tensors.items(), unet)}
    return [name for name in unet.state_dict() if name not in there]


def _list_text_encoder(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    from .checkpoint import read_json
    from .text_encoder import TextEncoderConfig, build_text_encoder

    config = TextEncoderConfig()
    if path.is_dir():
        config = TextEncoderConfig.from_dict(read_json(path / "config.json"))
    there = {name.removeprefix("transformer.") for name in tensors}
    return [name for name in build_text_encoder(config, device="meta").state_dict() if name not in there]


def _list_vae(path: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    from .vae import SDXL_VAE_CONFIG, build_autoencoder, get_ldm_names

    vae = build_autoencoder(read_config(path, SDXL_VAE_CONFIG, "_class_name"), device="meta")
    names = {**{name: name for name in vae.state_dict()}, **get_ldm_names(vae)}
    there = {names.get(name.removeprefix("first_stage_model.").removeprefix("vae.")) for name in tensors}
    return [name for name in vae.state_dict() if name not in there]
