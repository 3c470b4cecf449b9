"""The headless host: folders, file names that stay inside them, devices, numbering of saved files."""

from __future__ import annotations

import os
import re
import time

import pytest

from kolors_nodes.headless import HeadlessHost
from kolors_nodes.headless.host import find_comfyui_folder


@pytest.fixture
def host(tmp_path) -> HeadlessHost:
    return HeadlessHost(
        models_dir=tmp_path / "models", input_dir=tmp_path / "input", output_dir=tmp_path / "out", device="cpu"
    )


def put(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_folders_have_comfyuis_names(host):
    def folders(kind):
        return [path.relative_to(host.models_dir).as_posix() for path in host.get_folders(kind)]

    assert folders("vae") == ["vae"]
    assert folders("diffusers") == ["diffusers"]
    assert folders("LLM") == ["LLM"]
    assert folders("text_encoders") == folders("clip") == ["text_encoders", "clip"]
    assert folders("diffusion_models") == folders("unet") == ["unet", "diffusion_models"]


def test_files_are_listed_with_their_subfolders_and_only_models_where_comfyui_filters(host):
    for name in ("vae/b.safetensors", "vae/sub/a.SFT", "vae/readme.txt", "LLM/x/config.json"):
        put(host.models_dir / name)
    put(host.models_dir / "vae/.git/c.safetensors")
    assert host.list_files("vae") == ["b.safetensors", "sub/a.SFT"]
    assert host.list_files("LLM") == ["x/config.json"]
    assert host.list_files("loras") == []


def test_a_file_is_found_in_any_of_its_folders(host):
    path = put(host.models_dir / "clip" / "sub" / "a.safetensors")
    assert host.resolve_file("text_encoders", "sub/a.safetensors") == path
    assert host.resolve_file("text_encoders", "sub\\a.safetensors") == path  # saved on Windows


EXTRA = """
comfyui:
    base_path: {base}
    is_default: true
    checkpoints: models/checkpoints/
    unet: |
        models/unet
        models/more
others:
    LLM: relative/LLM
    vae: {base}/vae
empty:
"""


def test_extra_model_paths_are_read_as_comfyui_does(tmp_path):
    base = tmp_path / "elsewhere"
    (tmp_path / "extra_model_paths.yaml").write_text(EXTRA.format(base=base))
    host = HeadlessHost(models_dir=tmp_path / "models", device="cpu")
    own = tmp_path / "models"
    # Of a default section each folder goes to the front, so the last one comes first.
    expected = [base / "models" / "more", base / "models" / "unet", own / "unet", own / "diffusion_models"]
    assert host.get_folders("diffusion_models") == host.get_folders("unet") == expected
    assert host.get_folders("LLM") == [own / "LLM", tmp_path / "relative" / "LLM"]
    assert host.get_folders("vae") == [own / "vae", base / "vae"]
    put(tmp_path / "relative" / "LLM" / "chatglm3.safetensors")
    assert host.list_files("LLM") == ["chatglm3.safetensors"]
    assert host.resolve_file("LLM", "chatglm3.safetensors").parent == tmp_path / "relative" / "LLM"


@pytest.mark.parametrize("text", ["a: [1", "- vae", "a:\n  vae: 3", "a: text"])
def test_malformed_extra_model_paths_are_told(tmp_path, text):
    (tmp_path / "extra_model_paths.yaml").write_text(text)
    with pytest.raises(ValueError, match="extra_model_paths.yaml is no list of model folders"):
        HeadlessHost(models_dir=tmp_path / "models", device="cpu")


def test_a_missing_file_is_told_with_the_folders(host):
    with pytest.raises(FileNotFoundError) as caught:
        host.resolve_file("clip", "absent.safetensors")
    for text in ("absent.safetensors", str(host.models_dir / "text_encoders"), str(host.models_dir / "clip")):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "C:\\x", "..\\x", "", ".", "a\0b"])
def test_no_name_leads_out_of_its_folder(host, name):
    with pytest.raises(ValueError, match="outside its folder"):
        host.resolve_file("vae", name)
    with pytest.raises(ValueError, match="outside its folder"):
        host.resolve_upload(name)


def test_uploads_may_name_their_folder(host):
    assert host.resolve_upload("a/b.png") == host.input_dir / "a/b.png"
    assert host.resolve_upload("b.png [output]") == host.output_dir / "b.png"
    assert host.resolve_upload("b.png[temp]") == host.temp_dir / "b.png"
    with pytest.raises(ValueError, match="outside its folder"):
        host.resolve_upload("../b.png [output]")


def test_saved_files_are_numbered_behind_the_last_one(host):
    first = host.get_save_path("ComfyUI", host.output_dir)
    assert (first.folder, first.get_name(0, ".png"), first.subfolder) == (host.output_dir, "ComfyUI_00001_.png", "")
    assert first.get_name(1, ".png") == "ComfyUI_00002_.png"
    for name in ("ComfyUI_00007_.png", "ComfyUI_x_00099_.png", "Other_00050_.png", "ComfyUI_12.png"):
        put(host.output_dir / name)
    assert host.get_save_path("ComfyUI", host.output_dir).counter == 8


def test_prefixes_make_subfolders_and_fill_in_values(host):
    place = host.get_save_path("a/b/%width%x%height%_%year%-%month%-%day%", host.output_dir, width=64, height=32)
    assert place.subfolder == "a/b"
    assert place.folder.is_dir()
    assert place.stem == time.strftime("64x32_%Y-%m-%d")
    clock = host.get_save_path("%hour%%minute%%second%", host.output_dir).stem
    assert re.fullmatch(r"\d{6}", clock)


def test_batch_numbers_do_not_overwrite_earlier_files(host):
    put(host.output_dir / "pic0_00003_.png")
    place = host.get_save_path("pic%batch_num%", host.output_dir)
    assert [place.get_name(index, ".png") for index in (0, 1)] == ["pic0_00004_.png", "pic1_00005_.png"]


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/tmp/x", "", "a/.."])
def test_no_prefix_leads_out_of_the_output_folder(host, prefix):
    with pytest.raises(ValueError, match="filename_prefix"):
        host.get_save_path(prefix, host.output_dir)
    assert not host.output_dir.exists()


def test_checking_the_output_folder_leaves_nothing_behind(host, tmp_path):
    host.check_output_dir()
    assert list(tmp_path.iterdir()) == []
    put(tmp_path / "file")
    with pytest.raises(OSError, match="file, not a folder"):
        HeadlessHost(output_dir=tmp_path / "file" / "out").check_output_dir()


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="needs a user whom file permissions stop: run as an ordinary user on Linux or macOS",
)
def test_a_folder_without_permission_is_told(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        HeadlessHost(output_dir=tmp_path / "out").check_output_dir()


def test_a_device_that_is_not_there_is_told():
    assert HeadlessHost(device="cpu").get_device() == "cpu"
    with pytest.raises(ValueError, match="device is cuda:99"):
        HeadlessHost(device="cuda:99").get_device()


def test_the_comfyui_folder_is_the_one_the_pack_sits_in(monkeypatch, tmp_path):
    from kolors_nodes.headless import host as module

    assert find_comfyui_folder() is None or find_comfyui_folder().joinpath("custom_nodes").is_dir()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "custom_nodes" / "pack" / "headless" / "host.py"))
    assert HeadlessHost().models_dir == tmp_path / "models"
    assert HeadlessHost().input_dir == tmp_path / "input"
    assert HeadlessHost().output_dir != tmp_path / "output"
