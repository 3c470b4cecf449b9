"""Whole graphs on the bundled model: the tutorial's, and what is reused when one of them runs again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner
from kolors_nodes.headless.command import main

ROOT = Path(__file__).parents[2]
# Few steps: these tests are about the runner, not about what the pictures show.
STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def bundled_model():
    folder = ROOT / "demo" / "kolors-shapes" / "unet"
    if not folder.is_dir():
        pytest.skip(f"the bundled model is not complete: {folder} is missing, check the repository out again")


def make_prompt(seed: int = 1) -> dict:
    """Two pictures by the bundled model, saved."""
    from kolors_nodes.nodes.models import DEMO

    return {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": DEMO, "precision": "fp32"}},
        "2": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"precision": "fp32", "model": DEMO}},
        "3": {
            "class_type": "KolorsTextEncode",
            "inputs": {
                "chatglm3_model": ["2", 0],
                "prompt": "a red circle on a white background|白色背景上的红色圆形",
                "negative_prompt": "",
                "num_images_per_prompt": 1,
            },
        },
        "4": {
            "class_type": "KolorsSampler",
            "inputs": {
                "kolors_model": ["1", 0],
                "kolors_embeds": ["3", 0],
                "width": 128,
                "height": 128,
                "seed": seed,
                "steps": STEPS,
                "cfg": 5.0,
                "scheduler": "EulerDiscreteScheduler",
                "noise_device": "cpu",
            },
        },
        "5": {"class_type": "KolorsVAELoader", "inputs": {"vae_name": DEMO}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["5", 0]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "pic"}},
    }


def test_the_tutorial_runs_on_it(tmp_path, capsys, reference):
    workflow = reference / "seed" / "kolors_text_to_image.json"
    arguments = ["run", str(workflow), "--demo", "--set", f"14.steps={STEPS}", "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    files = capsys.readouterr().out.splitlines()
    assert len(files) == 4
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (128, 128)
            assert json.loads(picture.text["workflow"])["nodes"]


def test_a_second_run_reuses_everything_and_a_new_seed_only_what_it_can(tmp_path):
    runner = Runner(NODE_CLASS_MAPPINGS, output_dir=tmp_path, device="cpu")
    assert set(runner.run(make_prompt()).executed) == set("1234567")
    again = runner.run(make_prompt())
    assert (again.executed, set(again.cached)) == ((), set("1234567"))
    assert runner.run(make_prompt(seed=2)).executed == ("4", "6", "7")


def test_the_same_seed_gives_the_same_file_in_another_process(tmp_path):
    runner = Runner(NODE_CLASS_MAPPINGS, output_dir=tmp_path / "here", device="cpu")
    assert runner.run(make_prompt()).status == "success"
    (tmp_path / "prompt.json").write_text(json.dumps(make_prompt()))
    command = [sys.executable, "-m", "kolors_nodes", "run", "prompt.json", "--output-dir", "there", "--device", "cpu"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    names = ["pic_00001_.png", "pic_00002_.png"]
    assert [(tmp_path / "there" / name).read_bytes() for name in names] == [
        (tmp_path / "here" / name).read_bytes() for name in names
    ]
