"""The house's rules that a machine can check: import direction, light import, hosts only behind one door."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "kolors": set(),
    "lora": {"kolors"},
    "nodes": {"kolors", "lora"},
    "headless": set(),
}
# Doors, inside functions only: the nodes' host asks the running headless host, as it asks ComfyUI; the command
# composes the pack with the runner; the LoRA commands read and write files; the stand-ins of ComfyUI's VAE nodes
# need a VAE.
DOORS = {
    ("nodes/host.py", "headless"),
    ("headless/command.py", "nodes"),
    ("headless/download_command.py", "kolors"),
    ("headless/doctor_command.py", "kolors"),
    ("headless/doctor_command.py", "nodes"),
    ("headless/lora_command.py", "lora"),
    ("headless/lora_command.py", "kolors"),
    ("headless/train_command.py", "lora"),
    ("headless/train_command.py", "kolors"),
    ("headless/stand_ins.py", "kolors"),
}
HOST_MODULES = {"comfy", "folder_paths", "latent_preview", "server", "execution", "comfy_execution"}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def iterate_imports(path: Path):
    """Yields (room or module, is inside a function) for every import that can run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(map(id, ast.walk(node)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [_resolve(path, node, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in inside


def _resolve(path: Path, node: ast.ImportFrom, name: str) -> str:
    """The dotted module that an import reads, from the repository's root for relative ones."""
    if not node.level:
        return node.module or ""
    parts = path.relative_to(ROOT).parent.parts
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else []), name])


def find_room(module: str) -> str | None:
    first = module.removeprefix("kolors_nodes.").split(".")[0]
    return first if first in ROOMS else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    relative = path.relative_to(ROOT).as_posix()
    room = relative.split("/")[0]
    for module, in_function in iterate_imports(path):
        target = find_room(module)
        if target in (None, room) or target in ROOMS[room]:
            continue
        assert in_function and (relative, target) in DOORS, f"{relative} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_host_is_imported_behind_one_door(path):
    relative = path.relative_to(ROOT).as_posix()
    for module, in_function in iterate_imports(path):
        if module.split(".")[0] in {
            "comfy",
            "folder_paths",
            "latent_preview",
            "server",
            "execution",
            "comfy_execution",
        }:
            assert relative == "nodes/host.py" and in_function, f"{relative} imports {module}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light():
    """The pack imports nothing heavy, torch included, and takes no time."""
    code = """
import json, sys, time
start = time.process_time()
import kolors_nodes
taken = time.process_time() - start
names = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "accelerate")
heavy = [name for name in names if name in sys.modules]
print(json.dumps([taken, heavy, sorted(kolors_nodes.NODE_CLASS_MAPPINGS)]))
"""
    taken, heavy, nodes = json.loads(run_python(code))
    assert heavy == []
    assert taken < 0.3
    assert "KolorsSampler" in nodes


@pytest.mark.parametrize("path", sorted((ROOT / "headless").glob("*.py")), ids=lambda path: path.name)
def test_the_runner_loads_torch_only_when_a_node_needs_it(path):
    for module, in_function in iterate_imports(path):
        assert in_function or module.split(".")[0] not in {"torch", "numpy", "PIL", "safetensors"}, module


def test_the_root_imports_in_a_folder_that_is_no_identifier(tmp_path):
    """ComfyUI loads the pack under its path; pytest may read the root file with no package at all."""
    code = f"""
import runpy
assert "NODE_CLASS_MAPPINGS" not in runpy.run_path({str(ROOT / "__init__.py")!r})
"""
    run_python(code)
