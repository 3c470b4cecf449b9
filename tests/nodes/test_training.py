"""The training nodes on the bundled model, as a graph runs them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner
from kolors_nodes.lora.dataset import Dataset
from kolors_nodes.lora.options import TrainingError, TrainingOptions
from kolors_nodes.nodes.models import DEMO
from kolors_nodes.nodes.training import DEMO_DATASET, KolorsLoraDataset, KolorsTrainOptions, TrainOptions, split_lines


def get_defaults(node) -> dict:
    return {name: options["default"] for name, (_, options) in node.INPUT_TYPES()["required"].items()}


def build_prompt(steps: int, **inputs) -> dict:
    options = get_defaults(KolorsTrainOptions) | {"checkpoint_every": 2, "sample_steps": 2, "precision": "32"}
    options |= {"regularization_prompts": "a red circle\n蓝色星形", "regularization_count": 2}
    train = {
        "kolors_model": ["1", 0], "chatglm3_model": ["2", 0], "vae": ["3", 0], "dataset": ["4", 0], "options": ["5", 0],
        "name": "cross", "rank": 4, "alpha": 4.0, "steps": steps, "learning_rate": 1e-3, "batch_size": 2,
        "resolution": 128, "seed": 0, "sample_prompts": "a red cross\n\n红色十字",
    }  # fmt: skip
    return {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": DEMO, "precision": "fp16"}},
        "2": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"model": DEMO, "precision": "fp16"}},
        "3": {"class_type": "KolorsVAELoader", "inputs": {"vae_name": DEMO}},
        "4": {"class_type": "KolorsLoraDataset", "inputs": {"folder": DEMO}},
        "5": {"class_type": "KolorsTrainOptions", "inputs": options},
        "6": {"class_type": "KolorsTrainLora", "inputs": train | inputs},
        "7": {"class_type": "KolorsSaveLora", "inputs": {"lora": ["6", 0], "name": "cross", "format": "kohya"}},
        "8": {"class_type": "PreviewImage", "inputs": {"images": ["6", 2]}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["6", 3]}},
        "10": {"class_type": "PreviewImage", "inputs": {"images": ["4", 1]}},
    }


def make_runner(folder, on_event=None) -> Runner:
    return Runner(
        NODE_CLASS_MAPPINGS, models_dir=folder / "models", output_dir=folder / "output", device="cpu", on_event=on_event
    )


def test_a_graph_trains_and_saves(tmp_path):
    events = []
    runner = make_runner(tmp_path, lambda name, data: events.append((name, dict(data))))
    result = runner.run(build_prompt(3))
    assert result.status == "success", result.error
    assert (tmp_path / "models" / "loras" / "cross.safetensors").is_file()
    steps = [data for name, data in events if name == "progress" and data["max"] == 3]
    assert {data["value"] for data in steps} >= {1, 2, 3}
    assert [len(result.outputs[node]["images"]) for node in ("8", "9", "10")] == [1, 2, 1]
    folder = tmp_path / "output" / "kolors_training" / "cross-training"
    assert len(list((folder / "samples").iterdir())) == 4


def test_cancel_leaves_a_run_that_the_next_one_ends(tmp_path):
    whole = make_runner(tmp_path / "whole").run(build_prompt(4))
    assert whole.status == "success", whole.error

    def cancel(name, data):
        if name == "progress" and (data["value"], data["max"]) == (3, 4) and data["node"] == "6":
            runner.host.interrupt()

    runner = make_runner(tmp_path / "parts", cancel)
    stopped = runner.run(build_prompt(4))
    assert stopped.status != "success"
    folder = tmp_path / "parts" / "output" / "kolors_training"
    assert (folder / "cross.safetensors").is_file()
    assert sorted((folder / "cross-training" / "checkpoints").iterdir())[-1].name == "step-00000003.safetensors"
    resumed = make_runner(tmp_path / "parts").run(build_prompt(4))
    assert resumed.status == "success", resumed.error
    files = [tmp_path / part / "models" / "loras" / "cross.safetensors" for part in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({"name": "../x"}, "plain file name"), ({"resolution": 100}, "multiple of 8"), ({"name": ""}, "plain file name")],
)
def test_mistakes_end_before_anything_is_encoded(tmp_path, inputs, message):
    result = make_runner(tmp_path).run(build_prompt(3, **inputs))
    assert result.status == "error" and message in result.error["exception_message"]
    assert not (tmp_path / "output" / "kolors_training").exists()


def test_the_dataset_node_shows_and_reports():
    dataset, sheet, report = KolorsLoraDataset().read(DEMO)
    assert isinstance(dataset, Dataset) and len(dataset.pictures) == 16
    assert sheet.shape == (1, 256, 1024, 3) and sheet.dtype == torch.float32
    assert report.startswith("16 pictures to learn, 16 different captions")


def test_the_stamp_follows_the_files(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes((DEMO_DATASET / "cross_00.png").read_bytes())
    before = KolorsLoraDataset.IS_CHANGED(str(tmp_path))
    assert KolorsLoraDataset.IS_CHANGED(str(tmp_path)) == before
    (tmp_path / "a.txt").write_text("new caption")
    assert KolorsLoraDataset.IS_CHANGED(str(tmp_path)) != before


@pytest.mark.parametrize("folder", ["../outside", "a/../../b", "C:x", "absent"])
def test_folders_outside_or_absent_are_refused(folder):
    assert isinstance(KolorsLoraDataset.VALIDATE_INPUTS(folder), str)
    assert KolorsLoraDataset.VALIDATE_INPUTS(str(DEMO_DATASET)) is True


def test_the_options_node_s_defaults_are_the_library_s():
    (options,) = KolorsTrainOptions().build(**get_defaults(KolorsTrainOptions))
    for field in fields(TrainingOptions):
        if field.name != "max_train_steps":
            assert getattr(options.training, field.name) == field.default, field.name
    assert options.resume and options.regularization_prompts == () == TrainOptions().regularization_prompts


def test_the_options_node_refuses_what_does_not_go_together():
    wrong = get_defaults(KolorsTrainOptions) | {"precision": "32", "base_precision": "fp16"}
    with pytest.raises(TrainingError, match="precision 32"):
        KolorsTrainOptions().build(**wrong)


def test_lines():
    assert split_lines(" a b \n\n c\n") == ("a b", "c")
