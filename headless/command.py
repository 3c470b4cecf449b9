"""The ``kolors`` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .conversion import to_prompt
from .doctor_command import add_doctor_command
from .download_command import add_download_command
from .graph import Graph, NodeClasses, Prompt
from .host import use_host
from .lora_command import add_lora_commands
from .messages import describe_result
from .packs import PackError, load_pack
from .runner import Runner, RunResult
from .settings import SettingError, apply_settings, apply_to_workflow
from .timings import sum_timings, write_trace
from .train_command import add_train_command
from .workflow import WorkflowError, is_ui_workflow, load_workflow

DONE, FAILED, INVALID = 0, 1, 2
DEMO_HINT = "To try this graph without any download, add --demo: it runs on the small bundled model."
STATUS_EXIT = {"success": DONE, "error": FAILED, "invalid": INVALID}


class UsageError(Exception):
    """Arguments that make no sense; the text says which and what to do."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process, so that ``--json`` covers wrong arguments too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line. Every subcommand sets ``handler``, a function of the options."""
    parser = _Parser(prog="kolors", description="Kwai-Kolors from the command line.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    add_lora_commands(commands)
    add_train_command(commands)
    add_download_command(commands)
    add_doctor_command(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run a ComfyUI workflow and write its pictures",
        description="Runs a ComfyUI workflow without ComfyUI and prints the path of every file it made. "
        "Exit status: 0 done, 1 failed while running, 2 invalid workflow or arguments.",
    )
    run.add_argument("workflow", metavar="WORKFLOW", help="a .json workflow (UI or API format), or a PNG made by one")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        dest="settings",
        help="change an input; NODE is an id, or a title or class that only one node has (repeatable)",
    )
    run.add_argument("--demo", action="store_true", help="run on the small bundled model, at its own picture size")
    run.add_argument("--models-dir", metavar="DIR", help="model folders as ComfyUI has them (default: ./models)")
    run.add_argument("--input-dir", metavar="DIR", help="where pictures to load are (default: ./input)")
    run.add_argument("--output-dir", metavar="DIR", help="where pictures go (default: ./output)")
    run.add_argument(
        "--nodes",
        action="append",
        default=[],
        metavar="FILE_OR_FOLDER",
        help="another node pack that needs no ComfyUI (repeatable)",
    )
    run.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    run.add_argument("--json", action="store_true", help="print one JSON object instead of paths")
    run.add_argument(
        "--trace", metavar="FILE", help="write when each node was at work, for chrome://tracing or ui.perfetto.dev"
    )
    run.add_argument("--verbose", action="store_true", help="show log messages, and where an error happened")
    run.set_defaults(handler=run_workflow)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status.

    Args:
        argv: the arguments without the program's name; default: the process's own.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a character must not end the run
    try:
        options = build_parser().parse_args(argv)
    except UsageError as error:
        return _report_refusal(sys.stdout, "invalid_arguments", str(error), as_json="--json" in argv)
    except SystemExit as error:  # --help has printed itself
        return int(error.code or DONE)
    with reserve_stdout() as out:
        return options.handler(options, out)


def run_workflow(options: argparse.Namespace, out: TextIO) -> int:
    """The command ``kolors run``. Returns the exit status."""
    try:
        with ProgressBar(sys.stderr) as progress, show_log(sys.stderr, options.verbose):
            runner, prompt, extra_data = _prepare(options, progress)
            result = runner.run(prompt, extra_data=extra_data)
    except (UsageError, WorkflowError, SettingError, PackError) as error:
        if options.verbose:
            traceback.print_exc()
        kind = "invalid_workflow" if isinstance(error, WorkflowError) else "invalid_arguments"
        return _report_refusal(out, kind, str(error), as_json=options.json)
    except KeyboardInterrupt:
        return _report_stop(out, "KeyboardInterrupt", "Interrupted.", as_json=options.json)
    except Exception as error:  # a fault of ours must not break --json either
        if options.verbose:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}\nThis is a fault in kolors. --verbose shows where it happened."
        return _report_stop(out, type(error).__name__, text, as_json=options.json)
    return _report(options, out, runner, result)


