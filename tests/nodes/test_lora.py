"""The LoRA nodes: what they pass on, what they leave alone, and which paths they take."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from kolors_nodes.headless.host import HeadlessHost, use_host
from kolors_nodes.kolors.checkpoint import read_json
from kolors_nodes.kolors.unet import build_unet
from kolors_nodes.lora import files
from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.files import load_lora, save_lora
from kolors_nodes.lora.formats import Lora
from kolors_nodes.lora.names import get_unet_names
from kolors_nodes.nodes.lora import KolorsApplyLora, KolorsLoraLoader, KolorsSaveLora, LoadKolorsLoRA
from kolors_nodes.nodes.models import DEMO_FOLDER, KolorsModel

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def unet():
    """The bundled model's structure with seeded weights; none of these tests may change them."""
    torch.manual_seed(0)
    return build_unet(read_json(DEMO_FOLDER / "unet" / "config.json")).requires_grad_(False)


@pytest.fixture
def model(unet):
    return KolorsModel(unet)


@pytest.fixture
def lora(unet):
    generator = torch.Generator().manual_seed(0)
    size = unet.get_submodule(LAYER).weight.shape[0]
    adapter = LowRank(
        down=torch.randn(4, size, generator=generator), up=torch.randn(size, 4, generator=generator), alpha=8.0
    )
    return Lora(names=get_unet_names(unet), adapters={f"{LAYER}.weight": adapter})


@pytest.fixture
def host(tmp_path):
    with use_host(HeadlessHost(models_dir=tmp_path / "models", output_dir=tmp_path / "output")) as host:
        yield host


@pytest.fixture
def folder(host, lora):
    """The LoRA folder, with one file in a sub-folder."""
    folder = host.get_folders("loras")[0]
    save_lora(lora, folder / "styles" / "a.safetensors", "kohya")
    return folder


def get_change(model, base) -> torch.Tensor:
    name = f"{LAYER}.weight"
    return model.patched_unet.get_parameter(name) - base.unet.get_parameter(name)


def test_the_loader_multiplies_alpha_over_rank_and_strength(model, folder, lora):
    assert "styles/a.safetensors" in KolorsLoraLoader.INPUT_TYPES()["required"]["lora_name"][0]
    (changed,) = KolorsLoraLoader().load_lora(model, "styles/a.safetensors", 0.5)
    adapter = lora.adapters[f"{LAYER}.weight"]
    # A rank of 4 and an alpha of 8: twice, and half of it. The sum with the weight costs a rounding.
    torch.testing.assert_close(get_change(changed, model), adapter.up @ adapter.down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["absolute", "relative", "quoted"])
def test_the_tutorial_s_node_scales_by_its_own_alpha_over_rank(model, folder, lora, kind):
    path = {"absolute": folder / "styles" / "a.safetensors", "relative": "styles/a.safetensors",
            "quoted": f'"{folder / "styles" / "a.safetensors"}"'}[kind]  # fmt: skip
    assert LoadKolorsLoRA.VALIDATE_INPUTS(str(path)) is True
    (changed,) = LoadKolorsLoRA().load_lora(model, str(path), 2.0)
    adapter = lora.adapters[f"{LAYER}.weight"]
    torch.testing.assert_close(get_change(changed, model), adapter.up @ adapter.down / 2, rtol=1e-5, atol=1e-6)


def test_a_strength_of_zero_is_the_model_itself(model, folder, lora):
    assert KolorsLoraLoader().load_lora(model, "styles/a.safetensors", 0.0) == (model,)
    assert LoadKolorsLoRA().load_lora(model, "styles/a.safetensors", 0.0) == (model,)
    assert KolorsApplyLora().apply_lora(model, lora, 0.0) == (model,)
    assert model.patched_unet is model.unet


