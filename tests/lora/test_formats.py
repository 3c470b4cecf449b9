"""Reading every spelling, writing three formats, and what is said about files that do not fit."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.formats import LoraError, parse_lora, to_tensors
from kolors_nodes.lora.names import COMFYUI, DIFFSYNTH, DIFFUSERS, KOHYA, KOHYA_SGM, PEFT, WRITABLE, get_kolors_names


def spell(lora, prefix, down, up, alpha=None) -> dict[str, torch.Tensor]:
    """A LoRA's tensors under keys made by ``prefix``, a function of a module, and endings."""
    tensors = {}
    for name, adapter in lora.adapters.items():
        start = prefix(lora.names.by_diffusers[name.removesuffix(".weight")])
        tensors[start + down], tensors[start + up] = adapter.down, adapter.up
        if alpha:
            tensors[start + alpha] = torch.tensor(adapter.alpha)
    return tensors


def flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


KOHYA_ENDINGS = (".lora_down.weight", ".lora_up.weight", ".alpha")
SPELLINGS = {
    "DiffSynth": (DIFFSYNTH, lambda module: module.diffsynth,
                  ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": (DIFFUSERS, lambda module: f"unet.{module.diffusers}", ".lora_A.weight", ".lora_B.weight"),
    "peft": (PEFT, lambda module: f"base_model.model.{module.diffusers}", ".lora_A.weight", ".lora_B.weight"),
    "peft in diffusers": (DIFFUSERS, lambda module: f"unet.base_model.model.{module.diffusers}",
                          ".lora_A.weight", ".lora_B.weight"),
    "peft, named adapter": (PEFT, lambda module: module.diffusers, ".lora_A.my-style.weight",
                            ".lora_B.my-style.weight"),
    "diffusers, older": (DIFFUSERS, lambda module: f"unet.{module.processor}", "_lora.down.weight", "_lora.up.weight"),
    "diffusers, oldest": (PEFT, lambda module: module.processor, "_lora.down.weight", "_lora.up.weight"),
    "diffusers, lora.down": (DIFFUSERS, lambda module: f"unet.{module.diffusers}",
                             ".lora.down.weight", ".lora.up.weight"),
    "kohya": (KOHYA_SGM, lambda module: flat(module.sgm), *KOHYA_ENDINGS),
    "kohya, diffusers names": (KOHYA, lambda module: flat(module.diffusers), *KOHYA_ENDINGS),
    "ComfyUI": (COMFYUI, lambda module: f"diffusion_model.{module.sgm}", *KOHYA_ENDINGS),
    "ComfyUI, peft endings": (COMFYUI, lambda module: f"diffusion_model.{module.sgm}",
                              ".lora_A.weight", ".lora_B.weight", ".alpha"),
}  # fmt: skip


def assert_same(actual, expected, *, alpha=True):
    assert actual.adapters.keys() == expected.adapters.keys()
    for name, adapter in expected.adapters.items():
        found = actual.adapters[name]
        assert found.tensors.keys() == adapter.tensors.keys()
        for part, tensor in adapter.tensors.items():
            assert found.tensors[part].dtype == tensor.dtype
            assert torch.equal(found.tensors[part], tensor), name
        if alpha:
            assert found.alpha == adapter.alpha


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_read(names, make_lora, name):
    spelling, *rule = SPELLINGS[name]
    lora = make_lora(names, alpha=6.0)
    found = parse_lora(spell(lora, *rule), names)
    assert_same(found, lora, alpha=len(rule) == 4)
    assert found.format == spelling
    assert found.lacks_alpha == (len(rule) == 3)


@pytest.fixture(scope="module")
def full_lora(make_lora):
    """All 560 attention modules of the full-size UNet, alpha ≠ rank."""
    return make_lora(get_kolors_names(), rank=2, alpha=3.0, dtype=torch.float16)


@pytest.mark.parametrize("file_format", WRITABLE)
def test_round_trip_of_all_560_attention_modules(full_lora, file_format):
    tensors, metadata = to_tensors(full_lora, file_format)
    found = parse_lora(tensors, full_lora.names, metadata=metadata)
    assert len(found.adapters) == 560
    assert_same(found, full_lora)
    assert found.format == file_format
    assert (metadata["rank"], metadata["alpha"]) == ("2", "3")


@pytest.mark.parametrize("file_format", WRITABLE)
def test_round_trip_of_every_layer_with_mixed_ranks_and_alphas(names, make_lora, file_format):
    """Convolutions and embeddings too; the header of a diffusers file says each module's alpha."""
    parts = [make_lora(names, rank=rank, alpha=alpha, chosen=lambda module, start=start: len(module.shape) > 1
                       and hash_of(module) % 3 == start)
             for start, (rank, alpha) in enumerate([(4, 1.0), (2, 8.0), (4, 0.75)])]  # fmt: skip
    lora = parts[0]
    lora = type(lora)(names=names, adapters={k: v for part in parts for k, v in part.adapters.items()})
    tensors, metadata = to_tensors(lora, file_format)
    assert_same(parse_lora(tensors, names, metadata=metadata), lora)
    assert metadata["rank"] == metadata["alpha"] == "mixed"


def hash_of(module) -> int:
    return sum(module.diffusers.encode())


def test_alphas_that_are_unknown_stay_unknown(names, make_lora):
    for file_format in WRITABLE:
        tensors, metadata = to_tensors(make_lora(names), file_format)
        assert not any("alpha" in key for key in tensors)
        assert metadata["alpha"] == "unknown"
        assert parse_lora(tensors, names, metadata=metadata).lacks_alpha


def test_alphas_of_peft_s_configuration(names, make_lora):
    """Per module before the default, and rank-stabilised LoRA's scale, alpha / sqrt(rank)."""
    lora = make_lora(names, rank=4)
    tensors = spell(lora, *SPELLINGS["diffusers"][1:])
    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {special: 2}}
    found = parse_lora(tensors, names, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert found.adapters[f"{special}.weight"].scale == 0.5
    assert {adapter.scale for name, adapter in found.adapters.items() if special not in name} == {2.0}
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}
    found = parse_lora(tensors, names, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert {adapter.scale for adapter in found.adapters.values()} == {4.0}
    with pytest.raises(LoraError, match="unreadable"):
        parse_lora(tensors, names, metadata={"lora_adapter_metadata": "{"})


def test_the_header_keeps_what_training_knew(names, make_lora):
    lora = parse_lora(to_tensors(make_lora(names), "kohya")[0], names, metadata={"ss_learning_rate": "1e-4"})
    assert to_tensors(lora, "diffusers")[1]["ss_learning_rate"] == "1e-4"


@pytest.mark.parametrize("kind", ["LoHa", "mid", "dora in", "diff"])
def test_kohya_holds_every_kind_and_others_say_so(names, kind):
    module = names.by_diffusers["down_blocks.1.resnets.0.conv1"]
    out_size, in_size = module.shape[:2]
    start = flat(module.sgm)
    tensors = {
        "LoHa": {"hada_w1_a": (out_size, 2), "hada_w1_b": (2, in_size * 9), "hada_w2_a": (out_size, 2),
                 "hada_w2_b": (2, in_size * 9)},
        "mid": {"lora_down.weight": (2, in_size, 1, 1), "lora_mid.weight": (2, 2, 3, 3),
                "lora_up.weight": (out_size, 2, 1, 1)},
        "dora in": {"lora_down.weight": (2, in_size, 3, 3), "lora_up.weight": (out_size, 2, 1, 1),
                    "dora_scale": (1, in_size, 1, 1)},
        "diff": {"diff": module.shape, "diff_b": module.shape[:1]},
    }[kind]  # fmt: skip
    lora = parse_lora({f"{start}.{part}": torch.rand(shape) for part, shape in tensors.items()}, names)
    assert_same(parse_lora(to_tensors(lora, "kohya")[0], names), lora)
    for file_format in ("diffusers", "diffsynth"):
        with pytest.raises(LoraError, match="Write it as kohya"):
            to_tensors(lora, file_format)


def test_dora_over_outputs_survives_diffusers(names, make_lora):
    lora = make_lora(names, alpha=2.0)
    lora = type(lora)(names=names, adapters={
        name: LowRank(down=adapter.down, up=adapter.up, alpha=2.0, magnitude=torch.rand(adapter.up.shape[0], 1))
        for name, adapter in lora.adapters.items()
    })  # fmt: skip
    for file_format in ("diffusers", "kohya"):
        tensors, metadata = to_tensors(lora, file_format)
        assert_same(parse_lora(tensors, names, metadata=metadata), lora)


# ---- files that do not fit ----


@pytest.fixture
def tensors(names, make_lora):
    return to_tensors(make_lora(names, alpha=2.0), "kohya")[0]


def test_leftovers_are_an_error_unless_ignored(names, tensors, caplog):
    extra = {f"lora_unet_time_machine_{index}.lora_up.weight": torch.ones(1) for index in range(7)}
    with pytest.raises(LoraError) as error:
        parse_lora(tensors | extra, names)
    message = str(error.value)
    assert f"7 of {len(tensors) + 7} tensors fit nothing" in message
    assert message.count("time_machine") == 5
    lora = parse_lora(tensors | extra, names, ignore_unknown=True)
    assert len(lora.unknown_keys) == 7
    assert "7 tensors that fit nothing are ignored" in caplog.text


def test_an_alpha_alone_is_a_leftover(names, tensors):
    key = next(key for key in tensors if key.endswith(".alpha")).removesuffix(".alpha")
    del tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
    with pytest.raises(LoraError, match=f"1 of {len(tensors)} tensors fit nothing"):
        parse_lora(tensors, names)


def test_clip_parts_are_named_and_left_out(names, tensors, caplog):
    key = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"
    lora = parse_lora(tensors | {key: torch.ones(4, 4)}, names)
    assert lora.text_keys == (key,)
    assert "1 tensors for text encoders are left out" in caplog.text


def test_a_text_encoder_s_lora(names):
    keys = ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "text_encoder.x.lora_A.weight")
    with pytest.raises(LoraError, match="is a LoRA for a text encoder"):
        parse_lora({key: torch.ones(4, 4) for key in keys}, names, ignore_unknown=True)


