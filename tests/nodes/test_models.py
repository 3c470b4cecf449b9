"""Finding models on the disk, and what is said where they are missing."""

from __future__ import annotations

import pytest

from kolors_nodes.headless.host import HeadlessHost
from kolors_nodes.nodes.loaders import list_checkpoints, resolve_checkpoint
from kolors_nodes.nodes.models import DEMO, DEMO_FOLDER, KOLORS, find_model, list_vae_folders


@pytest.fixture
def host(tmp_path):
    return HeadlessHost(models_dir=tmp_path / "models", output_dir=tmp_path / "output")


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_missing_part_says_where_it_goes_and_what_fetches_it(host, part):
    with pytest.raises(FileNotFoundError) as error:
        find_model(host, KOLORS, part)
    message = str(error.value)
    assert str(host.models_dir / "diffusers" / "Kolors" / part) in message
    assert "hf download Kwai-Kolors/Kolors" in message
    assert f"{part}/" in message


def test_one_part_does_not_hide_that_another_is_missing(host):
    """A pack that takes the folder for the model never downloads the rest."""
    put(host.models_dir / "diffusers" / "Kolors" / "text_encoder" / "config.json")
    assert find_model(host, KOLORS, "text_encoder").name == "Kolors"
    with pytest.raises(FileNotFoundError):
        find_model(host, KOLORS, "unet")


@pytest.mark.parametrize("name", ["Kolors", "Kolors-diffusers", "Kwai-Kolors/Kolors"])
def test_finds_the_usual_folder_names(host, name):
    put(host.models_dir / "diffusers" / name / "unet" / "config.json")
    assert find_model(host, KOLORS, "unet") == host.models_dir / "diffusers" / name


def test_the_bundled_model_is_always_there(host):
    assert find_model(host, DEMO, "unet") == DEMO_FOLDER


def test_an_unknown_choice(host):
    with pytest.raises(ValueError, match="No model is called 'SDXL'"):
        find_model(host, "SDXL", "unet")


def test_vae_folders(host):
    put(host.models_dir / "diffusers" / "Kolors" / "vae" / "config.json")
    assert list(list_vae_folders(host)) == [DEMO, "diffusers/Kolors/vae"]


def test_single_files_with_and_without_the_folder_checkpoints(host):
    """The existing pack lists models/LLM/checkpoints, so saved workflows hold the bare name."""
    put(host.models_dir / "LLM" / "checkpoints" / "chatglm3-fp16.safetensors")
    put(host.models_dir / "LLM" / "other.safetensors")
    assert list_checkpoints(host) == ["chatglm3-fp16.safetensors", "other.safetensors"]
    assert resolve_checkpoint(host, "chatglm3-fp16.safetensors").parent.name == "checkpoints"
    with pytest.raises(FileNotFoundError, match="there is: chatglm3-fp16.safetensors, other.safetensors"):
        resolve_checkpoint(host, "missing.safetensors")
    with pytest.raises(ValueError):
        resolve_checkpoint(host, "../../secret.safetensors")
