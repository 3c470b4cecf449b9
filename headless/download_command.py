"""The command ``kolors download``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

from .host import HeadlessHost

DONE, FAILED = 0, 1


def add_download_command(commands: Any) -> None:
    """Adds the command to the command line's subparsers."""
    from ..kolors.download import PARTS, SOURCES

    command = commands.add_parser(
        "download",
        help="fetch Kolors, or what of it is missing or damaged",
        description="Fetches Kolors (17 GB) into ComfyUI's model folders: what is there already is compared with the "
        "published checksums, what is missing is fetched, and what was begun is continued. HF_ENDPOINT, HF_TOKEN, "
        "MODELSCOPE_API_TOKEN and HTTPS_PROXY are respected. Exit status: 0 all is there and whole, 1 it is not, "
        "2 wrong arguments.",
    )
    command.add_argument(
        "--source",
        choices=SOURCES,
        default="auto",
        help="where from; auto (the default) is huggingface, or modelscope if that cannot be reached",
    )
    command.add_argument(
        "--what",
        metavar="PART[,PART]...",
        type=lambda text: _parse_parts(text, PARTS),
        default=PARTS,
        help=f"which parts: {', '.join(PARTS)} (default: all)",
    )
    command.add_argument("--models-dir", metavar="DIR", help="model folders as ComfyUI has them (default: ./models)")
    command.add_argument("--verbose", action="store_true", help="show log messages")
    command.set_defaults(handler=run_download)


def _parse_parts(text: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in named:
        if name not in parts:
            raise argparse.ArgumentTypeError(f"{name!r} is no part of Kolors. Choose from: {', '.join(parts)}")
    return named


def run_download(options: argparse.Namespace, out: TextIO) -> int:
    """The command ``kolors download``: the source and a line for each file on ``out``. Returns the exit status."""
    from ..kolors.download import DownloadError, choose_folder, download
    from .command import show_log

    host = HeadlessHost(models_dir=options.models_dir)
    roots = {part: host.get_folders("vae" if part == "vae" else "diffusers") for part in options.what}
    folders = {part: choose_folder(roots[part], part) for part in options.what}
    with show_log(sys.stderr, options.verbose), _ProgressLine(sys.stderr) as progress:

        def show_line(line: str) -> None:
            progress.clear()
            print(line, file=out, flush=True)

        try:
            download(folders, source=options.source, on_progress=progress, on_line=show_line)
        except (DownloadError, OSError) as error:
            progress.clear()
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            progress.clear()
            print("error: Interrupted. What has arrived is kept; the same command goes on from there.", file=sys.stderr)
            return FAILED
    print(f"All there: {', '.join(_list_places(folders))}", file=out)
    return DONE


def _list_places(folders: dict[str, Path]) -> list[str]:
    return [str(folder if part == "vae" else folder / part) for part, folder in folders.items()]


class _ProgressLine:
    """One line that is written over again and again, on a terminal; silent elsewhere."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.is_shown = stream.isatty()
        self.length = 0

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, done: int, total: int, text: str) -> None:
        if self.is_shown:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be written over
            print(f"\r{text:<{self.length}}", end="", file=self.stream, flush=True)
            self.length = len(text)

    def clear(self) -> None:
        if self.length:
            print(f"\r{'':<{self.length}}\r", end="", file=self.stream, flush=True)
            self.length = 0
