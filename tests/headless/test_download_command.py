"""`kolors download`: what it prints where, and its exit status. What it does is in tests/kolors/test_download.py."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kolors_nodes.headless.command import main
from kolors_nodes.kolors import download as downloads
from kolors_nodes.kolors.download import DownloadError


@pytest.fixture
def calls(monkeypatch):
    """Takes the place of the download itself, and keeps what it was asked for."""
    kept = []

    def download(folders, *, source, on_progress, on_line):
        kept.append((folders, source))
        on_line("Source: huggingface (https://huggingface.co).")
        on_progress(0, 100, "a.safetensors: 0% of 5.1 GB")
        on_progress(50, 100, "a.safetensors: 50% of 5.1 GB, 10.0 MB/s, 4:15 left")
        on_line("a.safetensors: 5.1 GB in 8:30, verified.")
        return "huggingface"

    monkeypatch.setattr(downloads, "download", download)
    return kept


def test_a_line_for_each_file(calls, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["download"]) == 0
    out, err = capsys.readouterr()
    model, vae = tmp_path / "models" / "diffusers" / "Kolors", tmp_path / "models" / "vae"
    assert out.splitlines() == [
        "Source: huggingface (https://huggingface.co).",
        "a.safetensors: 5.1 GB in 8:30, verified.",
        f"All there: {model / 'unet'}, {model / 'text_encoder'}, {vae}",
    ]
    assert err == ""  # no terminal, no progress
    assert calls == [({"unet": model, "text_encoder": model, "vae": vae}, "auto")]


def test_options(calls, tmp_path):
    assert main(["download", "--source", "modelscope", "--what", "vae, unet", "--models-dir", str(tmp_path)]) == 0
    assert calls == [({"vae": tmp_path / "vae", "unet": tmp_path / "diffusers" / "Kolors"}, "modelscope")]


def test_a_begun_part_is_completed_where_it_is(calls, tmp_path):
    config = tmp_path / "diffusers" / "Kolors-diffusers" / "unet" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{}")
    assert main(["download", "--what", "unet,text_encoder", "--models-dir", str(tmp_path)]) == 0
    names = {part: folder.name for part, folder in calls[0][0].items()}
    assert names == {"unet": "Kolors-diffusers", "text_encoder": "Kolors"}


def test_a_terminal_sees_one_line_that_moves(calls, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["download", "--models-dir", str(tmp_path)]) == 0
    shown = terminal.getvalue()
    assert "\n" not in shown
    first, second, *cleared = shown.removeprefix("\r").split("\r")
    assert first == "a.safetensors: 0% of 5.1 GB"
    assert second == "a.safetensors: 50% of 5.1 GB, 10.0 MB/s, 4:15 left"[:39]
    assert cleared == [" " * 39, ""]


@pytest.mark.parametrize("error", [DownloadError("No answer."), OSError("No answer."), KeyboardInterrupt()])
def test_failures(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(downloads, "download", fail)
    assert main(["download", "--models-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: Interrupted." if isinstance(error, KeyboardInterrupt) else "error: No answer.")


def test_offline(tmp_path, capsys):
    assert main(["download", "--what", "vae", "--models-dir", str(tmp_path)]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--what", "scheduler"], "'scheduler' is no part of Kolors. Choose from: unet, text_encoder, vae"),
    (["--what", ""], "'' is no part of Kolors"),
    (["--source", "ftp"], "invalid choice: 'ftp'"),
])  # fmt: skip
def test_wrong_arguments(capsys, arguments, message):
    assert main(["download", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_folder_itself_is_the_command(tmp_path):
    """For those who only cloned it into custom_nodes, whatever the folder is called."""
    pack = tmp_path / "custom nodes" / "Kolors.Pack"
    root = Path(__file__).parents[2]
    for room in ("kolors", "headless", "nodes", "lora"):
        shutil.copytree(root / room, pack / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(root / name, pack / name)
    command = [sys.executable, str(pack), "download", "--what", "vae"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: HF_HUB_OFFLINE is set")
