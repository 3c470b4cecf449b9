"""The commands convert-lora and inspect-lora."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolors_nodes.headless.command import main

KEY = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def source(tmp_path):
    """A file as DiffSynth-Studio writes it: a flat checkpoint of one layer without alpha."""
    path = tmp_path / "epoch=0-step=500.ckpt"
    start = "blocks.7.transformer_blocks.0.attn1.to_q"
    torch.save({f"{start}.lora_A.default.weight": torch.ones(4, 640),
                f"{start}.lora_B.default.weight": torch.full((640, 4), 0.5)}, path)  # fmt: skip
    return path


def test_a_diffsynth_checkpoint_becomes_a_kohya_file(tmp_path, source, capsys):
    target = tmp_path / "lora.safetensors"
    assert main(["convert-lora", str(source), str(target), "--to", "kohya", "--alpha", "2"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    tensors = load_file(target)
    assert set(tensors) == {f"lora_unet_{KEY}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert tensors[f"lora_unet_{KEY}.alpha"] == 2
    assert torch.equal(tensors[f"lora_unet_{KEY}.lora_up.weight"], torch.full((640, 4), 0.5))


def test_an_unknown_alpha_is_told(tmp_path, source, capsys):
    assert main(["convert-lora", str(source), str(tmp_path / "lora.safetensors"), "--to", "diffusers"]) == 0
    assert "stores no alpha" in capsys.readouterr().err
    assert main(["inspect-lora", str(source)]) == 0
    assert "not stored, alpha = rank is assumed" in capsys.readouterr().out


def test_and_back_again(tmp_path, source):
    steps = [("kohya", "a.safetensors"), ("diffusers", "b.safetensors"), ("diffsynth", "c.ckpt")]
    path = source
    for file_format, name in steps:
        target = tmp_path / name
        assert main(["convert-lora", str(path), str(target), "--to", file_format]) == 0
        path = target
    before, after = torch.load(source, weights_only=True), torch.load(path, weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_inspecting(tmp_path, source, capsys):
    target = tmp_path / "lora.safetensors"
    main(["convert-lora", str(source), str(target), "--to", "kohya", "--alpha", "2"])
    tensors = load_file(target)
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(1)
    tensors["lora_unet_nothing.lora_up.weight"] = torch.ones(1)
    save_file(tensors, target, metadata={"ss_tag": "\x1b[31m" + "x" * 500})
    capsys.readouterr()
    assert main(["inspect-lora", str(target)]) == 0
    text = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in text.replace("left out", "left_out").replace("not used", "unused")
                 .splitlines())  # fmt: skip
    assert (lines["format"], lines["kind"], lines["rank"], lines["dtype"]) == ("kohya", "LoRA", "4", "float32")
    assert lines["alpha"] == "2 (alpha / rank: 0.5)"
    assert lines["modules"] == "1 of 560 in attention, 0 others"
    assert lines["left_out"].startswith("1 tensors for text encoders that Kolors lacks: lora_te1_")
    assert lines["unused"].startswith("1 tensors that fit nothing in the UNet: lora_unet_nothing")
    assert "\x1b" not in text  # a header is foreign text
    assert main(["inspect-lora", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ranks"], found["alphas"], found["modules"]) == ({"4": 1}, {"2": 1}, 1)
    assert found["unused"] == ["lora_unet_nothing.lora_up.weight"]


def test_the_bundled_model_has_other_names(tmp_path, capsys):
    path = tmp_path / "tiny.safetensors"
    save_file({f"lora_unet_{KEY}.lora_down.weight": torch.ones(4, 96),
               f"lora_unet_{KEY}.lora_up.weight": torch.ones(96, 4)}, path)  # fmt: skip
    assert main(["inspect-lora", str(path), "--demo"]) == 0
    assert main(["inspect-lora", str(path)]) == 2
    assert "(96, 96), but this one is (640, 640)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["inspect-lora", "{}"], ["convert-lora", "{}", "out.safetensors", "--to", "kohya"]]
)
def test_mistakes_are_told_in_a_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"half a file")
    flux = tmp_path / "flux.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(1)}, flux)
    for path, words in ((broken, "damaged"), (flux, "Flux"), (tmp_path / "missing.ckpt", "There is no LoRA file")):
        assert main([argument.format(path) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*(argument.format(broken) for argument in arguments), "--nonsense"]) == 2


def test_mistakes_as_json(tmp_path, capsys):
    assert main(["inspect-lora", str(tmp_path / "missing.ckpt"), "--json"]) == 2
    assert "There is no LoRA file" in json.loads(capsys.readouterr().out)["error"]
