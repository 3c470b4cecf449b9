"""Kolors Text Encode: the text encoder loads when a prompt is new, and then only."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.headless.host import HeadlessHost, use_host
from kolors_nodes.kolors import prompt_cache, text_encoder
from kolors_nodes.kolors.prompt_cache import PromptCache
from kolors_nodes.kolors.prompts import encode_prompts
from kolors_nodes.nodes.encode import PROMPT_FOLDER, KolorsTextEncode, to_socket
from kolors_nodes.nodes.loaders import DownloadAndLoadChatGLM3
from kolors_nodes.nodes.models import DEMO

PROMPT = "a red circle on a white background|a blue star"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with folders of its own, in a process that has encoded nothing yet."""
    start_anew(monkeypatch)
    host = HeadlessHost(models_dir=tmp_path / "models", output_dir=tmp_path / "output")
    with use_host(host):
        yield host


@pytest.fixture
def loads(monkeypatch):
    """Records each time that an encoder is loaded, by its precision."""
    found, load = [], text_encoder.load_text_encoder
    monkeypatch.setattr(
        text_encoder,
        "load_text_encoder",
        lambda path, **options: found.append(options["precision"]) or load(path, **options),
    )
    return found


def start_anew(monkeypatch):
    monkeypatch.setattr(prompt_cache, "PROMPTS", PromptCache())


def encode(prompt=PROMPT, precision="fp16", cache="memory", embedding_on_cpu=False):
    (model,) = DownloadAndLoadChatGLM3().loadmodel(precision, DEMO, embedding_on_cpu=embedding_on_cpu)
    (embeds,) = KolorsTextEncode().encode(model, prompt, "", 2, cache=cache)
    return model, embeds


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_the_loader_loads_nothing_and_a_known_prompt_neither(host, loads):
    model, embeds = encode()
    assert loads == ["fp16"]
    _, again = encode()  # another run of the loader: another object on the socket
    _, part = encode("a blue star")
    assert loads == ["fp16"]
    assert_same(again, embeds)
    assert torch.equal(part["prompt_embeds"], embeds["prompt_embeds"][2:])
    encode("a green star")
    assert loads == ["fp16", "fp16"]


def test_is_what_the_encoder_gives_text_by_text(host):
    """One by one: a text's last bits depend on what it is encoded beside."""
    model, embeds = encode()
    prompts = PROMPT.split("|")
    for index, prompt in enumerate(prompts):
        for name, row in (("prompt_embeds", prompt), ("negative_prompt_embeds", "")):
            alone = encode_prompts(model.text_encoder, model.tokenizer, [row], [row])
            assert torch.equal(embeds[name][2 * index], to_socket(alone, torch.device("cpu"))["prompt_embeds"][0])


def test_a_prompt_on_the_disk_needs_no_encoder_in_another_process(host, loads, monkeypatch):
    _, embeds = encode(cache="disk")
    folder = host.output_dir / PROMPT_FOLDER
    assert len(list(folder.iterdir())) == 3  # two prompts and the negative
    start_anew(monkeypatch)
    _, again = encode(cache="disk")
    assert loads == ["fp16"]
    assert_same(again, embeds)
    start_anew(monkeypatch)
    encode()
    assert loads == ["fp16", "fp16"]  # in memory alone: files are not asked for


def test_precisions_do_not_share(host, loads):
    found = [encode(precision=precision)[1]["prompt_embeds"] for precision in ("fp16", "quant8", "quant4", "bf16")]
    assert loads == ["fp16", "quant8", "quant4", "bf16"]
    assert all(not torch.equal(found[0], other.float()) for other in found[1:])
    # On a CPU both compute in float32 from the file's weights: the same numbers.
    assert torch.equal(encode(precision="fp32")[1]["prompt_embeds"], found[0])
    assert loads[4:] == []


def test_where_the_embedding_lies_changes_nothing(host, loads, monkeypatch):
    _, embeds = encode()
    start_anew(monkeypatch)
    model, again = encode(embedding_on_cpu=True)
    assert len(loads) == 2
    assert isinstance(model.text_encoder.embedding["word_embeddings"], text_encoder.HostEmbedding)
    assert_same(again, embeds)