def _prepare(options: argparse.Namespace, progress: ProgressBar) -> tuple[Runner, Prompt, dict[str, Any] | None]:
    """Everything before the first node: reads the workflow, changes it as asked, and checks the output folder."""
    workflow = load_workflow(options.workflow)
    folders = {"models_dir": options.models_dir, "input_dir": options.input_dir, "output_dir": options.output_dir}
    try:
        runner = Runner(
            load_nodes(options.nodes),
            **folders,
            device=options.device,
            display_names=get_display_names(),
            on_event=progress,
        )
    except ValueError as error:
        if isinstance(error, PackError):
            raise
        raise UsageError(str(error)) from error
    with use_host(runner.host):
        prompt = to_prompt(workflow, runner.nodes, display_names=runner.display_names)
        if options.demo:
            from ..nodes.demo import to_demo_prompt

            prompt = to_demo_prompt(prompt)
        applied = apply_settings(Graph(prompt, runner.nodes), options.settings)
        extra_data = None
        if is_ui_workflow(workflow):
            shown = apply_to_workflow(workflow, applied, runner.nodes)
            extra_data = {"extra_pnginfo": {"workflow": shown}}
    try:
        runner.host.check_output_dir()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"The output folder {runner.host.output_dir} cannot be written to ({reason}). "
            "Choose another with --output-dir."
        ) from error
    return runner, prompt, extra_data


def get_display_names() -> Mapping[str, str]:
    """Returns the titles of this pack's nodes."""
    from .. import NODE_DISPLAY_NAME_MAPPINGS

    return NODE_DISPLAY_NAME_MAPPINGS


def load_nodes(packs: Sequence[str]) -> NodeClasses:
    """Returns this pack's node classes and those of other packs; a later pack wins over an earlier one."""
    from .. import NODE_CLASS_MAPPINGS

    classes = dict(NODE_CLASS_MAPPINGS)
    for pack in packs:
        classes.update(load_pack(pack))
    return classes


def _report(options: argparse.Namespace, out: TextIO, runner: Runner, result: RunResult) -> int:
    messages = describe_result(result, runner.nodes, runner.host, runner.display_names)
    if options.trace:
        try:
            write_trace(result.timings, Path(options.trace))
        except OSError as error:
            reason = error.strerror or error
            messages.append(f"--trace {options.trace}: the file cannot be written ({reason}). Choose another.")
    hints = [DEMO_HINT] if not options.demo and _would_demo_help(result) else []
    files = list_files(result, runner)
    if options.json:
        _print_json(out, {
            "status": result.status,
            "files": files,
            "messages": messages + hints,
            "outputs": result.outputs,
            "executed": result.executed,
            "cached": result.cached,
            "error": result.error,
            "node_errors": result.node_errors,
            "blocked": result.blocked,
            "timings": sum_timings(result.timings),
        })  # fmt: skip
    else:
        _print_messages(messages, "warning" if result.status == "success" else "error")
        _print_messages(hints, "hint")
        if options.verbose and result.error and result.error.get("traceback"):
            print("".join(result.error["traceback"]), file=sys.stderr)
        for file in files:
            print(file, file=out)
    return STATUS_EXIT[result.status]


def _would_demo_help(result: RunResult) -> bool:
    """Tells whether the bundled model would take the place of a node that was refused."""
    if result.status != "invalid" or not result.node_errors:
        return False
    from ..nodes.demo import to_demo_prompt

    demo = to_demo_prompt(result.prompt)
    return any(demo[node_id] != result.prompt[node_id] for node_id in result.node_errors)


