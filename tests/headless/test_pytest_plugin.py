"""The pytest plugin, in a project of its own that has nothing to do with Kolors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = "kolors_nodes.headless.pytest_plugin"
PACK = """
from .shapes import Square

NODE_CLASS_MAPPINGS = {"Square": Square}
"""
SHAPES = '''
import torch


class Square:
    """A grey square, and a text about it."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"size": ("INT", {"default": 8, "min": 1, "max": 64}), "grey": ("FLOAT", {"default": 0.5})}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"
    OUTPUT_NODE = True

    def draw(self, size, grey):
        if grey > 1:
            raise ValueError("grey is above 1")
        if grey < 0:
            import folder_paths

            folder_paths.get_output_directory()
        return {"ui": {"text": [f"{size} pixels"]}, "result": (torch.full((1, size, size, 3), grey),)}
'''
TESTS = """
import pytest


@pytest.fixture
def comfy_nodes():
    from kolors_nodes.headless.packs import load_pack

    return load_pack("my_pack")


def test_a_bigger_square(run_workflow):
    assert run_workflow("workflows/good.json", size=16).outputs["1"] == {"text": ["16 pixels"]}
    assert run_workflow("workflows/good.json", Square__size=17).outputs["1"] == {"text": ["17 pixels"]}
    assert run_workflow("workflows/good.json", **{"1.size": 18}).outputs["1"] == {"text": ["18 pixels"]}


def test_the_runner(comfy_runner):
    prompt = {"1": {"class_type": "Square", "inputs": {"size": 3, "grey": 0.0}}}
    assert comfy_runner.run(prompt, outputs=["1"]).values["1"][0].shape == (1, 3, 3, 3)
"""


def make_prompt(**inputs):
    return {
        "1": {"class_type": "Square", "inputs": {"size": 8, "grey": 0.5, **inputs}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "square"}},
    }


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with a pack, tests and no workflows yet."""
    (tmp_path / "my_pack").mkdir()
    (tmp_path / "my_pack/__init__.py").write_text(PACK)
    (tmp_path / "my_pack/shapes.py").write_text(SHAPES)
    (tmp_path / "test_squares.py").write_text(TESTS)
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows/package.json").write_text('{"name": "no workflow"}')
    return tmp_path


@pytest.fixture
def run_pytest(project, capsys, monkeypatch):
    """Runs pytest in the project, within this process, and returns what it prints."""
    monkeypatch.chdir(project)

    def run(*options: str) -> str:
        pytest.main(["-p", PLUGIN, "-p", "no:cacheprovider", "--rootdir", ".", "-c", os.devnull, *options])
        return "\n".join(capsys.readouterr())

    return run


def write(project: Path, name: str, data: object) -> None:
    (project / "workflows" / name).write_text(json.dumps(data))


WORKFLOWS = ("--comfy-workflows", "workflows", "--comfy-nodes", "my_pack")


def test_workflows_and_fixtures_work_in_another_project(project):
    write(project, "good.json", make_prompt())
    write(project, "nodes.json", {"nodes": [{"id": 1, "type": "Square", "widgets_values": [4, 1.0]}], "links": []})
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "test_squares.py", *WORKFLOWS]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_a_failure_is_a_short_table(project, run_pytest):
    write(project, "bad_value.json", make_prompt(size=100))
    write(project, "failing.json", make_prompt(grey=2.0))
    write(project, "unknown.json", {"7": {"class_type": "Circle", "inputs": {}}})
    write(project, "host.json", make_prompt(grey=-1.0))
    shown = run_pytest(*WORKFLOWS)
    assert "4 failed" in shown, shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "node class input error" in lines
    assert "1 Square size Value 100 bigger than max of 64" in lines
    assert "1 Square size=8, grey=2.0 ValueError: grey is above 1" in lines
    assert "7 Circle Cannot execute because node Circle does not exist." in lines
    assert any("folder_paths.get_output_directory" in line for line in lines), shown
    assert "Traceback" not in shown and "runner.py" not in shown


def test_expectations_are_written_and_then_kept_to(project, run_pytest):
    write(project, "square.json", make_prompt())
    run_pytest(*WORKFLOWS, "--comfy-update")
    expected = json.loads((project / "workflows/square.expect.json").read_text())
    assert expected == {
        "status": "success",
        "outputs": {
            "1": {"count": 1, "text": ["8 pixels"]},
            "2": {"count": 1, "shape": [8, 8, 3], "picture": {"file": "square.2.png", "distance": 0.02}},
        },
    }
    write(project, "square.json", make_prompt(grey=0.51))  # within the distance
    assert "1 passed" in run_pytest(*WORKFLOWS)
    write(project, "square.json", make_prompt(grey=0.6, size=9))
    lines = [" ".join(line.split()) for line in run_pytest(*WORKFLOWS).splitlines()]
    assert "1 Square text is ['9 pixels'], expected ['8 pixels']" in lines
    assert "2 SaveImage shape is [9, 9, 3], expected [8, 8, 3]" in lines
    write(project, "square.json", make_prompt(grey=0.6))
    assert "0.1020 away from square.2.png, expected at most 0.02" in run_pytest(*WORKFLOWS)


def test_a_workflow_may_be_expected_to_fail(project, run_pytest):
    write(project, "failing.json", make_prompt(grey=2.0))
    write(project, "failing.expect.json", {"status": "error", "error": "ValueError"})
    assert "1 passed" in run_pytest(*WORKFLOWS)
    write(project, "failing.expect.json", {"status": "error", "error": "TypeError"})
    assert "the error is ValueError, expected TypeError" in run_pytest(*WORKFLOWS)


def test_wrong_options_are_told(project, run_pytest):
    assert "absent: there is no such file or folder." in run_pytest("--comfy-workflows", "absent")
    write(project, "good.json", make_prompt())
    shown = run_pytest("--comfy-workflows", "workflows", "--comfy-nodes", "absent_pack")
    assert "absent_pack: no node pack" in shown
