"""The headless host: the services that ComfyUI gives its nodes, for graphs that run without it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MODEL_SUFFIXES = frozenset({".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"})
# Folder kinds of ComfyUI whose folders are not simply `models/<kind>`; the first one listed is searched first.
FOLDER_NAMES = {
    "text_encoders": ("text_encoders", "clip"),
    "diffusion_models": ("unet", "diffusion_models"),
    "controlnet": ("controlnet", "t2i_adapter"),
}
LEGACY_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}
FILTERED_KINDS = frozenset(
    "checkpoints loras vae text_encoders diffusion_models clip_vision style_models embeddings vae_approx "
    "controlnet gligen upscale_models hypernetworks photomaker model_patches audio_encoders".split()
)

ProgressSink = Callable[[int, int, Any], None]


class Interrupted(Exception):
    """The run was asked to stop. A node lets it pass through."""


@dataclass(frozen=True, kw_only=True)
class SavePath:
    """Where the next file of a series goes.

    Attributes:
        folder: the existing folder to write into.
        stem: the file name without counter and suffix.
        counter: the first free number of the series.
        subfolder: `folder` relative to the output folder, in posix form, empty for the folder itself.
    """

    folder: Path
    stem: str
    counter: int
    subfolder: str

    def get_name(self, index: int, suffix: str) -> str:
        """Returns the file name of the series' `index`-th new file, such as ``ComfyUI_00001_.png``."""
        stem = self.stem.replace("%batch_num%", str(index))
        return f"{stem}_{self.counter + index:05}_{suffix}"


def find_comfyui_folder() -> Path | None:
    """Returns the ComfyUI folder whose ``custom_nodes`` this pack sits in, or None."""
    pack = Path(__file__).absolute().parents[1]
    return pack.parents[1] if pack.parent.name == "custom_nodes" else None


def read_extra_folders(file: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """Reads ComfyUI's ``extra_model_paths.yaml``: folder kind → folders before and behind the usual ones.

    Source: ``load_extra_path_config`` of ComfyUI's ``utils/extra_config.py``, with which it agrees.

    Args:
        file: need not exist.

    Raises:
        ValueError: it is no YAML, or not such a file.
    """
    if not file.is_file():
        return {}
    import yaml  # huggingface_hub, which diffusers needs, brings it

    found: dict[str, tuple[list[Path], list[Path]]] = {}
    try:
        for section in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).values():
            section = dict(section or {})
            base = Path(os.path.expandvars(os.path.expanduser(section.pop("base_path", ""))))
            is_first = bool(section.pop("is_default", False))
            for kind, lines in section.items():
                folders = [Path(os.path.normpath(file.parent / base / line)) for line in lines.split("\n") if line]
                first, last = found.setdefault(LEGACY_KINDS.get(kind, kind), ([], []))
                if is_first:
                    first[:0] = reversed(folders)  # each goes to the front
                else:
                    last += folders
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{file} is no list of model folders as ComfyUI has it ({text}). Correct it.") from error
    return found