def list_files(result: RunResult, runner: Runner) -> list[str]:
    """Returns the paths of the files that a run's nodes show, in the prompt's order."""
    folders = {"output": runner.host.output_dir, "temp": runner.host.temp_dir, "input": runner.host.input_dir}
    files = []
    for ui in result.outputs.values():
        for item in (item for items in ui.values() if isinstance(items, (list, tuple)) for item in items):
            if isinstance(item, Mapping) and "filename" in item and item.get("type") in folders:
                files.append(str(folders[item["type"]] / (item.get("subfolder") or "") / item["filename"]))
    return list(dict.fromkeys(files))


def _report_refusal(out: TextIO, kind: str, text: str, *, as_json: bool) -> int:
    error = {"type": kind, "message": text, "details": "", "extra_info": {}}
    return _report_without_run(out, "invalid", error, text, as_json)


def _report_stop(out: TextIO, kind: str, text: str, *, as_json: bool) -> int:
    error = {"node_id": None, "exception_type": kind, "exception_message": text}
    return _report_without_run(out, "error", error, text, as_json)


def _report_without_run(out: TextIO, status: str, error: dict[str, Any], text: str, as_json: bool) -> int:
    if as_json:
        empty = {"outputs": {}, "executed": [], "cached": [], "node_errors": {}}
        _print_json(out, {"status": status, "files": [], "messages": [text], "error": error, **empty})
    else:
        _print_messages([text], "error")
    return STATUS_EXIT[status]


def _print_messages(messages: Sequence[str], kind: str) -> None:
    for message in messages:
        print(f"{kind}: {message}", file=sys.stderr)


def _print_json(out: TextIO, report: Mapping[str, Any]) -> None:
    print(json.dumps(report, default=str), file=out)


@contextlib.contextmanager
def reserve_stdout() -> Iterator[TextIO]:
    """Gives the real standard output; whatever else writes there meanwhile, native code too, goes to stderr."""
    real = sys.stdout
    real.flush()
    try:
        owns_descriptor = real.fileno() == 1
    except (OSError, ValueError):  # replaced by an object without a descriptor, as test runners do
        owns_descriptor = False
    if not owns_descriptor:
        with contextlib.redirect_stdout(sys.stderr):
            yield real
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(os.dup(kept), "w", encoding=real.encoding, errors="backslashreplace") as out:
            with contextlib.redirect_stdout(sys.stderr):
                yield out
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def show_log(stream: TextIO, is_verbose: bool) -> Iterator[None]:
    """Shows the package's warnings on a stream inside the block, everything it logs when verbose."""
    if not is_verbose:
        # Their remarks are for programmers. Read when they are imported, so a setting of the user's comes first.
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    log = logging.getLogger(__package__.partition(".")[0])
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_LogFormatter())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG if is_verbose else logging.WARNING)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


class ProgressBar:
    """A bar over nodes and their steps, on a terminal; silent elsewhere. An event sink for `Runner`."""

    WIDTH = 24

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.is_shown = stream.isatty()
        self.total = 0
        self.done = 0
        self.label = ""
        self.length = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def __call__(self, name: str, data: Mapping[str, Any]) -> None:
        if name == "execution_start":
            self.total = len(data["nodes"])
        elif name == "executing":
            self.label = f"{data['class_type']} (node {data['node']})"
            self._show(0.0)
        elif name == "progress":
            done, total = data["value"], data["max"]
            is_bytes = total >= 10**6  # while files load or arrive
            steps = f" {done / 1e6:.0f}/{total / 1e6:.0f} MB" if is_bytes else f" {done}/{total}"
            self._show(done / max(1, total), steps)
        elif name == "executed":
            self.done += 1

    def _show(self, part: float, steps: str = "") -> None:
        share = min(1.0, (self.done + part) / max(1, self.total))
        bar = "#" * round(share * self.WIDTH)
        self._write(f"[{bar:-<{self.WIDTH}}] {self.done + 1}/{self.total} {self.label}{steps}")

    def _write(self, line: str) -> None:
        if self.is_shown:
            print(f"\r{line:<{self.length}}" + ("\r" if not line else ""), end="", file=self.stream, flush=True)
            self.length = len(line)