@pytest.mark.parametrize("ignore_unknown", [False, True])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], "seems to be a LoRA for Flux"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "seems to be a LoRA for Flux"),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], "LoRA for Stable Diffusion 3"),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], "no LoRA in a known format"),
        ([], "holds no tensors"),
    ],
)
def test_other_models_are_named(names, keys, words, ignore_unknown):
    with pytest.raises(LoraError, match=words):
        parse_lora({key: torch.ones(4, 4) for key in keys}, names, ignore_unknown=ignore_unknown)


@pytest.mark.parametrize(("width", "model"), [(768, "Stable Diffusion 1.5"), (1024, "Stable Diffusion 2")])
def test_a_stable_diffusion_lora_has_names_that_fit_and_sizes_that_do_not(width, model):
    start = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{start}.lora_down.weight": torch.ones(4, width), f"{start}.lora_up.weight": torch.ones(1280, 4)}
    with pytest.raises(LoraError, match=f"seems to be a LoRA for {model}"):
        parse_lora(tensors, get_kolors_names())


def test_a_wrong_rank_in_one_tensor(names, tensors):
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = tensors[key][:, :3]
    with pytest.raises(LoraError, match=f"{key}.*its ranks differ: down has 4, up has 3"):
        parse_lora(tensors, names)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_inside(names, tensors, value):
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = tensors[key].clone()
    tensors[key][3, 1] = value
    with pytest.raises(LoraError, match="1 of .* tensors hold NaN or infinity"):
        parse_lora(tensors, names)


def test_one_half_missing(names, tensors):
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    del tensors[key]
    with pytest.raises(LoraError, match="lora_down without lora_up"):
        parse_lora(tensors, names)


def test_two_loras_in_one_file(names, make_lora, tensors):
    with pytest.raises(LoraError, match="twice"):
        parse_lora(tensors | to_tensors(make_lora(names), "diffsynth")[0], names)


def test_numbers_that_are_no_floats(names, tensors):
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[key] = tensors[key].to(torch.int8)
    with pytest.raises(LoraError, match="int8"):
        parse_lora(tensors, names)


def test_an_assumed_scale_is_logged(names, make_lora, caplog):
    caplog.set_level(logging.INFO, "kolors_nodes")
    parse_lora(to_tensors(make_lora(names), "diffsynth")[0], names, source="epoch=0-step=500.ckpt")
    assert "epoch=0-step=500.ckpt stores no alpha: alpha = rank is assumed" in caplog.text


def test_an_unknown_format(names, make_lora):
    with pytest.raises(LoraError, match="diffusers, kohya, diffsynth"):
        to_tensors(make_lora(names), "peft2")
