"""Finding models on the disk, and what is said where they are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless.host import HeadlessHost, use_host
from kolors_nodes.nodes.loaders import list_checkpoints, resolve_checkpoint
from kolors_nodes.nodes.models import (
    DEMO,
    DEMO_FOLDER,
    KOLORS,
    describe_missing,
    find_model,
    find_vae,
    get_command,
    list_vae_folders,
    list_vaes,
)


@pytest.fixture
def host(tmp_path):
    return HeadlessHost(models_dir=tmp_path / "models", output_dir=tmp_path / "output")


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def put_part(folder, part):
    """Writes what a part needs, as small as it can be."""
    put(folder / part / "config.json")
    save_file({"weight": torch.zeros(1)}, folder / part / "model.safetensors")
    put(folder / part / "tokenizer.model")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_missing_part_says_where_it_goes_and_what_fetches_it(host, part):
    """On a machine that may not use the network, as all tests run; with it, see test_fetching.py."""
    with pytest.raises(FileNotFoundError) as error:
        find_model(host, KOLORS, part)
    message = str(error.value)
    assert f"Kolors' {part} is not in {host.models_dir / 'diffusers' / 'Kolors'}: {part}/config.json" in message
    assert f' download --what {part} --models-dir "{host.models_dir}"' in message
    assert message == describe_missing(host, KOLORS, part)


def test_the_command_that_fetches_works_uninstalled_too(host, monkeypatch):
    folder = host.models_dir / "diffusers" / "Kolors"
    monkeypatch.setattr("shutil.which", lambda name: "/bin/kolors")
    assert get_command(folder, "unet") == f'kolors download --what unet --models-dir "{host.models_dir}"'
    assert get_command(Path("/elsewhere/Kolors"), "tokenizer") == "kolors download --what text_encoder"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert get_command(folder, "unet").startswith(f'"{sys.executable}" "{Path(__file__).parents[2]}" download ')


def test_one_part_does_not_hide_that_another_is_missing(host):
    """A pack that takes the folder for the model never downloads the rest."""
    put_part(host.models_dir / "diffusers" / "Kolors", "text_encoder")
    assert find_model(host, KOLORS, "text_encoder").name == "Kolors"
    assert find_model(host, KOLORS, "tokenizer").name == "Kolors"
    with pytest.raises(FileNotFoundError):
        find_model(host, KOLORS, "unet")


@pytest.mark.parametrize("folder", ["", "diffusers"])
def test_a_clone_of_the_model_in_place_of_the_model_folders(host, folder):
    """Somebody's ~/Kolors as --models-dir; a part counts only if it is whole, as models/unet has another meaning."""
    clone = host.models_dir / folder
    put_part(clone, "unet")
    put_part(clone, "text_encoder")
    assert find_model(host, KOLORS, "unet") == find_model(host, KOLORS, "text_encoder") == clone
    (clone / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="diffusers/Kolors: unet/config.json"):
        find_model(host, KOLORS, "unet")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_part_that_lacks_a_file_names_it(host, name):
    folder = host.models_dir / "diffusers" / "Kolors"
    put_part(folder, "text_encoder")
    (folder / "text_encoder" / name).unlink()
    missing = {
        "model.safetensors": "text_encoder/model.fp16.safetensors",
        "tokenizer.model": "tokenizer/tokenizer.model",
    }
    expected = missing.get(name, f"text_encoder/{name}")
    with pytest.raises(FileNotFoundError, match=f": {expected} is missing"):
        find_model(host, KOLORS, "text_encoder")


@pytest.mark.parametrize("name", ["Kolors", "Kolors-diffusers", "Kwai-Kolors/Kolors"])
def test_finds_the_usual_folder_names(host, name):
    put_part(host.models_dir / "diffusers" / name, "unet")
    assert find_model(host, KOLORS, "unet") == host.models_dir / "diffusers" / name


def test_a_whole_part_goes_before_a_begun_one(host):
    put(host.models_dir / "diffusers" / "Kolors" / "unet" / "config.json")
    put_part(host.models_dir / "diffusers" / "Kolors-diffusers", "unet")
    assert find_model(host, KOLORS, "unet").name == "Kolors-diffusers"


def test_a_begun_part_is_completed_where_it_is(host):
    put(host.models_dir / "diffusers" / "Kolors-diffusers" / "unet" / "config.json")
    with pytest.raises(FileNotFoundError, match="Kolors-diffusers: unet/diffusion_pytorch_model.fp16.safetensors"):
        find_model(host, KOLORS, "unet")


def test_the_bundled_model_is_always_there(host):
    assert find_model(host, DEMO, "unet") == DEMO_FOLDER


def test_an_unknown_choice(host):
    with pytest.raises(ValueError, match="No model is called 'SDXL'"):
        find_model(host, "SDXL", "unet")


def test_vae_folders(host):
    put(host.models_dir / "diffusers" / "Kolors" / "vae" / "config.json")
    assert list(list_vae_folders(host)) == [DEMO, "diffusers/Kolors/vae"]


def test_the_published_vae_is_listed_there_or_not(host):
    assert list_vaes(host) == [DEMO, "sdxl.vae.safetensors"]
    with pytest.raises(FileNotFoundError, match="Kolors' vae is not in .*: sdxl.vae.safetensors is missing") as error:
        find_vae(host, "sdxl.vae.safetensors")
    assert f' download --what vae --models-dir "{host.models_dir}"' in str(error.value)
    with use_host(host):
        assert NODE_CLASS_MAPPINGS["KolorsVAELoader"].VALIDATE_INPUTS("sdxl.vae.safetensors") == str(error.value)
    put(host.models_dir / "vae" / "another.safetensors")
    assert list_vaes(host) == [DEMO, "another.safetensors", "sdxl.vae.safetensors"]
    put(host.models_dir / "vae" / "sdxl.vae.safetensors")
    assert list_vaes(host) == [DEMO, "another.safetensors", "sdxl.vae.safetensors"]


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
