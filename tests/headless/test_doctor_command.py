"""``kolors doctor`` on whole, broken and misplaced files of full size, all of them holes."""

from __future__ import annotations

import importlib.metadata
import io
import json

import pytest

from kolors_nodes.headless import doctor_command
from kolors_nodes.headless.command import build_parser, main
from kolors_nodes.kolors.precision import TEXT_PRECISIONS, UNET_PRECISIONS

from ..files import get_chatglm_shapes, get_unet_shapes, get_vae_shapes, write_chatglm, write_holes, write_pickle

CARD = {"device": "cpu", "name": "a test", "total": 24_000_000_000, "free": 20_000_000_000}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A whole Kolors as ``kolors download`` leaves it, on a machine with 20 GB of free memory."""
    monkeypatch.setattr(doctor_command, "get_device", lambda name: dict(CARD))
    models = tmp_path / "models"
    folder = models / "diffusers" / "Kolors"
    write_holes(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", get_unet_shapes())
    shapes = list(get_chatglm_shapes().items())
    for number in range(7):
        write_pickle(folder / "text_encoder" / f"pytorch_model-{number + 1:05}-of-00007.bin", dict(shapes[number::7]))
    for part in ("unet", "text_encoder"):
        (folder / part / "config.json").write_text('{"encoder_hid_dim_type": "text_proj"}')
    from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG

    (folder / "unet" / "config.json").write_text(json.dumps(dict(KOLORS_UNET_CONFIG)))
    (folder / "text_encoder" / "tokenizer.model").write_bytes(b"tokenizer")
    write_holes(models / "vae" / "sdxl.vae.safetensors", get_vae_shapes())
    return models


@pytest.fixture
def examine(models, capsys):
    """Runs the command and gives its exit status and its report."""

    def examine(*arguments: str) -> tuple[int, dict]:
        status = main(["doctor", "--models-dir", str(models), "--json", *arguments])
        return status, json.loads(capsys.readouterr().out)

    return examine


def list_problems(report) -> dict[str, str]:
    return {finding["part"]: finding["problem"] for finding in report["findings"] if finding["problem"]}


def test_all_is_well(examine, models):
    status, report = examine()
    assert (status, report["can_draw"], report["obstacles"], list_problems(report)) == (0, True, [], {})
    found = {finding["part"]: (finding["kind"], finding["precision"]) for finding in report["findings"]}
    assert found == {
        "unet": ("KOLORS_UNET", "fp16"), "text_encoder": ("CHATGLM3", "fp16"), "vae": ("VAE", "fp16"),
    }  # fmt: skip
    assert report["tokenizer"] == str(models / "diffusers" / "Kolors" / "text_encoder" / "tokenizer.model")
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert list(report["weight_bytes"]["unet"]) == list(UNET_PRECISIONS)
    assert list(report["weight_bytes"]["text_encoder"]) == list(TEXT_PRECISIONS)
    assert all(report["fits"]["unet"].values()) and all(report["fits"]["text_encoder"].values())


def test_one_screen(models, capsys):
    assert main(["doctor", "--models-dir", str(models)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Kolors can draw a picture here.\n")
    assert out.count("\n") <= 24
    for text in ("unet          ok", "text_encoder  ok", "vae           ok", "tokenizer     ok", "quant4 3.92 GB +"):
        assert text in out


def test_nothing_is_there(examine, models):
    import shutil

    shutil.rmtree(models)
    status, report = examine()
    assert (status, report["findings"], report["tokenizer"]) == (1, [], "")
    assert report["obstacles"] == ["no whole unet", "no whole text_encoder", "no whole vae", "no tokenizer.model"]
    assert f'download --what unet,text_encoder,vae --models-dir "{models}"' in report["command"]


def truncate(file):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def break_unet(models):
    truncate(models / "diffusers" / "Kolors" / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def lose_shard(models):
    (models / "diffusers" / "Kolors" / "text_encoder" / "pytorch_model-00004-of-00007.bin").unlink()


def lose_configuration(models):
    (models / "diffusers" / "Kolors" / "unet" / "config.json").unlink()


def upload_early(models):
    shapes = {name: shape for name, shape in get_unet_shapes().items() if not name.startswith("encoder_hid_proj")}
    write_holes(models / "diffusers" / "Kolors" / "unet" / "diffusion_pytorch_model.fp16.safetensors", shapes)


def swap_vae(models):
    write_holes(models / "vae" / "sdxl.vae.safetensors", get_vae_shapes(16))


def break_vae(models):
    truncate(models / "vae" / "sdxl.vae.safetensors")


BREAKAGES = {
    "truncated": (break_unet, "unet", "incomplete download"),
    "missing shard": (lose_shard, "text_encoder", "6 of 7 weight files"),
    "missing configuration": (lose_configuration, "unet", "Missing file"),
    "early upload": (upload_early, "unet", "early, faulty upload"),
    "truncated VAE": (break_vae, "vae", "incomplete download"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_what_is_broken_is_named_and_fetched(examine, models, name):
    break_it, part, message = BREAKAGES[name]
    break_it(models)
    status, report = examine()
    assert (status, report["obstacles"]) == (1, [f"no whole {part}"])
    assert list(list_problems(report)) == [part]
    assert message in list_problems(report)[part]
    assert f"--what {part} " in report["command"]


def test_another_model_s_vae_is_none_of_kolors(examine, models):
    swap_vae(models)
    status, report = examine()
    assert (status, report["obstacles"]) == (1, ["no whole vae"])


def test_single_files_serve_as_well(examine, models):
    """A UNet in diffusion_models, a quantised text encoder in LLM: of diffusers only the tokenizer is needed."""
    lose_shard(models)
    break_unet(models)
    write_holes(models / "unet" / "kolors.safetensors", get_unet_shapes(), "F8_E4M3")
    write_chatglm(models / "LLM" / "checkpoints" / "chatglm3.safetensors", 4)
    status, report = examine()
    assert (status, report["can_draw"]) == (0, True)
    whole = {(finding["part"], finding["precision"]) for finding in report["findings"] if not finding["problem"]}
    assert whole == {("unet", "fp8"), ("text_encoder", "int4"), ("vae", "fp16")}


def test_a_clone_of_the_model_as_the_model_folders(examine, models):
    (models / "diffusers" / "Kolors").rename(models.parent / "clone")
    status, report = examine("--models-dir", str(models.parent / "clone"))
    assert (status, report["obstacles"]) == (1, ["no whole vae"])
    assert [finding["path"] for finding in report["findings"]] == [
        str(models.parent / "clone" / part) for part in ("unet", "text_encoder")
    ]


def test_misplaced_files_are_told_where_to_go(examine, models):
    """The UNet among the checkpoints was a common complaint."""
    write_holes(models / "checkpoints" / "kolors.safetensors", get_unet_shapes())
    write_chatglm(models / "diffusion_models" / "chatglm3.safetensors")
    write_holes(models / "LLM" / "vae.safetensors", get_vae_shapes())
    write_holes(models / "checkpoints" / "sdxl.safetensors", get_unet_shapes(is_kolors=False))  # rightly elsewhere
    _, report = examine()
    assert {path.rsplit("/", 2)[-2]: text for path, text in report["misplaced"].items()} == {
        "checkpoints": "Kolors' UNet; it belongs in models/diffusion_models, for Load Kolors UNet (with its "
        "config.json also in models/diffusers/Kolors/unet)",
        "diffusion_models": "ChatGLM3; it belongs in models/LLM, for Load ChatGLM3 Model (with its config.json also in "
        "models/diffusers/Kolors/text_encoder)",
        "LLM": "a VAE of SDXL's kind; it belongs in models/vae, for Load Kolors VAE or ComfyUI's Load VAE",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("free", "unet", "text_encoder"),
    [
        (8_000_000_000, ["bf16", "fp8", "nf4"], ["quant4", "quant8"]),
        (5_000_000_000, ["fp8", "nf4"], ["quant4"]),
        (1_000_000_000, [], []),
    ],
)
def test_what_fits(examine, monkeypatch, free, unet, text_encoder):
    monkeypatch.setattr(doctor_command, "get_device", lambda name: {**CARD, "free": free})
    status, report = examine("--device", "cpu")
    fitting = {part: [name for name, fits in found.items() if fits] for part, found in report["fits"].items()}
    assert fitting == {"unet": unet, "text_encoder": text_encoder}
    assert status == (0 if unet else 1)
    assert [text.partition(" fits")[0] for text in report["obstacles"]] == (
        [] if unet else ["no unet", "no text_encoder"]
    )


def test_packages_that_lack_or_are_too_old(models, monkeypatch, capsys):
    versions = {"diffusers": "0.2.0"}

    def get_version(name: str) -> str:
        if name == "sentencepiece":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, "99.0")

    monkeypatch.setattr(doctor_command.importlib.metadata, "version", get_version)
    out = io.StringIO()
    options = build_parser().parse_args(["doctor", "--models-dir", str(models)])
    assert doctor_command.run_doctor(options, out) == 1
    assert "sentencepiece missing: pip install -r" in out.getvalue()
    assert "diffusers 0.2.0, but 0." in out.getvalue()


def test_a_device_that_is_none(capsys):
    assert main(["doctor", "--device", "gpu"]) == 2
    assert "device is 'gpu'" in capsys.readouterr().err


def test_the_memory_of_this_machine():
    import os

    device = doctor_command.get_device("cpu")
    assert 0 < device["free"] <= device["total"]
    assert device["name"] == f"{os.cpu_count()} cores"
