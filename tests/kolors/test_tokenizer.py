"""The tokenizer against the ids that the reference tokenizer gives."""

from __future__ import annotations

import json
import logging

import pytest

from kolors_nodes.kolors.tokenizer import MAX_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(reference):
    return Tokenizer(reference / "chatglm3" / "tokenizer.model")


def test_ids_equal_the_reference(tokenizer, reference):
    examples = json.loads((reference / "chatglm3" / "tokenized.json").read_text(encoding="utf-8"))
    assert len(examples) > 5
    for example in examples:
        ids = tokenizer.encode(example["prompt"])
        assert ids == example["input_ids"], example["prompt"]
        assert MAX_TOKENS - len(ids) == example["pad"]
        assert list(range(len(ids))) == example["position_ids"]


def test_prefix_and_pad(tokenizer):
    assert tokenizer.encode("") == [64790, 64792]
    assert tokenizer.pad_token_id == 0
    assert tokenizer.vocab_size == 64798


def test_a_long_prompt_is_cut_and_says_so(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode("山" * 300)
    assert len(ids) == MAX_TOKENS
    assert ids[:2] == tokenizer.prefix_ids
    lost = len(tokenizer._pieces.encode("山" * 300)) - 254
    assert f"the last {lost} are ignored" in caplog.text


def test_a_prompt_that_just_fits_is_silent(tokenizer, caplog):
    text = tokenizer._pieces.decode(tokenizer._pieces.encode("a cat " * 400)[:254])
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer.encode(text)) == MAX_TOKENS
    assert not caplog.text


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="sentencepiece file 'tokenizer.model'"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_damaged_file(tmp_path, reference):
    damaged = tmp_path / "tokenizer.model"
    damaged.write_bytes((reference / "chatglm3" / "tokenizer.model").read_bytes()[:5000])
    with pytest.raises(ValueError, match="no sentencepiece model"):
        Tokenizer(damaged)
