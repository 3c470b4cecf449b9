"""The bundled model: its files, its figures on a few pictures, and that other libraries can read it."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from kolors_nodes.demo.recipe.captions import HELD_OUT, LANGUAGES, SEEN, get_captions
from kolors_nodes.demo.recipe.classifier import load_classifier
from kolors_nodes.demo.recipe.evaluate import (
    MODEL_FOLDER,
    EvaluationOptions,
    get_classifier_accuracy,
    judge,
    load_demo_model,
)
from kolors_nodes.demo.recipe.unet import build_scheduler


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def test_layout_and_size():
    files = {
        path.relative_to(MODEL_FOLDER).as_posix(): path.stat().st_size
        for path in MODEL_FOLDER.rglob("*")
        if path.is_file()
    }
    assert set(files) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.model",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert sum(files.values()) <= 15_000_000
    index = json.loads((MODEL_FOLDER / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "KolorsPipeline"
    for part in MODEL_FOLDER.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(part).values()} == {torch.float16}


def test_scheduler_is_that_of_kolors():
    loaded = EulerDiscreteScheduler.from_pretrained(MODEL_FOLDER / "scheduler")
    expected = build_scheduler()
    assert {key: value for key, value in loaded.config.items() if not key.startswith("_")} == {
        key: value for key, value in expected.config.items() if not key.startswith("_")
    }


def test_diffusers_reads_unet_and_vae():
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        _, info = kind.from_pretrained(MODEL_FOLDER / part, variant="fp16", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_diffusers_encoder_agrees(model):
    chatglm = pytest.importorskip("diffusers.pipelines.kolors", reason="needs transformers: pip install '.[test]'")
    config = chatglm.ChatGLMModel.config_class.from_pretrained(MODEL_FOLDER / "text_encoder")
    oracle = chatglm.ChatGLMModel(config).eval()
    tensors = {
        name: tensor.float() for name, tensor in load_file(MODEL_FOLDER / "text_encoder" / "model.safetensors").items()
    }
    missing, unexpected = oracle.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"output_layer.weight", "rotary_pos_emb.inv_freq"} and not unexpected
    prompt = "白色背景上的红色圆形"
    tokenizer = chatglm.ChatGLMTokenizer(str(MODEL_FOLDER / "tokenizer" / "tokenizer.model"))
    inputs = tokenizer([prompt], padding="max_length", max_length=256, truncation=True, return_tensors="pt")
    ids = model.tokenizer.encode(prompt)
    assert inputs["input_ids"][0].tolist() == [model.tokenizer.pad_token_id] * (256 - len(ids)) + ids
    with torch.no_grad():
        expected = oracle(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    from kolors_nodes.kolors.text_encoder import TokenBatch

    with torch.no_grad():
        rows, pooled = model.text_encoder.encode(TokenBatch.from_ids([ids], model.tokenizer.pad_token_id))
    # float32 rounding over four blocks; the rows' deviation is about 1
    torch.testing.assert_close(rows[0], expected[-2][:, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(pooled[0], expected[-1][-1, 0], atol=2e-5, rtol=1e-4)


def test_tokenizer_splits_chinese_words(model):
    """Colour and shape must be pieces of their own, or an unseen combination is an unseen piece."""
    tokenizer = model.tokenizer
    red_circle, blue_circle = tokenizer.encode("红色圆形"), tokenizer.encode("蓝色圆形")
    assert red_circle[:2] == tokenizer.prefix_ids
    assert len(red_circle) == len(blue_circle)
    assert sum(a != b for a, b in zip(red_circle, blue_circle, strict=True)) == 1


def test_tokenizer_folds_case_and_knows_every_text(model):
    tokenizer = model.tokenizer
    assert tokenizer.encode("A Red Circle, White background") == tokenizer.encode("a red circle， white background")
    assert tokenizer.pad_token_id not in tokenizer.encode("龙 ☃ ½ Ω")


@pytest.mark.parametrize("guidance_scale", [3.0, 5.0])
def test_pictures_show_what_captions_say(model, guidance_scale):
    combinations = [*SEEN[::17], *HELD_OUT[::4]]
    prompts = [
        get_captions(combination, LANGUAGES[index % 2])[index % 7] for index, combination in enumerate(combinations)
    ]
    pictures = model.draw(prompts, 11, guidance_scale, EvaluationOptions())
    scores = judge(pictures, combinations, load_classifier())
    wrong = [(prompt, score) for prompt, score in zip(prompts, scores, strict=True) if score["all"] < 1]
    assert not wrong
    assert sum(score["iou"] for score in scores) / len(scores) >= 0.88


def test_classifier_reads_rendered_pictures():
    accuracy = get_classifier_accuracy(load_classifier(), count=500)
    assert accuracy["named"] >= 0.99
    assert min(accuracy.values()) >= 0.95  # pictures with other shapes and colours are harder, and must not be named