def test_the_input_is_never_changed_and_branches_get_their_own(model, lora):
    before = copy.deepcopy(model.unet.state_dict())
    (first,) = KolorsApplyLora().apply_lora(model, lora, 1.0)
    (second,) = KolorsApplyLora().apply_lora(first, lora, 1.0)
    (other,) = KolorsApplyLora().apply_lora(model, lora, -3.0)
    torch.testing.assert_close(get_change(second, model), 2 * get_change(first, model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(get_change(other, model), -3 * get_change(first, model), rtol=1e-5, atol=1e-5)
    assert model.loras == ()
    assert len(first.loras) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())


def test_nothing_is_merged_twice(model, lora):
    (changed,) = KolorsApplyLora().apply_lora(model, lora, 1.0)
    assert changed.patched_unet is changed.patched_unet


def test_changing_the_strength_reads_no_file(model, folder, monkeypatch):
    KolorsLoraLoader().load_lora(model, "styles/a.safetensors", 1.0)
    monkeypatch.setattr(files, "read_tensors", None)
    KolorsLoraLoader().load_lora(model, "styles/a.safetensors", 0.5)
    LoadKolorsLoRA().load_lora(model, "styles/a.safetensors", 1.0)


def test_a_changed_file_runs_the_node_again(model, folder, lora):
    before = KolorsLoraLoader.IS_CHANGED("styles/a.safetensors")
    assert KolorsLoraLoader.IS_CHANGED("styles/a.safetensors", strength_model=0.2) == before
    assert LoadKolorsLoRA.IS_CHANGED("styles/a.safetensors") == before
    save_lora(lora, folder / "styles" / "a.safetensors", "diffsynth")
    assert KolorsLoraLoader.IS_CHANGED("styles/a.safetensors") != before


@pytest.mark.parametrize("path", ["../secret.safetensors", "styles/../../secret.safetensors", "..\\secret.safetensors"])
def test_a_path_that_climbs_out_of_the_folder(model, folder, path):
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    with pytest.raises(ValueError, match="outside its folder"):
        LoadKolorsLoRA().load_lora(model, path, 2.0)
    with pytest.raises(ValueError, match="outside its folder"):
        KolorsLoraLoader().load_lora(model, path, 1.0)
    assert "outside its folder" in LoadKolorsLoRA.VALIDATE_INPUTS(path)


@pytest.mark.parametrize(
    ("path", "words"),
    [("", "is empty"), ("missing.safetensors", "was not found"), ("/missing.safetensors", "no such file"),
     ("/etc/hostname", "expected a file ending with")],
)  # fmt: skip
def test_paths_that_are_no_lora(folder, path, words):
    assert words in LoadKolorsLoRA.VALIDATE_INPUTS(path)
    assert LoadKolorsLoRA.VALIDATE_INPUTS(None) is True  # linked: not known before the run


def test_a_broken_file_leaves_the_model_usable(model, folder):
    (folder / "broken.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged"):
        KolorsLoraLoader().load_lora(model, "broken.safetensors", 1.0)
    assert KolorsLoraLoader().load_lora(model, "styles/a.safetensors", 1.0)[0].patched_unet is not model.unet


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "diffsynth"])
def test_what_is_saved_is_found_by_the_loader(model, folder, lora, file_format):
    saved = KolorsSaveLora().save_lora(lora, "mine/b", file_format)
    assert saved["result"] == ("mine/b.safetensors",)
    assert saved["ui"] == {"text": ["mine/b.safetensors"]}
    assert "mine/b.safetensors" in KolorsLoraLoader.INPUT_TYPES()["required"]["lora_name"][0]
    (changed,) = KolorsLoraLoader().load_lora(model, "mine/b.safetensors", 1.0)
    (expected,) = KolorsApplyLora().apply_lora(model, lora, 1.0)
    assert torch.equal(get_change(changed, model), get_change(expected, model))


def test_saving_never_replaces(folder, lora):
    names = [KolorsSaveLora().save_lora(lora, name, "kohya")["result"][0] for name in ("c", "c.safetensors", "c")]
    assert names == ["c.safetensors", "c_2.safetensors", "c_3.safetensors"]


@pytest.mark.parametrize("name", ["", "  ", "../c", "a/../../c", "/tmp/c", "C:/c", "..\\c", ".."])
def test_saving_stays_in_the_folder(folder, lora, name):
    before = sorted(Path(folder).parent.parent.rglob("*"))
    with pytest.raises(ValueError, match="outside of"):
        KolorsSaveLora().save_lora(lora, name, "kohya")
    assert sorted(Path(folder).parent.parent.rglob("*")) == before


def test_unknown_keys_are_ignored_only_when_asked(model, folder, lora):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "styles" / "a.safetensors")
    save_file(tensors | {"lora_unet_extra.lora_up.weight": torch.ones(1)}, folder / "extra.safetensors")
    with pytest.raises(ValueError, match="1 of 4 tensors fit nothing"):
        KolorsLoraLoader().load_lora(model, "extra.safetensors", 1.0)
    (changed,) = KolorsLoraLoader().load_lora(model, "extra.safetensors", 1.0, ignore_unknown=True)
    assert len(changed.loras) == 1
    assert load_lora(folder / "styles" / "a.safetensors", lora.names).unknown_keys == ()
