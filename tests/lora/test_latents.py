"""Cached captions and pictures, what the UNet reads of them, and the order in which they come."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_nodes.kolors.options import SCALING_FACTOR, SamplingOptions
from kolors_nodes.kolors.storage import read_tensors, remove_parts, serialize, write_bytes
from kolors_nodes.kolors.text_encoder import TokenBatch
from kolors_nodes.kolors.tokenizer import Tokenizer
from kolors_nodes.lora.dataset import read_dataset
from kolors_nodes.lora.latents import (
    Encoders,
    Regularization,
    Sample,
    Text,
    add_regularization,
    encode_dataset,
    get_identity,
    get_pad_mask,
    get_prompt_embeds,
    get_text_batch,
)
from kolors_nodes.lora.options import DatasetOptions
from kolors_nodes.lora.order import build_order, draw_sample
from kolors_nodes.nodes.models import DEMO_FOLDER


@pytest.fixture(scope="module")
def text_encoder():
    from kolors_nodes.kolors.text_encoder import load_text_encoder

    return load_text_encoder(DEMO_FOLDER / "text_encoder", precision="fp32")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEMO_FOLDER / "tokenizer" / "tokenizer.model")


def encode_squares(pictures):
    """A VAE of averages: latents that tell which pixels they come from."""
    return torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8)[:, [0, 1, 2, 0]]


class Loads:
    """Encoders that count how often they are loaded."""

    def __init__(self, tokenizer, text_encoder):
        self.counts = Counter()
        self.encoders = Encoders(
            tokenizer=tokenizer, text_identity="text", text_precision="fp32", vae_identity="vae",
            load_text_encoder=lambda: self._load("text", text_encoder),
            load_vae=lambda: self._load("vae", encode_squares),
        )  # fmt: skip

    def _load(self, name, model):
        self.counts[name] += 1
        return model


@pytest.fixture
def loads(tokenizer, text_encoder):
    return Loads(tokenizer, text_encoder)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate([(96, 64), (64, 64), (64, 96)]):
        pixels = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red circle, number {index}", encoding="utf-8")
    return read_dataset(folder, DatasetOptions(width=64, height=64, center_crop=False, random_flip=True))


def encode(dataset, loads, tmp_path, other=("a blue star",), told=None):
    return encode_dataset(
        dataset, loads.encoders, other_captions=other, seed=0, cache=tmp_path / "cache",
        on_progress=lambda *args: told.append(args) if told is not None else None,
    )  # fmt: skip


def test_the_second_run_loads_no_encoder_and_finds_the_same(dataset, loads, tmp_path):
    told = []
    first = encode(dataset, loads, tmp_path, told=told)
    second = encode(dataset, loads, tmp_path)
    # training captions and the others are encoded apart, pictures once
    assert loads.counts == {"text": 2, "vae": 1}
    for one, other in zip(first.samples, second.samples, strict=True):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.time_ids, other.time_ids)
    for caption, text in first.captions.items():
        assert torch.equal(text.rows, second.captions[caption].rows)
    assert {phase for phase, *_ in told} == {"encoding captions", "encoding pictures"}
    assert all(done <= total for _, done, total in told) and told[-1][1] == told[-1][2]


def test_a_cache_that_was_cut_short_gives_the_same(dataset, loads, tmp_path):
    whole = encode(dataset, loads, tmp_path)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:50])
    for file in files[1::2]:
        file.unlink()
    again = encode(dataset, loads, tmp_path)
    for one, other in zip(whole.samples, again.samples, strict=True):
        assert torch.equal(one.latents, other.latents)
    for caption, text in whole.captions.items():
        assert torch.equal(text.rows, again.captions[caption].rows)


def test_another_encoder_or_content_is_encoded_anew(dataset, loads, tmp_path):
    encode(dataset, loads, tmp_path)
    loads.encoders = replace(loads.encoders, vae_identity="another", text_precision="fp16")
    encode(dataset, loads, tmp_path)
    assert loads.counts == {"text": 4, "vae": 2}


def test_captions_are_those_of_inference(dataset, loads, tmp_path, text_encoder, tokenizer):
    captions = encode(dataset, loads, tmp_path).captions
    ids = [tokenizer.encode("a blue star")]
    with torch.no_grad():
        rows, pooled = text_encoder.encode(TokenBatch.from_ids(ids, tokenizer.pad_token_id))
    embeds = get_prompt_embeds(captions["a blue star"], captions[""])
    # encoded beside another caption: float32 rounding in products of another shape
    torch.testing.assert_close(embeds.prompt_embeds, rows, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(embeds.pooled_prompt_embeds, pooled, atol=1e-5, rtol=1e-5)


def test_latents_are_of_the_views_and_scaled(dataset, loads, tmp_path):
    sample = encode(dataset, loads, tmp_path).samples[1]  # 64 x 64: no room to crop, so two views
    assert sample.latents.shape == (2, 4, 8, 8)
    pixels = torch.from_numpy(np.asarray(Image.open(dataset.pictures[1].path), np.float32)[None] / 255)
    expected = encode_squares(pixels)[0] * SCALING_FACTOR
    torch.testing.assert_close(sample.latents[0], expected)
    torch.testing.assert_close(sample.latents[1], expected.flip(-1))


@pytest.mark.parametrize("pads", [0, 1, 2, 17, 240, 254])
def test_two_pad_rows_weigh_as_much_as_all_pads(pads):
    mask = torch.tensor(get_pad_mask(pads))
    bias = (1 - mask) * -10000.0  # as diffusers computes it, in float32
    assert float(bias.double().exp().sum()) == pytest.approx(pads, rel=2e-6, abs=1e-9)


def test_the_unet_reads_the_compact_rows_as_the_256(unet):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    texts = [Text(rows=draw(1 + count, 32), pooled=draw(32)) for count in (3, 9, 256)]
    rows, mask, pooled = get_text_batch(texts)
    latents, timesteps = draw(3, 4, 8, 8), torch.tensor([5, 500, 1099])
    added = {"text_embeds": pooled, "time_ids": torch.full((3, 6), 64.0)}
    full = torch.cat([get_prompt_embeds(text, text).prompt_embeds for text in texts])
    assert full.shape == (3, 256, 32)
    with torch.no_grad():
        expected = unet(latents, timesteps, encoder_hidden_states=full, added_cond_kwargs=added).sample
        found = unet(latents, timesteps, encoder_hidden_states=rows, encoder_attention_mask=mask,
                     added_cond_kwargs=added).sample  # fmt: skip
    # float32 rounding; with one pad row it would be 1e-4
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_the_base_draws_regularisation_pictures_once(dataset, loads, tmp_path, unet, monkeypatch):
    data = encode(dataset, loads, tmp_path)
    texts = {caption: Text(rows=text.rows[:, :32], pooled=text.pooled[:32]) for caption, text in data.captions.items()}
    data = replace(data, captions=texts)
    wish = Regularization(
        prompts=("a blue star",), count=2, sampling=SamplingOptions(num_inference_steps=2, height=64, width=64)
    )
    first = add_regularization(data, wish, unet, text_identity="t", cache=tmp_path, on_progress=lambda *_: None)
    monkeypatch.setattr("kolors_nodes.lora.latents.sample", None)  # calling it would fail
    second = add_regularization(data, wish, unet, text_identity="t", cache=tmp_path, on_progress=lambda *_: None)
    drawn = first.samples[3:]
    assert [item.is_regularization for item in first.samples] == [False] * 3 + [True] * 2
    assert not torch.equal(drawn[0].latents, drawn[1].latents)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(drawn, second.samples[3:], strict=True))


def test_identity_tells_models_apart_and_not_precisions():
    weight = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).half()
    identity = get_identity([("a", weight), ("b", weight)])
    assert identity == get_identity([("b", weight.float()), ("a", weight.float())])
    assert identity != get_identity([("a", weight), ("b", weight + 1)])


# ---- files ----


def test_the_same_content_gives_the_same_bytes():
    """The library orders a header's metadata anew for every call."""
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {name: name for name in "hgfedcba"}
    contents = {serialize(tensors, metadata) for _ in range(8)}
    assert len(contents) == 1


