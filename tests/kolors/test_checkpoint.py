"""Reading checkpoint files without copies of the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kolors_nodes.kolors.checkpoint import find_weight_files, iterate_tensors, load_weights_

SIDE = 6000  # 72 MB in float16


def get_own_memory() -> int:
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc; run it on Linux")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_stay_mapped_to_their_file(tmp_path, suffix):
    file = tmp_path / f"model.{suffix}"
    weights = {"weight": torch.ones(SIDE, SIDE, dtype=torch.float16), "bias": torch.ones(SIDE, dtype=torch.float16)}
    save_file(weights, file) if suffix == "safetensors" else torch.save(weights, file)
    del weights
    with torch.device("meta"):
        module = nn.Linear(SIDE, SIDE)
    before = get_own_memory()
    load_weights_(module, iterate_tensors([file]), dtype=torch.float16, source=file)
    assert module.weight.sum(dtype=torch.float64) == SIDE * SIDE  # every page was read
    # A copy would be 72 MB; the allowance is for what torch allocates when it first reads a file.
    assert get_own_memory() - before < 20e6


def test_prefers_safetensors_and_half_precision(tmp_path):
    names = ["pytorch_model.bin", "model.safetensors", "model.fp16.safetensors", "diffusion_pytorch_model.safetensors"]
    for name in names:
        (tmp_path / name).touch()
        expected = {"pytorch_model.bin": "pytorch_model.bin", "model.safetensors": "model.safetensors"}
        found = find_weight_files(tmp_path)[0].name
        assert found == expected.get(name, name)


def test_sharded_half_precision_index(tmp_path):
    """Both spellings of a variant's index that diffusers and transformers have written."""
    for number, index in enumerate(("model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / index).write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
        for shard in ("model-1.safetensors", "model-2.safetensors"):
            (folder / shard).touch()
        assert [file.name for file in find_weight_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]


def test_an_index_never_leads_out_of_its_folder(tmp_path):
    (tmp_path / "secret.safetensors").touch()
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="missing: secret.safetensors"):
        find_weight_files(folder)
