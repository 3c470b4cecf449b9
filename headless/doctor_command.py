"""The command ``kolors doctor``: what is installed, what is on the disk, and what fits into memory."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .host import MODEL_SUFFIXES, HeadlessHost, use_host

if TYPE_CHECKING:
    from ..kolors.identify import FileKind
    from ..kolors.inventory import Finding

READY, NOT_READY, INVALID = 0, 1, 2
PARTS = ("unet", "text_encoder", "vae")
_ROOT = Path(__file__).parents[1]
_OPTIONAL = ("bitsandbytes", "transformers", "huggingface_hub", "comfyui-frontend-package")
# Folder kind → the part that is read from its single files. Kolors' files elsewhere are misplaced.
_SINGLE_FILES = {"diffusion_models": "unet", "LLM": "text_encoder", "text_encoders": "text_encoder", "vae": "vae"}
_OTHER_FOLDERS = ("checkpoints",)
# What is computed beside the weights, in bytes, measured or estimated: half precision, one picture of 1024x1024 with
# guidance; the text encoder's rows and the one layer that is dequantised at a time.
_WORK = {"unet": 1_000_000_000, "text_encoder": 400_000_000}


@dataclass
class Report:
    """What the doctor found.

    Attributes:
        packages: name → version, or why it will not do.
        faults: packages that are missing or too old, by name.
        device: name, bytes in all and bytes free of what computes.
        folders: the model folders' parent, and the bytes free on its disk.
        findings: weights on the disk, whole or not.
        misplaced: path → what it is and where it belongs.
        tokenizer: its path, or an empty text.
        command: fetches what is missing.
        weights: part → choice → bytes on the device: a precision, or ``blocks`` for a UNet that is offloaded.
    """

    packages: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    misplaced: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    command: str = ""
    weights: dict[str, dict[str, int]] = field(default_factory=dict)

    def list_whole(self, part: str) -> list[Finding]:
        """Gives what can be loaded as a part."""
        return [finding for finding in self.findings if finding.part == part and not finding.problem]

    def list_missing(self) -> list[str]:
        """Gives the parts of which nothing whole is there."""
        missing = [part for part in PARTS if not self.list_whole(part)]
        return missing if self.tokenizer or "text_encoder" in missing else [*missing, "text_encoder"]

    def fits(self, part: str, choice: str) -> bool:
        """Tells whether a part, with what it computes, fits into the device's free memory."""
        return self.weights[part][choice] + _WORK[part] <= self.device["free"]

    def list_obstacles(self) -> list[str]:
        """Says what stands between now and a picture; nothing if there is nothing."""
        obstacles = [f"{name}: {self.packages[name]}" for name in self.faults]
        obstacles += [f"no whole {part}" for part in PARTS if not self.list_whole(part)]
        obstacles += [] if self.tokenizer else ["no tokenizer.model"]
        for part, sizes in self.weights.items():
            if not any(self.fits(part, choice) for choice in sizes):
                obstacles.append(f"no {part} fits into {_format(self.device['free'])} of free memory")
        return obstacles


def add_doctor_command(commands: Any) -> None:
    """Adds the command to the command line's subparsers."""
    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what of Kolors is on the disk, and what fits into memory",
        description="Says what is installed, what of Kolors is found where, what is missing or broken, and how much "
        "memory each choice takes. Exit status: 0 Kolors can draw a picture here, 1 it cannot, 2 wrong arguments.",
    )
    doctor.add_argument("--models-dir", metavar="DIR", help="model folders as ComfyUI has them (default: ./models)")
    doctor.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(handler=run_doctor)


def run_doctor(options: argparse.Namespace, out: TextIO) -> int:
    """The command ``kolors doctor``. Returns the exit status."""
    from .command import show_log

    try:
        with show_log(sys.stderr, is_verbose=False):
            report = examine(HeadlessHost(models_dir=options.models_dir, device=options.device))
    except ValueError as error:  # a device that torch does not know or have
        print(json.dumps({"can_draw": False, "error": str(error)}) if options.json else f"error: {error}",
              file=out if options.json else sys.stderr)  # fmt: skip
        return INVALID
    obstacles = report.list_obstacles()
    if options.json:
        print(json.dumps(to_json(report, obstacles), indent=1), file=out)
    else:
        print("\n".join(iterate_lines(report, obstacles)), file=out)
    return NOT_READY if obstacles else READY


