"""The prompt syntax, and encoding in one batch."""

from __future__ import annotations

import random

import pytest
import torch

from kolors_nodes.kolors.prompts import PromptEmbeds, choose_alternatives, encode_prompts, parse_prompt
from kolors_nodes.kolors.text_encoder import Text


@pytest.mark.parametrize("prompt", ["", "a cat", "a {cat}", '{"json": 1}', "{", "}", "a } b { c", "{{a}}"])
def test_text_without_alternatives_stays(prompt):
    assert parse_prompt(prompt, random.Random(0)) == [prompt]


def test_a_bar_makes_a_batch_and_keeps_spaces():
    assert parse_prompt("a cat |\nb|", random.Random(0)) == ["a cat ", "\nb", ""]


def test_alternatives_follow_the_generator():
    drawn = [choose_alternatives("{a|b|c}", random.Random(seed)) for seed in range(100)]
    assert drawn == [choose_alternatives("{a|b|c}", random.Random(seed)) for seed in range(100)]
    assert set(drawn) == {"a", "b", "c"}


def test_nested_alternatives():
    drawn = {choose_alternatives("{a|x{b|c}y}", random.Random(seed)) for seed in range(100)}
    assert drawn == {"a", "xby", "xcy"}


def test_literal_braces_inside_an_alternative():
    drawn = {choose_alternatives("{a {x}|b}", random.Random(seed)) for seed in range(50)}
    assert drawn == {"a {x}", "b"}


def test_an_open_brace_splits_as_text():
    assert parse_prompt("{a|b", random.Random(0)) == ["{a", "b"]


def test_global_randomness_is_untouched():
    state = random.getstate()
    parse_prompt("{a|b}", random.Random(1))
    assert random.getstate() == state


class CountingEncoder:
    """Stands for the text encoder: every text becomes its token count, and each pass is counted."""

    def __init__(self):
        self.batches = []

    def encode_texts(self, batch):
        counts = batch.num_tokens.tolist()
        self.batches.append(counts)
        return [Text(rows=torch.full((1 + count, 3), count), pooled=torch.full((3,), count)) for count in counts]


class LengthTokenizer:
    pad_token_id = 0

    def encode(self, text):
        return [1] * (2 + len(text))


def test_one_pass_each_text_once_repeats_side_by_side():
    encoder = CountingEncoder()
    embeds = encode_prompts(encoder, LengthTokenizer(), ["a", "bcd"], ["no", "no"], num_images_per_prompt=2)
    assert encoder.batches == [[3, 5, 4]]
    assert embeds.pooled_prompt_embeds[:, 0].tolist() == [3, 3, 5, 5]
    assert embeds.prompt_embeds[:, 7, 1].tolist() == [3, 3, 5, 5]
    assert embeds.negative_pooled_prompt_embeds[:, 0].tolist() == [4, 4, 4, 4]
    assert embeds.negative_prompt_embeds.shape == (4, 256, 3)


def test_numbers_of_prompts_must_agree():
    with pytest.raises(ValueError, match="2 prompts came with 1"):
        encode_prompts(CountingEncoder(), LengthTokenizer(), ["a", "b"], ["no"])


def test_embeddings_that_do_not_belong_together():
    rows, pooled = torch.zeros(2, 256, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match="do not belong together"):
        PromptEmbeds(
            prompt_embeds=rows,
            pooled_prompt_embeds=pooled[:1],
            negative_prompt_embeds=rows,
            negative_pooled_prompt_embeds=pooled,
        )
