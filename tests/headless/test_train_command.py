"""``kolors train-lora``: the tutorial's command line, stopping and resuming, and mistakes."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

from kolors_nodes.headless import train_command
from kolors_nodes.headless.command import build_parser, main
from kolors_nodes.nodes.models import DEMO_FOLDER
from kolors_nodes.nodes.training import DEMO_DATASET

# As the tutorial has it, the paths apart.
TUTORIAL = [
    "train-lora",
    "--pretrained_unet_path", str(DEMO_FOLDER / "unet" / "diffusion_pytorch_model.fp16.safetensors"),
    "--pretrained_text_encoder_path", str(DEMO_FOLDER / "text_encoder"),
    "--pretrained_fp16_vae_path", str(DEMO_FOLDER / "vae" / "diffusion_pytorch_model.fp16.safetensors"),
    "--lora_rank", "16",
    "--lora_alpha", "4.0",
    "--dataset_path", str(DEMO_DATASET),
    "--output_path", "./models",
    "--max_epochs", "1",
    "--center_crop",
    "--use_gradient_checkpointing",
    "--precision", "16-mixed",
]  # fmt: skip
SMALL = ["--width", "128", "--height", "128", "--checkpoint_every", "2", "--sample_steps", "2"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Encoded once for all tests here."""
    return ["--cache_dir", str(tmp_path_factory.mktemp("cache"))]


def test_the_tutorials_command_line_writes_two_files_that_draw_the_same(workplace, cache, capsys):
    from kolors_nodes.kolors.unet import load_unet
    from kolors_nodes.nodes.lora import KolorsLoraLoader, LoadKolorsLoRA
    from kolors_nodes.nodes.models import KolorsModel

    settings = [*SMALL, "--steps_per_epoch", "3", "--learning_rate", "1e-2", "--save_lightning_ckpt"]
    assert main([*TUTORIAL, *settings, *cache]) == 0
    ours, theirs = capsys.readouterr().out.split()
    assert ours == "models/kolors_lora.safetensors"
    assert theirs == "models/lightning_logs/version_0/checkpoints/epoch=0-step=3.ckpt"
    model = KolorsModel(load_unet(DEMO_FOLDER / "unet"))
    (first,) = LoadKolorsLoRA().load_lora(model, str(workplace / theirs), 4.0)
    (workplace / "models" / "loras").mkdir()
    shutil.copy(workplace / ours, workplace / "models" / "loras")
    (second,) = KolorsLoraLoader().load_lora(model, "kolors_lora.safetensors", 1.0)
    weights = [item.patched_unet.state_dict() for item in (first, second)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert first.patched_unet is not model.unet


def test_the_defaults_are_the_tutorial_script_s():
    required = ["--pretrained_unet_path", "a", "--pretrained_text_encoder_path", "b", "--pretrained_fp16_vae_path", "c"]
    options = build_parser().parse_args(["train-lora", *required, "--dataset_path", "d"])
    training = train_command.get_training_options(options)
    # Source: add_general_parsers and train_kolors_lora.py of DiffSynth-Studio 22e4ae99.
    assert (options.steps_per_epoch, options.height, options.width, options.batch_size) == (500, 1024, 1024, 1)
    assert (options.output_path, options.center_crop, options.random_flip) == ("./", False, False)
    assert (training.rank, training.alpha, training.learning_rate) == (4, 4.0, 1e-4)
    assert (training.init_lora_weights, training.precision, training.max_train_steps) == ("kaiming", "16-mixed", 500)
    assert not training.gradient_checkpointing
    assert training.target_modules == ("to_q", "to_k", "to_v", "to_out.0")


def test_ctrl_c_leaves_a_run_that_resumes(workplace, cache, capsys, monkeypatch):
    settings = [*SMALL, "--max_train_steps", "4", *cache]
    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests were started in the background
    assert main([*TUTORIAL, *settings, "--name", "whole"]) == 0
    on_step = train_command.Progress.on_step

    def press_ctrl_c(self, report):
        on_step(self, report)
        if report.step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(train_command.Progress, "on_step", press_ctrl_c)
        assert main([*TUTORIAL, *settings, "--name", "parts"]) == 130
    assert "stopped at step 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert (workplace / "models" / "parts.safetensors").is_file()
    assert main([*TUTORIAL, *settings, "--name", "parts", "--resume"]) == 0
    files = [(workplace / "models" / f"{name}.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_spaces_and_chinese_in_every_path_and_name(workplace, cache, capsys):
    pictures = workplace / "我的 图片"
    shutil.copytree(DEMO_DATASET, pictures)
    settings = ["--dataset_path", str(pictures), "--output_path", "输出 文件夹", "--name", "我的 风格"]
    assert main([*TUTORIAL, *SMALL, "--max_train_steps", "1", *settings, *cache]) == 0
    assert capsys.readouterr().out.strip() == "输出 文件夹/我的 风格.safetensors"
    assert (workplace / "输出 文件夹" / "我的 风格.safetensors").is_file()


def test_samples_and_regularisation(workplace, cache):
    settings = ["--max_train_steps", "2", "--batch_size", "2", "--sample_prompt", "a red cross", *SMALL]
    regularization = ["--regularization_prompt", "a red circle", "--regularization_count", "1"]
    assert main([*TUTORIAL, *settings, *regularization, *cache]) == 0
    folder = workplace / "models" / "kolors_lora-training"
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-000002-0.png"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["step"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--lora_rank", "0"], "rank is 0"),
        (["--width", "100"], "expected a multiple of 8"),
        (["--name", "../x"], "plain file name"),
        (["--dataset_path", "absent"], "There is no dataset folder absent"),
        (["--dataset_path", "."], "no pictures"),
        (["--output_path", "file"], "cannot be written to"),
        (["--pretrained_unet_path", "gone.safetensors"], "There is no gone.safetensors"),
        (["--training_strategy", "deepspeed_stage_2"], "accelerate launch"),
        (["--modelscope_model_id", "x"], "uploads nothing"),
        (["--learning_rate", "-1"], "learning_rate is -1"),
        (["--device", "toaster"], "toaster"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_before_anything_is_loaded(workplace, capsys, settings, message, monkeypatch):
    monkeypatch.setattr(train_command, "prepare", lambda *_: pytest.fail("it started"))
    if "gone.safetensors" in settings:
        monkeypatch.undo()
        monkeypatch.chdir(workplace)
    (workplace / "file").write_text("x")
    assert main([*TUTORIAL, *SMALL, *settings]) == 2
    assert message in capsys.readouterr().err


def test_resuming_with_other_settings_is_told_before_anything_is_encoded(cache, capsys, workplace):
    assert main([*TUTORIAL, *SMALL, "--max_train_steps", "1", *cache]) == 0
    elsewhere = ["--cache_dir", str(workplace / "empty")]
    changes = {"--lora_alpha": ("8", "alpha was 4.0, now 8.0"), "--caption": ("x", "data was")}
    for option, (value, message) in changes.items():
        assert main([*TUTORIAL, *SMALL, "--max_train_steps", "2", option, value, "--resume", *elsewhere]) == 2
        assert message in capsys.readouterr().err
    assert not (workplace / "empty").exists()