def examine(host: HeadlessHost) -> Report:
    """Looks at everything. What needs a package that lacks is left out."""
    report = Report()
    _examine_packages(report)
    free_disk = shutil.disk_usage(next(path for path in (host.models_dir, *host.models_dir.parents) if path.exists()))
    report.folders = {"models_dir": str(host.models_dir), "disk_free": free_disk.free}
    if {"torch", "diffusers", "safetensors"} & set(report.faults):
        return report
    with use_host(host):
        report.device = get_device(host.get_device())
        _examine_folders(report, host)
        _examine_single_files(report, host)
        _examine_tokenizer(report, host)
        if missing := report.list_missing():
            report.command = _get_command(host, missing)
    report.weights = get_weights(report.device["device"])
    return report


def _examine_packages(report: Report) -> None:
    needed = {"torch": ""}
    for line in (_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, _, lowest = line.strip().partition(">=")
        needed[name] = lowest
    for name, lowest in needed.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            report.packages[name] = f"missing: pip install -r {_ROOT / 'requirements.txt'}"
            report.faults.append(name)
            continue
        report.packages[name] = version
        if _to_numbers(version) < _to_numbers(lowest):
            report.packages[name] = f"{version}, but {lowest} is needed: pip install -U {name}"
            report.faults.append(name)
    for name in _OPTIONAL:
        try:
            report.packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _to_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def get_device(name: str) -> dict[str, Any]:
    """Gives the name of a device, and the bytes of its memory in all and free."""
    import torch

    if name.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(name)
        return {"device": name, "name": torch.cuda.get_device_name(name), "total": total, "free": free}
    import psutil  # accelerate, which the pack needs, brings it

    memory = psutil.virtual_memory()
    text = f"{os.cpu_count()} cores" if name == "cpu" else "shared memory"
    return {"device": name, "name": text, "total": memory.total, "free": memory.available}


def _examine_folders(report: Report, host: HeadlessHost) -> None:
    """Looks at the model in the diffusers layout; one that is not there at all is no finding."""
    from ..kolors.inventory import Finding, inspect_part
    from ..nodes.host import RunnerHost
    from ..nodes.models import DEMO, KOLORS, list_vae_folders, locate_model

    services = RunnerHost(host)
    for part in ("unet", "text_encoder"):
        folder = locate_model(services, KOLORS, part) / part
        if folder.is_dir():
            finding = inspect_part(folder, part)
            missing = [] if finding.problem else _find_missing_files(folder, part)
            if missing:
                finding = Finding(path=folder, part=part, problem=f"{folder} lacks {', '.join(missing)}.")
            report.findings.append(finding)
    for name, folder in list_vae_folders(services).items():
        if name != DEMO:
            report.findings.append(inspect_part(folder, "vae"))


def _get_command(host: HeadlessHost, parts: list[str]) -> str:
    from ..nodes.host import RunnerHost
    from ..nodes.models import KOLORS, get_command, locate_model

    return get_command(locate_model(RunnerHost(host), KOLORS, "unet"), ",".join(parts))


def _find_missing_files(folder: Path, part: str) -> list[str]:
    from ..kolors.download import find_missing

    return [name for name in find_missing(folder.parent, part) if not name.endswith("tokenizer.model")]


def _examine_single_files(report: Report, host: HeadlessHost) -> None:
    from ..kolors.checkpoint import CheckpointError
    from ..kolors.identify import PART_KINDS, describe_home, identify
    from ..kolors.inventory import Finding, inspect_part

    folders = {finding.path for finding in report.findings}
    for folder_kind in (*_SINGLE_FILES, *_OTHER_FOLDERS):
        part = _SINGLE_FILES.get(folder_kind)
        for path in _iterate_files(host, folder_kind):
            if path.parent in folders:  # a clone of the model serves as models/unet and models/vae too
                continue
            try:
                kind = identify(path)
            except CheckpointError as error:
                report.findings.append(Finding(path=path, part=part or "unet", problem=str(error)))
                continue
            if part and kind in PART_KINDS[part]:
                report.findings.append(inspect_part(path, part))
            elif _is_misplaced(kind):
                report.misplaced[str(path)] = f"{kind.value}; it {describe_home(kind)}"


def _iterate_files(host: HeadlessHost, folder_kind: str) -> Iterator[Path]:
    """Yields the weight files of a folder kind; of shards the folder. Pickles only where Kolors' are published so."""
    from ..nodes.loaders import get_shard_number

    for name in host.list_files(folder_kind):
        suffixes = MODEL_SUFFIXES if folder_kind == "LLM" else {".safetensors", ".sft"}
        if Path(name).suffix.lower() in suffixes:
            path = host.resolve_file(folder_kind, name)
            shard = get_shard_number(path.name)  # 0: a file of its own
            if shard <= 1:
                yield path.parent if shard else path


def _is_misplaced(kind: FileKind) -> bool:
    """Tells whether a file that is none of its folder's is Kolors', or a VAE."""
    from ..kolors.identify import TEXT_ENCODERS, FileKind

    return kind is FileKind.VAE or kind in TEXT_ENCODERS or "KOLORS" in kind.name


def _examine_tokenizer(report: Report, host: HeadlessHost) -> None:
    from ..kolors.checkpoint import CheckpointError
    from ..kolors.text_encoder import find_tokenizer
    from ..nodes.host import RunnerHost
    from ..nodes.models import KOLORS, locate_model

    beside = [finding.path.parent / "tokenizer.model" for finding in report.list_whole("text_encoder")]
    there = [path for path in beside if path.is_file()]
    try:
        there.append(find_tokenizer(locate_model(RunnerHost(host), KOLORS, "tokenizer")))
    except CheckpointError:
        pass
    report.tokenizer = str(there[0]) if there else ""


def get_weights(device: str) -> dict[str, dict[str, int]]:
    """Gives the bytes of weights that lie on the device: part → choice → bytes."""
    from ..kolors.precision import TEXT_PRECISIONS, UNET_PRECISIONS
    from ..kolors.sizes import get_streamed_bytes, get_weight_bytes

    sizes = {
        "unet": {name: get_weight_bytes("unet", name, _get_kind(device)) for name in UNET_PRECISIONS},
        "text_encoder": {name: get_weight_bytes("text_encoder", name, _get_kind(device)) for name in TEXT_PRECISIONS},
    }
    if device != "cpu":
        sizes["unet"]["blocks"] = get_streamed_bytes()
    return sizes


def _get_kind(device: str) -> str:
    return device.partition(":")[0]


def to_json(report: Report, obstacles: list[str]) -> dict[str, Any]:
    """Gives the report as plain values."""
    findings = [
        {**vars(finding), "path": str(finding.path), "kind": finding.kind.name if finding.kind else None}
        for finding in report.findings
    ]
    fitting = {
        part: {name: report.fits(part, name) for name in sizes} for part, sizes in report.weights.items()
    }  # fmt: skip
    return {
        "can_draw": not obstacles,
        "obstacles": obstacles,
        "python": platform.python_version(),
        "packages": report.packages,
        "device": report.device,
        "folders": report.folders,
        "findings": findings,
        "misplaced": report.misplaced,
        "tokenizer": report.tokenizer,
        "command": report.command,
        "weight_bytes": report.weights,
        "fits": fitting,
    }


def iterate_lines(report: Report, obstacles: list[str]) -> Iterator[str]:
    """Yields the report for a reader, a screen long."""
    packages = ", ".join(f"{name} {version}" for name, version in report.packages.items() if name not in report.faults)
    yield f"Python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"packages      {packages}"
    for name in report.faults:
        yield f"              {name} {report.packages[name]}"
    if report.device:
        free, total = _format(report.device["free"]), _format(report.device["total"])
        yield f"device        {report.device['device']} ({report.device['name']}), {free} of {total} free"
    disk = _format(report.folders["disk_free"])
    yield f"models        {report.folders['models_dir']} ({disk} free on the disk)"
    yield ""
    yield from _iterate_findings(report)
    if report.weights:
        yield ""
        yield from _iterate_memory(report)
    yield ""
    yield f"Kolors cannot draw here: {'; '.join(obstacles)}." if obstacles else "Kolors can draw a picture here."
    if obstacles and not report.faults:
        yield "The bundled model can: kolors run --demo WORKFLOW."


def _iterate_findings(report: Report) -> Iterator[str]:
    for part in PARTS:
        findings = [finding for finding in report.findings if finding.part == part]
        for finding in findings:
            if finding.problem:
                yield f"{part:<14}BROKEN  {finding.problem}"
            else:
                form = ", ".join(filter(None, (finding.precision, _format(finding.size))))
                yield f"{part:<14}ok      {finding.path} ({form})"
        if not findings and report.device:
            yield f"{part:<14}missing"
    if report.device:
        yield f"{'tokenizer':<14}{'ok      ' + report.tokenizer if report.tokenizer else 'missing'}"
    for path, text in report.misplaced.items():
        yield f"misplaced     {path} is {text}"
    if report.command:
        yield f"fetch it      {report.command}"


def _iterate_memory(report: Report) -> Iterator[str]:
    yield "Weights on the device; + fits into what is free, with an estimate of what it computes, - does not:"
    for part, sizes in report.weights.items():
        cells = (f"{name} {_format(size)} {'+' if report.fits(part, name) else '-'}" for name, size in sizes.items())
        yield f"{part:<14}{'   '.join(cells)}"
    if report.device["device"] == "cpu":
        yield "              (a CPU holds an fp16 UNet as fp32)"


def _format(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
