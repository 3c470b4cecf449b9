"""The cache of encoded prompts: what it gives is what was encoded, and only unknown texts are."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.prompt_cache import PromptCache
from kolors_nodes.kolors.text_encoder import Text

ENCODER = ("identity", "torch.float32")


class CharacterTokenizer:
    pad_token_id = 0

    def encode(self, text):
        return [64790, 64792, *map(ord, text)]


class RecordingEncoder:
    """Stands for the text encoder: rows tell which text they are of, and what is encoded is recorded."""

    def __init__(self):
        self.passes = []

    def __call__(self, batches):
        self.passes.append([batch.num_tokens.item() for batch in batches])
        return [
            Text(rows=ids[:, None].float().expand(-1, 3).clone(), pooled=ids[:3].float())
            for (ids,) in (batch.input_ids for batch in batches)
        ]


@pytest.fixture
def encode():
    return RecordingEncoder()


def get(cache, texts, encode, encoder=ENCODER, folder=None):
    return cache.encode(texts, CharacterTokenizer(), encoder=encoder, encode=encode, folder=folder)


def assert_is_of(text, characters):
    assert text.rows[:, 0].tolist() == [0, 64790, 64792, *map(ord, characters)]


def test_a_known_text_is_not_encoded_again(encode):
    cache = PromptCache()
    first = get(cache, ["cat", "", "cat"], encode)
    again = get(cache, ["", "dog", "cat"], encode)
    assert encode.passes == [[5, 2], [5]]  # in one go, each text once and by itself, the unknown alone
    assert list(again) == ["", "dog", "cat"]
    for characters, text in again.items():
        assert_is_of(text, characters)
    assert again["cat"] is first["cat"]


@pytest.mark.parametrize("other", [("another", "torch.float32"), ("identity", "quant8 torch.float32")])
def test_another_encoder_or_precision_has_its_own(encode, other, tmp_path):
    cache = PromptCache()
    get(cache, ["cat"], encode, folder=tmp_path)
    get(cache, ["cat"], encode, other, folder=tmp_path)
    assert len(encode.passes) == len(list(tmp_path.iterdir())) == 2


def test_files_outlive_the_process(encode, tmp_path):
    folder = tmp_path / "new"
    get(PromptCache(), ["cat", "a horse"], encode, folder=folder)
    found = get(PromptCache(), ["a horse", "cat"], encode, folder=folder)
    assert len(encode.passes) == 1
    assert_is_of(found["cat"], "cat")
    assert_is_of(found["a horse"], "a horse")


def test_what_memory_knows_goes_to_the_disk_when_asked_for(encode, tmp_path):
    cache = PromptCache()
    get(cache, ["cat"], encode)
    get(cache, ["cat"], encode, folder=tmp_path)
    get(PromptCache(), ["cat"], encode, folder=tmp_path)
    assert len(encode.passes) == 1


def test_memory_is_bounded_and_the_latest_stay(encode):
    cache = PromptCache(max_bytes=3 * (6 * 3 + 3) * 4)  # three texts of three characters
    for text in ("one", "two", "six", "one", "ten"):
        get(cache, [text], encode)
    assert len(encode.passes) == 4
    get(cache, ["one", "six", "ten"], encode)
    assert len(encode.passes) == 4
    get(cache, ["two"], encode)
    assert len(encode.passes) == 5


def test_a_text_larger_than_the_memory_is_encoded_all_the_same(encode):
    assert_is_of(get(PromptCache(max_bytes=1), ["cat"], encode)["cat"], "cat")


def test_files_are_bounded_and_the_latest_stay(encode, tmp_path):
    get(PromptCache(), ["one"], encode, folder=tmp_path)
    (first,) = tmp_path.iterdir()
    size = first.stat().st_size
    for text in ("two", "six"):
        get(PromptCache(max_file_bytes=2 * size), [text], encode, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert not first.exists()


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_damaged_file_is_encoded_anew(encode, tmp_path, content):
    get(PromptCache(), ["cat"], encode, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    assert_is_of(get(PromptCache(), ["cat"], encode, folder=tmp_path)["cat"], "cat")
    assert len(encode.passes) == 2


def test_a_file_of_another_content_is_encoded_anew(encode, tmp_path):
    from kolors_nodes.kolors.storage import write_tensors

    get(PromptCache(), ["cat"], encode, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    write_tensors(path, {"rows": torch.zeros(3, 3), "pooled": torch.zeros(3)})
    assert_is_of(get(PromptCache(), ["cat"], encode, folder=tmp_path)["cat"], "cat")


def test_a_folder_that_cannot_be_written_costs_a_log_line(encode, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.touch()
    assert_is_of(get(PromptCache(), ["cat"], encode, folder=blocked / "prompts")["cat"], "cat")
    assert "is not kept in" in caplog.text
