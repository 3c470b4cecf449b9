"""The nodes in graphs on the bundled model: what they pass on, and what they say about mistakes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner
from kolors_nodes.kolors.options import SCALING_FACTOR
from kolors_nodes.nodes.encode import from_socket
from kolors_nodes.nodes.models import DEMO, DEMO_FOLDER, KOLORS


def make_prompt(model: str = DEMO, **sampler) -> dict:
    """Loaders, encoder and sampler at two steps; ``sampler`` changes the sampler's inputs."""
    inputs = {
        "kolors_model": ["unet", 0], "kolors_embeds": ["text", 0], "width": 128, "height": 128, "seed": 1, "steps": 2,
        "cfg": 5.0, "scheduler": "EulerDiscreteScheduler", **sampler,
    }  # fmt: skip
    text = {
        "chatglm3_model": ["chatglm3", 0], "prompt": "a red circle|{红色|蓝色}圆形", "negative_prompt": "",
        "num_images_per_prompt": 1, "wildcard_seed": 3,
    }  # fmt: skip
    return {
        "unet": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": model, "precision": "fp16"}},
        "chatglm3": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"model": model, "precision": "fp16"}},
        "text": {"class_type": "KolorsTextEncode", "inputs": text},
        "sampler": {"class_type": "KolorsSampler", "inputs": inputs},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96, "batch_size": 1}},
    }


@pytest.fixture
def runner(tmp_path):
    return Runner(NODE_CLASS_MAPPINGS, models_dir=tmp_path / "models", output_dir=tmp_path / "output", device="cpu")


def sample(runner: Runner, prompt: dict, node_id: str = "sampler"):
    result = runner.run(prompt, outputs=[node_id])
    assert result.status == "success", result.error
    return result.values[node_id][0]


def test_embeddings_travel_under_their_known_names(runner):
    embeds = sample(runner, make_prompt(), "text")
    assert sorted(embeds) == [
        "negative_pooled_prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "prompt_embeds",
    ]  # fmt: skip
    assert embeds["prompt_embeds"].shape[:2] == (2, 256)
    assert from_socket(embeds).batch_size == 2


def test_foreign_embeddings_that_lack_something():
    with pytest.raises(ValueError, match="kolors_embeds lacks negative_prompt_embeds"):
        from_socket({"prompt_embeds": 0, "pooled_prompt_embeds": 0, "negative_pooled_prompt_embeds": 0})


def test_wildcards_follow_their_seed(runner):
    def encode(seed: int) -> torch.Tensor:
        prompt = make_prompt()
        prompt["text"]["inputs"]["wildcard_seed"] = seed
        return sample(runner, prompt, "text")["pooled_prompt_embeds"][1]

    drawn = [encode(seed) for seed in range(8)]
    assert torch.equal(drawn[3], encode(3))
    assert len({tuple(row.tolist()) for row in drawn}) == 2


def test_the_latent_sets_the_size_and_stays_unchanged(runner):
    prompt = make_prompt(latent=["empty", 0], denoise_strength=0.5)
    result = runner.run(prompt, outputs=["sampler", "empty"])
    assert result.values["sampler"][0]["samples"].shape == (2, 4, 12, 8)
    assert torch.equal(result.values["empty"][0]["samples"], torch.zeros(1, 4, 12, 8))


def test_latents_leave_without_the_scaling_factor(runner):
    """The library's latents divided by 0.13025, so that ComfyUI's VAE nodes and other packs read them."""
    from kolors_nodes.kolors.options import SamplingOptions
    from kolors_nodes.kolors.sampling import sample as sample_latents

    runner_values = runner.run(make_prompt(), outputs=["unet", "text", "sampler"]).values
    options = SamplingOptions(num_inference_steps=2, height=128, width=128, seed=1)
    latents = sample_latents(runner_values["unet"][0].unet, from_socket(runner_values["text"][0]), options)
    assert torch.equal(runner_values["sampler"][0]["samples"], latents / SCALING_FACTOR)


def test_precisions_the_device_lacks_are_replaced_with_a_log_line(runner, caplog):
    with caplog.at_level("INFO", logger="kolors_nodes"):
        model = sample(runner, make_prompt(), "unet")
    assert model.unet.dtype == torch.float32
    assert "fp16 is no precision for cpu: computing in fp32 instead" in caplog.text
    prompt = make_prompt()
    prompt["unet"]["inputs"]["precision"] = "bf16"
    assert sample(runner, prompt, "unet").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(("precision", "error"), [("quant8", 0.02), ("quant4", 0.25)])