class HeadlessHost:
    """Model folders, devices, progress, interruption and file names, as ComfyUI's modules offer them.

    Args:
        models_dir: default: that of the ComfyUI the pack sits in, else ``./models``. Folders that an
            ``extra_model_paths.yaml`` beside it names are searched as well.
        input_dir: default: that of the ComfyUI the pack sits in, else ``./input``.
        output_dir: default: ``./output``.
        temp_dir: default: ``temp`` in the output folder.
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; default: the best one available.
        on_progress: called with (step, total, preview picture or None) by the node that runs.
    """

    def __init__(
        self,
        *,
        models_dir: str | Path | None = None,
        input_dir: str | Path | None = None,
        output_dir: str | Path | None = None,
        temp_dir: str | Path | None = None,
        device: str | None = None,
        on_progress: ProgressSink | None = None,
    ):
        if device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
            raise ValueError(f"device is {device!r}. Expected cpu, cuda, cuda:0 (or another number) or mps.")
        base = find_comfyui_folder() or Path()
        self.models_dir = Path(models_dir or base / "models").absolute()
        self.input_dir = Path(input_dir or base / "input").absolute()
        self.output_dir = Path(output_dir or "output").absolute()
        self.temp_dir = Path(temp_dir or self.output_dir / "temp").absolute()
        self.on_progress = on_progress
        self._extra_folders = read_extra_folders(self.models_dir.with_name("extra_model_paths.yaml"))
        self._device = device
        self._interrupt = threading.Event()

    def get_folders(self, kind: str) -> list[Path]:
        """Returns the folders searched for a kind of model, existing or not, under ComfyUI's names."""
        kind = LEGACY_KINDS.get(kind, kind)
        _check_relative(kind, "folder kind")
        own = [self.models_dir / name for name in FOLDER_NAMES.get(kind, (kind,))]
        first, last = self._extra_folders.get(kind, ((), ()))
        return list(dict.fromkeys([*first, *own, *last]))

    def list_files(self, kind: str) -> list[str]:
        """Returns the files of a kind of model, relative posix names, sorted.

        Only model files where ComfyUI filters by suffix; every file of a kind that ComfyUI does not know.
        """
        is_filtered = LEGACY_KINDS.get(kind, kind) in FILTERED_KINDS
        names = set()
        for folder in self.get_folders(kind):
            for parent, subfolders, files in os.walk(folder, followlinks=True):
                subfolders[:] = [name for name in subfolders if name != ".git"]
                for file in files:
                    if not is_filtered or Path(file).suffix.lower() in MODEL_SUFFIXES:
                        names.add((Path(parent) / file).relative_to(folder).as_posix())
        return sorted(names)

    def resolve_file(self, kind: str, name: str) -> Path:
        """Returns the path of a model file or model folder.

        Raises:
            ValueError: the name is empty, absolute or leads out of the folder.
            FileNotFoundError: none of the kind's folders holds it.
        """
        relative = _check_relative(name, f"name of a file in {kind}")
        folders = self.get_folders(kind)
        for folder in folders:
            if (folder / relative).exists():
                return folder / relative
        searched = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(f"{name!r} was not found. Searched: {searched}. Put the file there, or name another.")

    def resolve_upload(self, name: str, folder: Path | None = None) -> Path:
        """Returns the path that a file widget such as LoadImage's means, existing or not.

        Args:
            name: relative to `folder` (default: the input folder), unless it ends with ``[input]``,
                ``[output]`` or ``[temp]``.

        Raises:
            ValueError: the name is empty, absolute or leads out of the folder.
        """
        base = folder or self.input_dir
        annotated = re.fullmatch(r"(.*?) ?\[(input|output|temp)\]", name, re.DOTALL)
        if annotated:
            name = annotated[1]
            base = {"input": self.input_dir, "output": self.output_dir, "temp": self.temp_dir}[annotated[2]]
        return base / _check_relative(name, "file name")

    def get_save_path(self, prefix: str, folder: Path, width: int = 0, height: int = 0) -> SavePath:
        """Returns where the next file with this prefix goes, and makes that folder.

        Args:
            prefix: a file name without suffix, with subfolders if it has slashes. ``%width%``, ``%height%``
                (pixels), ``%year%``, ``%month%``, ``%day%``, ``%hour%``, ``%minute%`` and ``%second%`` are
                replaced.
            folder: the output or temp folder, which the result never leaves.

        Raises:
            ValueError: the prefix leads out of the folder, or names no file.
        """
        now = time.localtime()
        values = {"width": width, "height": height, "year": now.tm_year}
        short = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min}
        for name, value in {**values, **short, "second": now.tm_sec}.items():
            text = str(value) if name in values else f"{value:02}"
            prefix = prefix.replace(f"%{name}%", text)
        relative = _check_relative(os.path.normpath(prefix.replace("\\", "/")), "filename_prefix")
        target = folder / relative.parent
        target.mkdir(parents=True, exist_ok=True)
        series = re.escape(relative.name).replace("%batch_num%", r"\d+")
        taken = re.compile(rf"{series}_(\d+)_", re.IGNORECASE if os.name == "nt" else 0)
        numbers = [int(found[1]) for found in map(taken.match, os.listdir(target)) if found]
        subfolder = "" if relative.parent == PurePosixPath() else relative.parent.as_posix()
        return SavePath(folder=target, stem=relative.name, counter=max(numbers, default=0) + 1, subfolder=subfolder)

    def check_output_dir(self) -> None:
        """Raises OSError when the output folder cannot be made or written to. Leaves nothing behind."""
        for folder in (self.output_dir, self.temp_dir):
            existing = folder
            while not existing.exists() and existing != existing.parent:
                existing = existing.parent
            if not existing.is_dir():
                raise NotADirectoryError(f"{existing} is a file, not a folder")
            probe = existing / f".kolors-write-test-{os.getpid()}"
            probe.touch()
            probe.unlink()

    def get_device(self) -> str:
        """Returns the device to compute on: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

        Raises:
            ValueError: the device that was asked for is not there.
        """
        import torch

        available = ["cpu"]
        if torch.cuda.is_available():
            available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            available.append("mps")
        if self._device is None:
            return next(name for name in ("cuda", "mps", "cpu") if name in available)
        if self._device not in available:
            raise ValueError(f"device is {self._device}, which torch cannot use here. Choose from {available}.")
        return self._device

    def report_progress(self, step: int, total: int, preview: Any = None) -> None:
        """Tells how far the running node is.

        Args:
            step: steps done.
            total: steps in all.
            preview: a PIL picture of the result so far, or None.
        """
        if self.on_progress is not None:
            self.on_progress(step, total, preview)

    def interrupt(self) -> None:
        """Asks the run to stop. May be called from another thread or a signal handler."""
        self._interrupt.set()

    def clear_interrupt(self) -> None:
        """Forgets an interrupt that no run has answered."""
        self._interrupt.clear()

    def raise_if_interrupted(self) -> None:
        """Raises Interrupted, once, when `interrupt` was called."""
        if self._interrupt.is_set():
            self._interrupt.clear()
            raise Interrupted("The run was interrupted.")


def _check_relative(name: str, what: str) -> PurePosixPath:
    """Returns a name as a relative path; both slashes separate, so that files saved on Windows open here."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.name or re.match(r"[A-Za-z]:", str(path)) or "\0" in name:
        raise ValueError(f"{what} is {name!r}, which is outside its folder or empty. Give a relative name inside it.")
    return path


_running_host: ContextVar[HeadlessHost | None] = ContextVar("kolors_running_host", default=None)


def get_running_host() -> HeadlessHost | None:
    """Returns the host of the run in progress, or None when no graph is being validated or executed."""
    return _running_host.get()


@contextmanager
def use_host(host: HeadlessHost) -> Iterator[HeadlessHost]:
    """Makes `host` the running host inside the block."""
    token = _running_host.set(host)
    try:
        yield host
    finally:
        _running_host.reset(token)