def test_serialised_tensors_read_back(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7), "c": torch.tensor(2.5)}
    path = write_bytes(tmp_path / "x.safetensors", serialize(tensors, {"k": "v"}))
    found, metadata = read_tensors(path)
    assert metadata == {"k": "v"} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_tensors(path) is None


def test_remains_of_killed_writers_are_removed(tmp_path):
    (tmp_path / ".x.safetensors-abc.part").write_bytes(b"half")
    (tmp_path / "x.safetensors").write_bytes(b"whole")
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# ---- order ----


def make_samples(*, wide=0, square=0, kept=0):
    sizes = [(4, 8)] * wide + [(8, 8)] * (square + kept)
    return [
        Sample(name=str(i), caption="", latents=torch.zeros(3, 4, *size), time_ids=torch.zeros(3, 6),
               is_regularization=i >= wide + square)
        for i, size in enumerate(sizes)
    ]  # fmt: skip


def test_every_sample_comes_once_in_a_round():
    order = build_order(make_samples(square=6), seed=3, batch_size=4, regularization_share=0.5)
    slots = [index for number in range(6) for index in order.get_batch(number)]  # 24 slots: four rounds of 6
    rounds = [slots[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(part) == list(range(6)) for part in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_a_batch_needs_no_memory_of_earlier_ones():
    samples = make_samples(wide=5, square=9, kept=4)
    orders = [build_order(samples, seed=3, batch_size=4, regularization_share=0.25) for _ in range(2)]
    forward = [orders[0].get_batch(number) for number in range(40)]
    assert [orders[1].get_batch(number) for number in reversed(range(40))] == forward[::-1]


def test_a_batch_has_one_size_and_the_share_of_regularisation():
    samples = make_samples(wide=5, square=9, kept=4)
    order = build_order(samples, seed=0, batch_size=4, regularization_share=0.25)
    batches = [order.get_batch(number) for number in range(50)]
    for batch in batches:
        assert len({samples[index].latents.shape for index in batch}) == 1
    square = [batch for batch in batches if batch[0] >= 5]
    assert all(sum(samples[index].is_regularization for index in batch) == 1 for batch in square)
    assert 0 < len(square) < 50


def test_draws_depend_on_seed_and_number_alone():
    (sample,) = make_samples(square=1)

    def draw(seed, number):
        found = draw_sample(sample, seed=seed, number=number, num_timesteps=1100, caption_dropout=0.5)
        return found.timestep, found.view, found.has_caption, found.noise.sum().item()

    assert draw(1, 7) == draw(1, 7)
    assert draw(1, 7) != draw(1, 8) != draw(2, 8)


def test_draws_are_spread_as_they_should_be():
    (sample,) = make_samples(square=1)
    draws = [draw_sample(sample, seed=0, number=n, num_timesteps=1100, caption_dropout=0.3) for n in range(2000)]
    timesteps = np.array([draw.timestep for draw in draws])
    assert timesteps.min() < 10 and timesteps.max() > 1089
    # four standard deviations of the mean of 2000 uniform numbers, and of a share of 0.3
    assert abs(timesteps.mean() - 549.5) < 4 * 1100 / np.sqrt(12 * 2000)
    assert abs(np.mean([draw.has_caption for draw in draws]) - 0.7) < 4 * np.sqrt(0.21 / 2000)
    assert set(Counter(draw.view for draw in draws)) == {0, 1, 2}
