"""Loaders that fetch: from a hub on this machine that holds the bundled model under the published names."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from kolors_nodes import NODE_CLASS_MAPPINGS
from kolors_nodes.headless import Runner
from kolors_nodes.headless.host import HeadlessHost, Interrupted
from kolors_nodes.kolors import download as downloads
from kolors_nodes.kolors.download import DownloadError
from kolors_nodes.nodes.host import RunnerHost
from kolors_nodes.nodes.models import DEMO_FOLDER, KOLORS, describe_missing, find_model, find_vae

SERVER = Path(__file__).parents[1] / "kolors" / "hub_server.py"


@pytest.fixture(scope="module")
def hub_server():
    spec = importlib.util.spec_from_file_location("kolors_hub_server", SERVER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    files = {
        path.relative_to(DEMO_FOLDER).as_posix(): path.read_bytes() for path in DEMO_FOLDER.rglob("*") if path.is_file()
    }
    server = hub_server.HubServer({"Kwai-Kolors/Kolors": files, "Kwai-Kolors/Kolors-diffusers": files})
    for name in [name for name in os.environ if re.match(r"(?i)(HF_|HUGGING_?FACE|TRANSFORMERS_OFF|.*_PROXY$)", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(downloads, "_PAUSES", (0.0,) * 4)
    monkeypatch.setattr(downloads, "_INTERVAL", 0.0)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
    yield server
    server.close()


def make_prompt() -> dict:
    """The tutorial's graph up to the latents."""
    sampler = {"kolors_model": ["1", 0], "kolors_embeds": ["3", 0], "width": 128, "height": 128, "seed": 1, "steps": 2,
               "cfg": 5.0, "scheduler": "EulerDiscreteScheduler"}  # fmt: skip
    return {
        "1": {"class_type": "DownloadAndLoadKolorsModel", "inputs": {"model": KOLORS, "precision": "fp32"}},
        "2": {"class_type": "DownloadAndLoadChatGLM3", "inputs": {"precision": "fp32"}},
        "3": {"class_type": "KolorsTextEncode", "inputs": {
            "chatglm3_model": ["2", 0], "prompt": "a red circle", "negative_prompt": "", "num_images_per_prompt": 1}},
        "4": {"class_type": "KolorsSampler", "inputs": sampler},
    }  # fmt: skip


def test_the_tutorials_graph_fetches_its_models_and_runs(hub, tmp_path):
    seen = []
    runner = Runner(NODE_CLASS_MAPPINGS, models_dir=tmp_path / "models", output_dir=tmp_path / "output",
                    on_event=lambda name, data: seen.append((name, data)))  # fmt: skip
    result = runner.run(make_prompt(), outputs=["4"])
    assert result.status == "success", result.error
    model = tmp_path / "models" / "diffusers" / "Kolors"
    for part in ("unet", "text_encoder"):
        assert (model / part / "config.json").read_bytes() == (DEMO_FOLDER / part / "config.json").read_bytes()
    largest = max(data["max"] for name, data in seen if name == "progress")
    assert largest > (model / "unet" / "diffusion_pytorch_model.fp16.safetensors").stat().st_size
    hub.requests.clear()
    assert runner.run(make_prompt(), outputs=["4"]).status == "success"
    assert not hub.requests


def test_online_nothing_missing_is_refused(hub, tmp_path):
    host = RunnerHost(HeadlessHost(models_dir=tmp_path))
    assert describe_missing(host, KOLORS, "unet") == describe_missing(host, KOLORS, "text_encoder") == ""
    assert not hub.requests


def test_cancel_keeps_what_has_arrived_and_the_next_run_goes_on(hub, tmp_path):
    services = HeadlessHost(
        models_dir=tmp_path, on_progress=lambda done, total, _: services.interrupt() if 2 * done > total else None
    )
    with pytest.raises(Interrupted):
        find_model(RunnerHost(services), KOLORS, "unet")
    (part,) = tmp_path.rglob("*.part")
    kept = part.stat().st_size
    assert kept > 0
    assert not list(tmp_path.rglob("*.safetensors"))
    hub.requests.clear()
    find_model(RunnerHost(HeadlessHost(models_dir=tmp_path)), KOLORS, "unet")
    assert hub.requests[-1].range == f"bytes={kept}-"


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_the_source_is_the_users_choice(hub, tmp_path, source):
    find_model(RunnerHost(HeadlessHost(models_dir=tmp_path)), KOLORS, "tokenizer", source)
    assert any(request.is_content for request in hub.requests) == (source == "huggingface")


def test_a_failure_says_where_the_part_goes_and_how_to_fetch_it(hub, tmp_path):
    hub.faults.silent = True
    with pytest.raises(DownloadError) as error:
        find_model(RunnerHost(HeadlessHost(models_dir=tmp_path)), KOLORS, "unet")
    assert "does not answer" in str(error.value)
    assert f"goes into {tmp_path / 'diffusers' / 'Kolors'}" in str(error.value)
    assert f' download --what unet --models-dir "{tmp_path}"' in str(error.value)


def test_the_vae_loader_fetches_the_published_vae(hub, tmp_path):
    folder = DEMO_FOLDER / "vae"
    (weights,) = folder.glob("*.safetensors")
    hub.repositories["madebyollin/sdxl-vae-fp16-fix"] = {"sdxl.vae.safetensors": weights.read_bytes()}
    host = RunnerHost(HeadlessHost(models_dir=tmp_path))
    path = find_vae(host, "sdxl.vae.safetensors")
    assert path == tmp_path / "vae" / "sdxl.vae.safetensors"
    assert path.read_bytes() == weights.read_bytes()
    hub.requests.clear()
    assert find_vae(host, "sdxl.vae.safetensors") == path
    assert not hub.requests
    with pytest.raises(FileNotFoundError):
        find_vae(host, "other.safetensors")
