"""LoRA files on disk: damaged, dangerous and changed ones, and whole writing."""

from __future__ import annotations

import json
import logging
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from kolors_nodes.lora import files
from kolors_nodes.lora.files import load_lora, save_lora
from kolors_nodes.lora.formats import LoraError, to_tensors


@pytest.fixture
def lora(names, make_lora):
    return make_lora(names, alpha=2.0)


@pytest.mark.parametrize(
    ("file_format", "suffix"),
    [("diffusers", "safetensors"), ("kohya", "safetensors"), ("diffsynth", "safetensors"), ("diffsynth", "ckpt")],
)
def test_round_trip(tmp_path, names, lora, file_format, suffix):
    path = save_lora(lora, tmp_path / "new folder" / f"lora.{suffix}", file_format, metadata={"steps": "390"})
    found = load_lora(path, names)
    assert found.adapters.keys() == lora.adapters.keys()
    for name, adapter in lora.adapters.items():
        assert torch.equal(found.adapters[name].down, adapter.down)
        assert torch.equal(found.adapters[name].up, adapter.up)
        assert found.adapters[name].alpha == 2.0
    if suffix == "safetensors":
        assert (found.metadata["steps"], found.metadata["rank"], found.metadata["alpha"]) == ("390", "4", "2")
    assert os.listdir(path.parent) == [path.name]


def test_the_content_decides_not_the_suffix(tmp_path, names, lora):
    tensors, _ = to_tensors(lora, "kohya")
    torch.save(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "nested.ckpt")
    save_file(tensors, tmp_path / "b.ckpt")
    for name in ("a.safetensors", "b.ckpt", "old.ckpt", "nested.ckpt"):
        assert len(load_lora(tmp_path / name, names).adapters) == len(lora.adapters)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_truncated_file(tmp_path, names, lora, suffix):
    """Wherever it was cut, it is one clear error."""
    path = save_lora(lora, tmp_path / f"whole.{suffix}", "diffsynth")
    content = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    for length in (1, 8, 9, 100, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(LoraError, match="damaged|holds more than tensors"):
            load_lora(cut, names)


def test_a_legacy_checkpoint_that_was_cut(tmp_path, names, lora):
    path = tmp_path / "legacy.ckpt"
    torch.save(to_tensors(lora, "kohya")[0], path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for length in range(1, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(LoraError, match="damaged|holds more than tensors"):
            load_lora(path, names)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (self.folder,)

    def __init__(self, folder):
        self.folder = folder


@pytest.mark.parametrize("container", ["zip", "legacy", "plain pickle"])
def test_a_pickle_with_code_in_it(tmp_path, names, container):
    path, mark = tmp_path / "trap.ckpt", tmp_path / "the code ran"
    content = {"blocks.7.lora_A.weight": torch.ones(2), "x": Trap(str(mark))}
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(Trap(str(mark))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(LoraError, match="refused: it holds more than tensors"):
        load_lora(path, names)
    assert not mark.exists()


def test_an_empty_file(tmp_path, names):
    path = tmp_path / "empty.safetensors"
    path.touch()
    with pytest.raises(LoraError, match="is empty"):
        load_lora(path, names)


def test_no_file_and_a_folder(tmp_path, names):
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no LoRA file"):
            load_lora(path, names)


def test_other_content(tmp_path, names):
    path = tmp_path / "page.safetensors"
    path.write_text("<html>Sign in to download this file</html>")
    with pytest.raises(LoraError, match="neither safetensors nor a torch checkpoint"):
        load_lora(path, names)
    torch.save([torch.ones(2)], path)
    with pytest.raises(LoraError, match="no flat table of tensors"):
        load_lora(path, names)


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path, names, lora, monkeypatch):
    path = save_lora(lora, tmp_path / "lora.safetensors", "kohya")
    read = []
    monkeypatch.setattr(files, "read_tensors", lambda path, real=files.read_tensors: read.append(path) or real(path))
    assert load_lora(path, names) is load_lora(path, names)
    assert len(read) == 1
    save_lora(lora.with_alpha(4.0), path, "kohya")
    assert next(iter(load_lora(path, names).adapters.values())).alpha == 4.0
    assert len(read) == 2


def test_overwriting_a_file_in_use_changes_nothing_that_was_loaded(tmp_path, names, lora):
    path = save_lora(lora, tmp_path / "lora.safetensors", "kohya")
    found = load_lora(path, names)
    path.write_bytes(bytes(path.stat().st_size))
    for name, adapter in lora.adapters.items():
        assert torch.equal(found.adapters[name].down, adapter.down)


def test_peft_s_configuration_beside_its_file(tmp_path, names, lora):
    tensors = {f"base_model.model.{name.removesuffix('.weight')}.lora_{letter}.weight": tensor
               for name, adapter in lora.adapters.items()
               for letter, tensor in (("A", adapter.down), ("B", adapter.up))}  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12, "peft_type": "LORA"}))
    found = load_lora(tmp_path / "adapter_model.safetensors", names)
    assert {adapter.scale for adapter in found.adapters.values()} == {3.0}


def test_a_failed_save_leaves_the_old_file(tmp_path, lora, monkeypatch):
    path = save_lora(lora, tmp_path / "lora.ckpt", "diffsynth")
    content = path.read_bytes()

    def fill_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(OSError, match="No space"):
        save_lora(lora.with_alpha(1.0), path, "diffsynth")
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["lora.ckpt"]


@pytest.mark.parametrize(("name", "file_format"), [("a.ckpt", "kohya"), ("a.ckpt", "diffusers"), ("a", "diffsynth")])
def test_suffixes_that_a_format_has_not(tmp_path, lora, name, file_format):
    with pytest.raises(LoraError, match="expected a name ending with .safetensors"):
        save_lora(lora, tmp_path / name, file_format)
    assert os.listdir(tmp_path) == []


def test_a_scale_that_comfyui_would_not_see_is_told(tmp_path, lora, caplog):
    caplog.set_level(logging.WARNING, "kolors_nodes")
    save_lora(lora.with_alpha(4.0), tmp_path / "a.safetensors", "diffusers")
    save_lora(lora, tmp_path / "b.safetensors", "kohya")
    assert "ComfyUI" not in caplog.text
    save_lora(lora, tmp_path / "c.safetensors", "diffusers")
    assert "For ComfyUI's own LoRA loader write it as kohya" in caplog.text
