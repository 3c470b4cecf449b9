"""Every example workflow runs, on the bundled model, and the README's demo draws what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner, load_workflow, to_prompt
from kolors_nodes.nodes.demo import to_demo_prompt

EXAMPLES = Path(__file__).parents[1] / "example_workflows"
WORKFLOWS = sorted(EXAMPLES.glob("*.json"))
# Pictures saved and their size: the sizes in the files divided by 8, or the bundled model's own.
EXPECTED = {
    "demo_text_to_image": [(128, 128)] * 4,
    "kolors_text_to_image": [(128, 128)] * 2,
    "kolors_image_to_image": [(128, 128)],
    "kolors_two_stage": [(128, 128)],
    "demo_lora": [(128, 128)] * 4,
    "demo_train_lora": [(128, 128)] * 8,
}
# A training in small: its own tests judge what it learns.
SHORT_TRAINING = {
    "KolorsTrainLora": {"steps": 2, "batch_size": 2},
    "KolorsTrainOptions": {"regularization_count": 1, "sample_steps": 2, "lr_warmup_steps": 0},
}

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture
def folders(tmp_path):
    """Input and output folders, with the picture that ComfyUI ships as ``example.png``."""
    (tmp_path / "input").mkdir()
    Image.new("RGB", (200, 150), "red").save(tmp_path / "input" / "example.png")
    return {"input_dir": tmp_path / "input", "output_dir": tmp_path / "output", "models_dir": tmp_path / "models"}


def run(path: Path, folders: dict, steps: int | None):
    runner = Runner(NODE_CLASS_MAPPINGS, **folders, device="cpu")
    prompt = to_demo_prompt(to_prompt(load_workflow(path), runner.nodes))
    for node in prompt.values():
        if steps and node["class_type"] == "KolorsSampler":
            node["inputs"]["steps"] = steps
        if steps:
            node["inputs"].update(SHORT_TRAINING.get(node["class_type"], {}))
    return runner.run(prompt)


@each_workflow
def test_runs(path, folders):
    result = run(path, folders, steps=4)
    assert result.status == "success", result.error
    images = [image for ui in result.outputs.values() for image in ui.get("images", ()) if image["type"] == "output"]
    sizes = []
    for image in images:
        with Image.open(folders["output_dir"] / image["subfolder"] / image["filename"]) as picture:
            sizes.append(picture.size)
    assert sizes == EXPECTED[path.stem]


@each_workflow
def test_has_a_thumbnail_that_the_template_browser_finds(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 200
    assert path.with_suffix(".jpg").stat().st_size < 100_000


def test_nothing_else_lies_among_the_examples():
    """ComfyUI lists every JSON in the folder as a template."""
    assert {path.name for path in EXAMPLES.iterdir()} == {
        f"{name}{end}" for name in EXPECTED for end in (".json", ".jpg")
    }


def test_the_demo_draws_what_it_says(folders):
    """All 25 steps; the committed classifier reads the pictures."""
    from kolors_nodes.demo.recipe.classifier import load_classifier

    path = EXAMPLES / "demo_text_to_image.json"
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    prompt = next(node for node in nodes if node["type"] == "KolorsTextEncode")["widgets_values"][0]
    assert prompt.split("|") == [
        "a red circle on a white background",
        "黑色背景上的黄色正方形",
        "a green triangle on a grey background",
        "白色背景上的蓝色星形",
    ]
    (ui,) = run(path, folders, steps=None).outputs.values()
    pictures = []
    for image in ui["images"]:
        with Image.open(folders["output_dir"] / image["filename"]) as picture:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pictures.append(pixels.view(128, 128, 3).movedim(-1, 0) / 127.5 - 1)
    read = load_classifier().read(torch.stack(pictures))
    assert [(names["shape"], names["colour"], names["background"]) for names in read] == [
        ("circle", "red", "white"),
        ("square", "yellow", "black"),
        ("triangle", "green", "grey"),
        ("star", "blue", "white"),
    ]
