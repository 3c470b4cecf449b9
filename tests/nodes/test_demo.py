"""Pointing a graph at the bundled model."""

from __future__ import annotations

import copy

import pytest

from kolors_nodes.nodes.demo import shrink, to_demo_prompt
from kolors_nodes.nodes.lora import KolorsLoraLoader, LoadKolorsLoRA
from kolors_nodes.nodes.models import DEMO, KOLORS


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1024, 128), (768, 96), (1344, 160), (512, 64), (2048, 256), (128, 128), (256, 256), ("1024", "1024"),
     (["3", 0], ["3", 0]), (True, True)],
)  # fmt: skip
def test_sizes(size, expected):
    assert shrink(size) == expected


def test_loaders_and_sizes_change_and_nothing_else():
    prompt = {
        "1": {
            "class_type": "DownloadAndLoadKolorsModel",
            "inputs": {"model": KOLORS, "precision": "bf16"},
        },
        "2": {"class_type": "LoadChatGLM3", "inputs": {"chatglm3_checkpoint": "x.safetensors"}},
        "3": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"precision": "quant8"}},
        "4": {"class_type": "VAELoader", "inputs": {"vae_name": "sdxl.vae.safetensors"}},
        "5": {
            "class_type": "KolorsSampler",
            "inputs": {"kolors_model": ["1", 0], "width": 1024, "height": 768, "seed": 3},
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["4", 0]}},
        "7": {"class_type": "LoadKolorsUNet", "inputs": {"unet_name": "x.safetensors", "precision": "fp8"}},
    }
    before = copy.deepcopy(prompt)
    demo = to_demo_prompt(prompt)
    assert prompt == before
    assert demo == {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": DEMO, "precision": "bf16"}},
        "2": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"model": DEMO, "precision": "fp16"}},
        "3": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"model": DEMO, "precision": "fp16"}},
        "4": {"class_type": "KolorsVAELoader", "inputs": {"vae_name": DEMO}},
        "5": {
            "class_type": "KolorsSampler",
            "inputs": {"kolors_model": ["1", 0], "width": 128, "height": 96, "seed": 3},
        },
        "6": before["6"],
        "7": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": DEMO, "precision": "fp16"}},
    }


def test_malformed_nodes_are_left_to_validation():
    assert to_demo_prompt({"1": {}}) == {"1": {"inputs": {}}}


def make_lora_graph(model: str) -> dict:
    return {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": model, "precision": "fp16"}},
        "2": {"class_type": "KolorsLoraLoader",
              "inputs": {"kolors_model": ["1", 0], "lora_name": "mine.safetensors", "strength_model": 0.8}},
        "3": {"class_type": "LoadKolorsLoRA",
              "inputs": {"kolors_model": ["2", 0], "lora_path": "/loras/epoch=0-step=500.ckpt", "lora_alpha": 2.0}},
    }  # fmt: skip


def test_loras_of_kolors_are_switched_off():
    """They do not fit, and their files may not be there: a bundled one stands in, without effect."""
    demo = to_demo_prompt(make_lora_graph(KOLORS))
    bundled = KolorsLoraLoader.INPUT_TYPES()["required"]["lora_name"][0][0]
    assert demo["2"]["inputs"] == {"kolors_model": ["1", 0], "lora_name": bundled, "strength_model": 0.0}
    assert demo["3"]["inputs"] == {"kolors_model": ["2", 0], "lora_path": bundled, "lora_alpha": 0.0}
    assert LoadKolorsLoRA.VALIDATE_INPUTS(bundled) is True


def test_loras_of_the_bundled_model_stay():
    graph = make_lora_graph(DEMO)
    assert to_demo_prompt(graph) == graph