def test_quantised_text_encoders(runner, precision, error):
    """Near the whole one and not the same: 8 and 4 bits a weight. Their quality is measured with the text encoder."""
    whole = sample(runner, make_prompt(), "text")["prompt_embeds"]
    prompt = make_prompt()
    prompt["chatglm3"]["inputs"]["precision"] = precision
    quantised = sample(runner, prompt, "text")["prompt_embeds"]
    assert 0 < ((quantised - whole).norm() / whole.norm()).item() < error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoise_strength": 0.5}, "needs a latent to start from"),
        ({"denoise_strength": 0.3, "latent": ["empty", 0]}, "= 0 steps"),
        ({"latent": ["tiny", 0]}, "at least 4x4"),
        ({"latent": ["three", 0]}, "3 latents came with 2 prompts"),
        ({"latent": ["other", 0]}, r"Kolors takes (batch, 4"),
    ],
)
def test_sampler_mistakes(runner, changes, message):
    class OtherLatent:
        RETURN_TYPES, FUNCTION = ("LATENT",), "make"

        @classmethod
        def INPUT_TYPES(cls):
            return {}

        def make(self):
            return ({"samples": torch.zeros(1, 16, 8, 8)},)

    runner.nodes["OtherLatent"] = OtherLatent
    prompt = make_prompt(**changes)
    prompt["other"] = {"class_type": "OtherLatent", "inputs": {}}
    for node_id, size, batch_size in (("tiny", 16, 1), ("three", 64, 3)):
        inputs = {"width": size, "height": size, "batch_size": batch_size}
        prompt[node_id] = {"class_type": "EmptyLatentImage", "inputs": inputs}
    result = runner.run(prompt, outputs=["sampler"])
    assert result.status == "error"
    assert result.error["node_id"] == "sampler"
    assert message in result.error["exception_message"]


@pytest.fixture
def copied_model(tmp_path):
    """The bundled model in the real one's place, to be damaged."""
    return shutil.copytree(DEMO_FOLDER, tmp_path / "models" / "diffusers" / "Kolors")


def fail(runner: Runner) -> tuple[str, str]:
    result = runner.run(make_prompt(model=KOLORS), outputs=["sampler"])
    assert result.status == "error"
    return result.error["node_id"], result.error["exception_message"]


def be_refused(runner: Runner) -> tuple[str, str]:
    """What cannot be loaded, and not be fetched either as tests are offline, is told before anything runs."""
    result = runner.run(make_prompt(model=KOLORS), outputs=["sampler"])
    assert result.status == "invalid"
    (found,) = result.node_errors.items()
    return found[0], found[1]["errors"][0]["details"]


def test_the_copy_itself_is_sound(runner, copied_model):
    assert sample(runner, make_prompt(model=KOLORS))["samples"].shape == (2, 4, 16, 16)


def test_truncated_weights(runner, copied_model):
    file = copied_model / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    node_id, message = be_refused(runner)
    assert node_id == "unet"
    assert "unet/diffusion_pytorch_model.fp16.safetensors is missing or incomplete" in message


def test_an_sdxl_unet(runner, copied_model):
    file = copied_model / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("encoder_hid_proj")}
    save_file(weights, file)
    node_id, message = be_refused(runner)
    assert node_id == "unet"
    assert "is an SDXL UNet. Expected as the UNet: Kolors' UNet" in message


def test_a_text_encoder_of_the_wrong_size(runner, copied_model):
    config_file = copied_model / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    node_id, message = fail(runner)
    assert node_id == "chatglm3"
    assert "has the shape" in message


def test_a_missing_tokenizer(runner, copied_model):
    (copied_model / "tokenizer" / "tokenizer.model").unlink()
    node_id, message = be_refused(runner)
    assert node_id == "chatglm3"
    assert "tokenizer/tokenizer.model is missing" in message


def test_a_missing_model_is_told_before_anything_runs(runner):
    result = runner.run(make_prompt(model=KOLORS), outputs=["sampler"])
    assert result.status == "invalid"
    assert set(result.node_errors) == {"unet", "chatglm3"}
    details = [error["details"] for node in result.node_errors.values() for error in node["errors"]]
    assert all(" download --what" in text for text in details)
