"""Fetching Kolors: which files a model needs, which of them lack, and how they arrive whole or not at all.

A file is written to ``.fetching/<name>.<checksum>.part`` in its folder, compared with the size and the checksum that
the hub publishes, flushed, and renamed. The part's name says what it will be, so it is continued from either hub.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import struct
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

from .hubs import Hub, HubError, HubUnreachable, HuggingFace, ModelScope, RemoteFile, is_offline

if TYPE_CHECKING:
    from .checkpoint import OnProgress

PARTS = ("unet", "text_encoder", "vae")
SOURCES = ("auto", "huggingface", "modelscope")
VAE_FILE = "sdxl.vae.safetensors"  # the name in tutorials' workflows
# Names under models/diffusers that people and other packs give the model, the preferred one first.
FOLDER_NAMES = ("Kolors", "Kolors-diffusers", "Kwai-Kolors/Kolors", "Kwai-Kolors/Kolors-diffusers")
SIZES: Mapping[str, str] = MappingProxyType(
    {"unet": "5 GB", "text_encoder": "12 GB", "vae": "0.3 GB", "tokenizer": "1 MB"}
)

_HUBS: tuple[type[Hub], ...] = (HuggingFace, ModelScope)
_KOLORS, _DIFFUSERS = "Kwai-Kolors/Kolors", "Kwai-Kolors/Kolors-diffusers"
# Part → hub → repositories, the preferred one first. The text encoder is in safetensors only in the second.
_REPOSITORIES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "unet": {hub.name: (_KOLORS, _DIFFUSERS) for hub in _HUBS},
        "text_encoder": {hub.name: (_DIFFUSERS, _KOLORS) for hub in _HUBS},
        "tokenizer": {hub.name: (_DIFFUSERS, _KOLORS) for hub in _HUBS},
        "vae": {"huggingface": ("madebyollin/sdxl-vae-fp16-fix",), "modelscope": ("AI-ModelScope/sdxl-vae-fp16-fix",)},
    }
)
_VAE_NAMES = (VAE_FILE, "sdxl_vae.safetensors", "diffusion_pytorch_model.safetensors")
_TOKENIZERS = ("tokenizer/tokenizer.model", "text_encoder/tokenizer.model")
# Part → stems of weight files in a repository, with the kind of file; the preferred first.
_WEIGHTS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "unet": (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
        "text_encoder": (("model", "safetensors"), ("pytorch_model", "bin")),
    }
)
_VARIANTS = (".fp16", "")

_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before a request is made again; as many failures without a byte end it
_INTERVAL = 0.5  # seconds between two reports of progress
_WINDOW = 5.0  # seconds that the speed is an average of
_SPARE = 2**26  # bytes that shall stay free on a disk
_WORK_FOLDER = ".fetching"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}

logger = logging.getLogger(__name__)


class DownloadError(RuntimeError):
    """A download that cannot start or go on. The message says which file, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class _Item:
    """A file of a repository and the path that it shall have."""

    file: RemoteFile
    path: Path
    hub: Hub
    part: str

    @property
    def unfinished(self) -> Path:
        mark = (self.file.checksum or "unknown")[:12]
        return self.path.parent / _WORK_FOLDER / f"{self.path.name}.{mark}.part"


def choose_folder(roots: Sequence[Path], part: str) -> Path:
    """Gives the folder that has a part of Kolors, else the one that has most of it, else where it would go.

    Args:
        roots: ComfyUI's folders for ``diffusers``, those for ``vae`` if that is the part; the preferred one first.
        part: as in ``find_missing``.
    """
    folders = roots if part == "vae" else [root / name for root in roots for name in FOLDER_NAMES]
    return min(folders, key=lambda folder: len(find_missing(folder, part)))


def find_missing(folder: Path, part: str) -> list[str]:
    """Names the files of a part that lack, or are there in part only; nothing is read but their ends.

    Args:
        folder: of the whole model, with a sub-folder for the part; for ``vae`` the folder of VAE files.
        part: one of ``PARTS``, or ``tokenizer``, which the text encoder includes.

    Returns:
        Names relative to the folder; empty for a part that is whole.
    """
    if part == "vae":
        return [] if is_whole(folder / VAE_FILE) else [VAE_FILE]
    lacks_tokenizer = not any(is_whole(folder / name) for name in (*_TOKENIZERS, "tokenizer.model"))
    if part == "tokenizer":
        return [_TOKENIZERS[0]] if lacks_tokenizer else []
    missing = [] if _is_json(folder / part / "config.json") else [f"{part}/config.json"]
    missing += [f"{part}/{name}" for name in _find_missing_weights(folder / part, part)]
    if part == "text_encoder" and lacks_tokenizer:
        missing.append(_TOKENIZERS[0])
    return missing


