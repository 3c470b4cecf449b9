"""The pack in a running ComfyUI: what it lists, serves and computes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file

from kolors_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from kolors_nodes.headless import load_workflow, to_prompt
from kolors_nodes.headless.stand_ins import with_stand_ins
from kolors_nodes.nodes.demo import to_demo_prompt

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def test_starts_without_complaint_and_fast(server, pack_name):
    ours = [line for line in server.log.splitlines() if pack_name in line]
    assert not [line for line in ours if "IMPORT FAILED" in line or "Cannot import" in line or "File " in line]
    (time,) = filter(None, (re.search(r"([\d.]+) seconds: ", line) for line in ours))
    # 0.0 or 0.1 on a quiet machine; this is wall time. tests/test_layout.py measures processor time.
    assert float(time[1]) <= 1.0


def test_lists_every_registered_node_as_declared(server, pack_name):
    listed = server.get("/object_info")
    ours = {name: info for name, info in listed.items() if info["python_module"] == f"custom_nodes.{pack_name}"}
    assert set(ours) == set(NODE_CLASS_MAPPINGS)
    for name, info in ours.items():
        node = NODE_CLASS_MAPPINGS[name]
        declared = json.loads(json.dumps(node.INPUT_TYPES()))
        order = {group: list(inputs) for group, inputs in declared.items()}
        assert info["input_order"] == order
        for group in declared:
            for input_name, (kind, *options) in declared[group].items():
                listed_kind, *listed_options = info["input"][group][input_name]
                assert listed_options == options
                # Choices that are files differ with the model folders; those that are not, and types, are equal.
                assert isinstance(kind, list) or listed_kind == kind
        assert info["output"] == list(node.RETURN_TYPES)
        assert info["output_name"] == list(node.RETURN_NAMES)
        assert info["output_tooltips"] == list(node.OUTPUT_TOOLTIPS)
        assert info["display_name"] == NODE_DISPLAY_NAME_MAPPINGS[name]
        assert (info["description"], info["category"]) == (node.DESCRIPTION, node.CATEGORY)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_examples_give_the_headless_runner_s_latents_bit_for_bit(server, base, checkout, pack_name, path):
    """Both run in the same Python, that of ComfyUI, on the copy of the pack that ComfyUI has.

    Trainings too: ComfyUI's VAE object and ours run the same network, one picture at a time, in one memory layout.
    """
    prompt = to_demo_prompt(to_prompt(load_workflow(path), with_stand_ins(NODE_CLASS_MAPPINGS)))
    samplers = [node_id for node_id, node in prompt.items() if node["class_type"] == "KolorsSampler"]
    for node in prompt.values():
        if node["class_type"] == "KolorsTrainLora":
            node["inputs"].update(steps=3, sample_prompts="")
        elif node["class_type"] == "KolorsTrainOptions":
            node["inputs"].update(regularization_prompts="", lr_warmup_steps=0)
    for node_id in samplers:
        prompt[node_id]["inputs"]["steps"] = 8
        inputs = {"samples": [node_id, 0], "filename_prefix": f"{path.stem}/{node_id}"}
        prompt[f"save {node_id}"] = {"class_type": "SaveLatent", "inputs": inputs}
    server.run(prompt)
    run_headless(checkout.python, base, pack_name, prompt)
    assert samplers
    for node_id in samplers:
        in_comfyui, headless = (
            load_file(base / folder / path.stem / f"{node_id}_00001_.latent")["latent_tensor"]
            for folder in ("output", "headless")
        )
        assert torch.equal(in_comfyui, headless)


def run_headless(python: str, base: Path, pack_name: str, prompt: dict) -> None:
    """Runs a prompt through the runner, importing the pack's copy as ``kolors_nodes``."""
    (base / "site").mkdir(exist_ok=True)
    if not (base / "site" / "kolors_nodes").exists():
        (base / "site" / "kolors_nodes").symlink_to(base / "custom_nodes" / pack_name, target_is_directory=True)
    (base / "prompt.json").write_text(json.dumps(prompt), encoding="utf-8")
    command = [python, "-m", "kolors_nodes", "run", str(base / "prompt.json"), "--json", "--device", "cpu"]
    command += ["--output-dir", str(base / "headless"), "--input-dir", str(base / "input")]
    search_path = os.pathsep.join(filter(None, [str(base / "site"), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search_path})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
@pytest.mark.parametrize("page", ["{name}.md", "{name}/zh.md"])
def test_serves_the_help_pages(server, base, pack_name, name, page):
    page = page.format(name=name)
    served = server.read(f"/extensions/{quote(pack_name)}/docs/{page}")
    assert served == (base / "custom_nodes" / pack_name / "web" / "docs" / page).read_bytes()


def test_serves_the_translations(server, base, pack_name):
    served = server.get("/i18n")
    for folder in (base / "custom_nodes" / pack_name / "locales").iterdir():
        main = json.loads((folder / "main.json").read_text(encoding="utf-8"))
        definitions = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        texts = served[folder.name]
        assert all(item in texts[part].items() for part in main for item in main[part].items())
        assert definitions.items() <= texts["nodeDefs"].items()


def test_serves_the_examples_with_their_thumbnails(server, base, pack_name):
    workflows = sorted((base / "custom_nodes" / pack_name / "example_workflows").glob("*.json"))
    assert sorted(server.get("/api/workflow_templates")[pack_name]) == [path.stem for path in workflows]
    for path in workflows:
        for suffix in (".json", ".jpg"):
            served = server.read(f"/api/workflow_templates/{quote(pack_name)}/{path.stem}{suffix}")
            assert served == path.with_suffix(suffix).read_bytes()