def _find_missing_weights(folder: Path, part: str) -> list[str]:
    stem, suffix = _WEIGHTS[part][0]
    nominal = [f"{stem}.fp16.{suffix}"]
    if not folder.is_dir():
        return nominal
    from .checkpoint import CheckpointError, find_weight_files

    try:
        return [file.name for file in find_weight_files(folder) if not is_whole(file)]
    except CheckpointError:
        pass
    there = {path.name for path in folder.iterdir()}
    for index in sorted(folder.glob("*.index*.json")):
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError):
            listed = {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            if listed - there:
                return sorted(listed - there)
    for shard in sorted(there):
        if found := re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})(.+)", shard):
            start, _, count, end = found.groups()
            return [name for i in range(int(count)) if (name := f"{start}{i + 1:05}-of-{count}{end}") not in there]
    return nominal


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def is_whole(path: Path) -> bool:
    """Tells whether a weight file ends where its beginning says, which an interrupted copy does not."""
    try:
        with path.open("rb") as file:
            if path.suffix in (".safetensors", ".sft"):
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 2**25)))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                return 8 + length + max(ends, default=0) == path.stat().st_size
            return bool(beginning := file.read(2)) and (beginning != b"PK" or zipfile.is_zipfile(path))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return False


def download(
    folders: Mapping[str, Path],
    *,
    source: str = "auto",
    verify: bool = True,
    on_progress: OnProgress | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Fetches the parts of Kolors that lack, each file whole, verified by size and checksum, or not at all.

    Args:
        folders: part → folder, as in ``find_missing``. A part that is whole in another form is kept.
        source: one of ``SOURCES``. ``auto`` takes the first that answers, and goes on with the next where one stops.
        verify: compares the weight files that are there already with the published checksums too.
        on_progress: called twice a second with bytes done, bytes in all and a line of text. May raise to
            stop; what has arrived stays, and the next call goes on from there.
        on_line: called with a line of text for the source that is used and for each file that is done.

    Returns:
        The source that was used.

    Raises:
        DownloadError: no source answers, a file is not what is published, or it cannot be written.
        ValueError: no such part or source.
    """
    if source not in SOURCES or not set(folders) <= set(_REPOSITORIES):
        raise ValueError(
            f"No source {source!r} or parts {sorted(folders)}. Sources: {SOURCES}, parts: {tuple(_REPOSITORIES)}."
        )
    if is_offline():
        raise DownloadError("HF_HUB_OFFLINE is set, so nothing is downloaded. Unset it to allow the network.")
    hubs = [hub() for hub in _HUBS if source in ("auto", hub.name)]
    for hub in hubs:
        try:
            _download_from(hub, folders, verify, _Meter(on_progress), on_line)
            return hub.name
        except HubUnreachable as error:
            if hub is hubs[-1]:
                raise DownloadError(
                    f"{error} Check the connection. HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror of Hugging Face."
                ) from error
            logger.warning("%s Trying the next source.", error)
        except HubError as error:
            raise DownloadError(str(error)) from error
    raise AssertionError("every hub serves or raises")


def _download_from(
    hub: Hub, folders: Mapping[str, Path], verify: bool, meter: _Meter, on_line: Callable[[str], None] | None
) -> None:
    items = [item for part, folder in folders.items() for item in _list_items(hub, part, folder)]
    _tell(f"Source: {hub}.", on_line)
    to_fetch, to_verify = _sort(items, folders, verify)
    _check_space(to_fetch)
    meter.total = sum(item.file.size for item in (*to_fetch, *to_verify))
    for item in to_verify:
        _verify(item, meter)
    for item in to_fetch:
        _tell(_fetch(item, meter), on_line)
    missing = [str(folder / name) for part, folder in folders.items() for name in find_missing(folder, part)]
    if missing:
        raise HubError(f"{hub} has not all that is needed: {', '.join(missing)} is still missing.")


def _tell(line: str, on_line: Callable[[str], None] | None) -> None:
    logger.info("%s", line)
    if on_line:
        on_line(line)


def _list_items(hub: Hub, part: str, folder: Path) -> list[_Item]:
    """Gives a part's files from the first of the hub's repositories that has them all."""
    failures: list[HubError] = []
    for repository in _REPOSITORIES[part][hub.name]:
        try:
            chosen = choose_files(part, hub.list_files(repository), f"{repository} on {hub}")
        except HubUnreachable:
            raise
        except HubError as error:
            failures.append(error)
        else:
            return [_Item(file=file, path=folder / name, hub=hub, part=part) for name, file in chosen.items()]
    raise failures[0]


def choose_files(part: str, listed: Mapping[str, RemoteFile], place: str) -> dict[str, RemoteFile]:
    """Chooses what is needed from a repository: name relative to the model's folder → file.

    Only names that are looked for are used, so that no listing can lead out of the folder.

    Raises:
        HubError: one is missing; names it and the place.
    """
    if part == "vae":
        name = _get_first(_VAE_NAMES, listed, place)
        return {VAE_FILE: listed[name]}
    if part == "tokenizer":
        name = _get_first(_TOKENIZERS, listed, place)
        return {name: listed[name]}
    names = [f"{part}/config.json", *_choose_weights(part, listed, place)]
    if part == "text_encoder":
        names.append(_get_first(_TOKENIZERS, listed, place))
    _get_first(names[:1], listed, place)
    return {name: listed[name] for name in names}


def _get_first(names: Sequence[str], listed: Mapping[str, RemoteFile], place: str) -> str:
    for name in names:
        if name in listed:
            return name
    raise HubError(f"{place} holds no {names[0]}. Try the other source.")


def _choose_weights(part: str, listed: Mapping[str, RemoteFile], place: str) -> list[str]:
    """Names one complete set of weight files: half precision first, safetensors before pickles."""
    incomplete = ""
    for stem, suffix in _WEIGHTS[part]:
        for variant in _VARIANTS:
            single = f"{part}/{stem}{variant}.{suffix}"
            if single in listed:
                return [single]
            tag = re.escape(variant)
            number = r"-\d{5}-of-\d{5}"
            pattern = re.compile(rf"{part}/{stem}({tag}{number}|{number}{tag})\.{suffix}")
            shards = sorted(name for name in listed if pattern.fullmatch(name))
            if not shards:
                continue
            count = int(re.findall(r"-of-(\d{5})", shards[0])[0])
            if len(shards) == count:
                indices = (f"{stem}{variant}.{suffix}.index.json", f"{stem}.{suffix}.index{variant}.json")
                return [*shards, *(name for index in dict.fromkeys(indices) if (name := f"{part}/{index}") in listed)]
            incomplete = f" It has {len(shards)} of {count} shards: {', '.join(shards)}."
    stem, suffix = _WEIGHTS[part][0]
    raise HubError(
        f"{place} holds no {part}/{stem}.fp16.{suffix}, nor other weights.{incomplete} Try the other source."
    )


def _sort(items: list[_Item], folders: Mapping[str, Path], verify: bool) -> tuple[list[_Item], list[_Item]]:
    """Sorts files into those to fetch and those to verify. What serves already, in whatever form, is kept."""
    missing = {part: find_missing(folder, part) for part, folder in folders.items()}
    to_fetch = [item for item in items if not _serves(item, missing[item.part])]
    there = [item for item in items if item not in to_fetch and item.path.is_file()]
    return to_fetch, [item for item in there if verify and item.path.suffix != ".json"]


def _serves(item: _Item, missing: list[str]) -> bool:
    """Tells whether a file, or another in its place, is there: a set of weights under other names, for instance."""
    name = item.path.name
    if name == "config.json":
        return f"{item.part}/{name}" not in missing
    lacking = [other for other in missing if other.endswith(".model") == name.endswith(".model")]
    if not [other for other in lacking if not other.endswith("/config.json")]:
        return True
    if name.endswith(".json"):  # an index of shards: another set's would name files that nobody fetches
        return item.path.is_file() and item.path.stat().st_size == item.file.size
    return is_whole(item.path)


def _check_space(items: Iterable[_Item]) -> None:
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for item in items:
        place = next(folder for folder in item.path.absolute().parents if folder.is_dir())
        device = place.stat().st_dev
        arrived = item.unfinished.stat().st_size if item.unfinished.is_file() else 0
        needed[device] = needed.get(device, 0) + max(0, item.file.size - arrived)
        places[device] = place
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if size + _SPARE > free:
            raise DownloadError(
                f"The disk of {places[device]} has {format_size(free)} free, the download needs {format_size(size)}. "
                "Make room, or choose a folder on another disk."
            )


def _verify(item: _Item, meter: _Meter) -> None:
    """Compares a file that is there with what is published.

    Raises:
        DownloadError: it differs. It is not touched: it may be damaged, or the user's own.
    """
    meter.start(f"Checking {item.path.name}", item.file.size)
    digest = item.file.start_checksum()
    size = item.path.stat().st_size
    if size == item.file.size:
        with item.path.open("rb") as file:
            for chunk in iter(lambda: file.read(2**20), b""):
                digest.update(chunk)
                meter.add(len(chunk))
    if size != item.file.size or item.file.checksum not in (None, digest.hexdigest()):
        raise DownloadError(
            f"{item.path} is not the published {item.file.path} of {format_size(item.file.size)}: it is damaged, or a "
            "version of your own. Delete or rename it and run the same again, or leave it and fetch the other parts."
        )


def _fetch(item: _Item, meter: _Meter) -> str:
    """Brings one file, verified, to its place, and gives a line that says so."""
    started = time.monotonic()
    meter.start(item.path.name, item.file.size)
    work = item.unfinished.parent
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _lock(work / f"{item.path.name}.lock", meter):
            if item.path.is_file() and item.path.stat().st_size == item.file.size and is_whole(item.path):
                meter.add(item.file.size, arrived=False)
                line = f"{item.path.name}: another process has fetched it meanwhile."
            else:
                _remove_other_parts(item)
                _transfer_verified(item, meter)
                os.replace(item.unfinished, item.path)
                _flush_folder(item.path.parent)
                taken = _format_time(time.monotonic() - started)
                verified = "" if item.file.checksum else ", by its size only: the hub gives no checksum"
                line = f"{item.path}: {format_size(item.file.size)} in {taken}, verified{verified}."
    except OSError as error:
        raise _explain_write_error(error, item) from error
    with suppress(OSError):  # others may be at work in there
        (work / f"{item.path.name}.lock").unlink(missing_ok=True)
        work.rmdir()
    return line


def _explain_write_error(error: OSError, item: _Item) -> DownloadError:
    if error.errno in _NO_SPACE:
        return DownloadError(
            f"The disk is full: {item.path} needs {format_size(item.file.size)}. What has arrived is kept; make room "
            "and run the same again, it goes on from there."
        )
    return DownloadError(f"{item.path} cannot be written ({error.strerror or error}). Check the folder's permissions.")


def _transfer_verified(item: _Item, meter: _Meter) -> None:
    """Fills the part until it is the published file. What does not fit is thrown away and fetched once more."""
    for attempt in (1, 2):
        with item.unfinished.open("a+b") as part:
            checksum = _transfer(item, part, meter)
            part.flush()
            os.fsync(part.fileno())
        if item.file.checksum in (None, checksum):
            return
        item.unfinished.unlink()
        meter.rewind()
        if attempt == 1:
            logger.warning("%s arrived damaged (checksum %s). Fetching it again.", item.path.name, checksum)
    raise DownloadError(
        f"{item.file.path} from {item.hub} arrives damaged: its checksum is {checksum}, published is "
        f"{item.file.checksum}. Nothing of it was kept. Try the other source, or another network."
    )


def _transfer(item: _Item, part: BinaryIO, meter: _Meter) -> str:
    """Appends to a part until it has the published size, over broken connections, and gives its checksum."""
    digest = item.file.start_checksum()
    part.seek(0)
    while part.tell() < item.file.size and (chunk := part.read(2**20)):
        digest.update(chunk)
        meter.add(len(chunk), arrived=False)
    if part.tell() > item.file.size or part.read(1):
        digest = _restart(item, part, meter)
    failures = best = 0
    while (have := part.tell()) < item.file.size:
        best = max(best, have)
        reason = "the connection broke off."
        try:
            for position, chunk in item.hub.read(item.file, have):
                if position != part.tell():  # the server cannot begin in the middle
                    digest = _restart(item, part, meter)
                part.write(chunk)
                digest.update(chunk)
                meter.add(len(chunk))
        except HubUnreachable as error:
            reason = str(error)
        if part.tell() >= item.file.size:
            break
        failures = failures + 1 if part.tell() <= best else 0
        if failures > len(_PAUSES):
            part.flush()
            raise HubUnreachable(
                f"{item.path.name} from {item.hub}: {reason} {format_size(part.tell())} of "
                f"{format_size(item.file.size)} have arrived and are kept; run the same again, it goes on from there."
            )
        logger.info("%s: %s Going on from byte %d.", item.path.name, reason, part.tell())
        meter.wait(_PAUSES[max(0, failures - 1)])
    return digest.hexdigest()


def _restart(item: _Item, part: BinaryIO, meter: _Meter) -> Any:
    meter.rewind()
    part.seek(0)
    part.truncate()
    return item.file.start_checksum()


def _remove_other_parts(item: _Item) -> None:
    """Removes parts of other versions, which nobody would complete, and one of which nobody knows the version."""
    for other in item.unfinished.parent.glob("*.part"):
        is_ours = other == item.unfinished and item.file.checksum
        if other.name.rsplit(".", 2)[0] == item.path.name and not is_ours:
            other.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _lock(path: Path, meter: _Meter) -> Iterator[None]:
    """Lets one process at a time fetch a file. A killed one's lock is free. Where there are no locks, none is held.

    Two processes without a lock would spoil each other's part, which its checksum then shows.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0.2)
        except Timeout:
            meter.report("another process is fetching it, waiting")
        except FileNotFoundError:  # that process has just cleaned up
            path.parent.mkdir(parents=True, exist_ok=True)
        except NotImplementedError:
            logger.warning("The file system of %s knows no locks: let only one process fetch models.", path.parent)
            break
        else:
            break
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Meter:
    """Counts bytes and says how far it is.

    Attributes:
        on_progress: as in ``download``.
        total: bytes to do in all.
    """

    on_progress: OnProgress | None
    total: int = 0
    done: int = 0
    name: str = ""
    file_size: int = 0
    file_start: int = 0
    reported: float = 0.0
    arrivals: deque[tuple[float, int]] = field(default_factory=deque)

    def start(self, name: str, size: int) -> None:
        """Begins with a file."""
        self.name, self.file_size, self.file_start = name, size, self.done
        self.report("")

    def rewind(self) -> None:
        """Takes back what was counted of this file."""
        self.done = self.file_start

    def add(self, count: int, *, arrived: bool = True) -> None:
        """Counts bytes; those that have not ``arrived`` now count for no speed."""
        self.done += count
        now = time.monotonic()
        if arrived:
            self.arrivals.append((now, count))
        while self.arrivals and self.arrivals[0][0] < now - _WINDOW:
            self.arrivals.popleft()
        if now - self.reported >= _INTERVAL or self.done >= self.total:
            self.report(self._describe_speed(now))

    def report(self, text: str) -> None:
        """Says how far it is."""
        self.reported = time.monotonic()
        if not self.on_progress:
            return
        of_file = self.done - self.file_start
        line = f"{self.name}: {of_file / max(1, self.file_size):.0%} of {format_size(self.file_size)}"
        self.on_progress(self.done, max(1, self.total), f"{line}, {text}" if text else line)

    def wait(self, seconds: float) -> None:
        """Waits, and can be stopped as any work."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.report(f"waiting {left:.0f} s for the connection")
            time.sleep(min(0.2, left))

    def _describe_speed(self, now: float) -> str:
        span = now - self.arrivals[0][0] if self.arrivals else 0.0
        if span < 0.5:
            return ""  # too short to tell
        speed = sum(count for _, count in self.arrivals) / span
        return f"{speed / 1e6:.1f} MB/s, {_format_time((self.total - self.done) / speed)} left"


def format_size(size: int) -> str:
    """Gives a number of bytes for a reader, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
