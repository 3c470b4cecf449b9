"""From prompt text to embeddings: the prompt syntax of saved workflows, and batched encoding."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .text_encoder import Text, TextEncoder, TokenBatch, expand_padding
from .tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PromptEmbeds:
    """What the UNet reads of the text: B prompts and their negatives.

    Attributes:
        prompt_embeds: (B, L, D).
        pooled_prompt_embeds: (B, D).
        negative_prompt_embeds: (B, L, D).
        negative_pooled_prompt_embeds: (B, D).

    Raises:
        ValueError: the four shapes do not belong together.
    """

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    negative_pooled_prompt_embeds: torch.Tensor

    def __post_init__(self) -> None:
        sequence, pooled = self.prompt_embeds.shape, self.pooled_prompt_embeds.shape
        if (
            len(sequence) != 3
            or pooled != (sequence[0], sequence[2])
            or self.negative_prompt_embeds.shape != sequence
            or self.negative_pooled_prompt_embeds.shape != pooled
        ):
            raise ValueError(
                f"These text embeddings do not belong together: prompt_embeds {tuple(sequence)}, pooled "
                f"{tuple(pooled)}, negative {tuple(self.negative_prompt_embeds.shape)}, negative pooled "
                f"{tuple(self.negative_pooled_prompt_embeds.shape)}; expected (B, L, D) and (B, D), twice."
            )

    @property
    def batch_size(self) -> int:
        """B, the number of prompts."""
        return self.prompt_embeds.shape[0]


def choose_alternatives(prompt: str, generator: random.Random) -> str:
    """Replaces every ``{x|y}`` by one of its alternatives, inner ones first.

    Braces without a bar (JSON, say) and braces without a partner stay as they are.

    Args:
        prompt: the text.
        generator: where the choices come from; one draw per pair of braces with a bar, in order of their ends.
    """
    groups: list[list[str]] = [[""]]  # open braces, each a list of alternatives; the first is the text itself
    for character in prompt:
        if character == "{":
            groups.append([""])
        elif character == "|" and len(groups) > 1:
            groups[-1].append("")
        elif character == "}" and len(groups) > 1:
            alternatives = groups.pop()
            chosen = generator.choice(alternatives) if len(alternatives) > 1 else f"{{{alternatives[0]}}}"
            groups[-1][-1] += chosen
        else:
            groups[-1][-1] += character
    return "{".join("|".join(alternatives) for alternatives in groups)


def parse_prompt(prompt: str, generator: random.Random) -> list[str]:
    """Reads the prompt syntax: ``{x|y}`` picks an alternative, then ``a|b`` makes a batch, spaces kept."""
    return choose_alternatives(prompt, generator).split("|")


def encode_prompts(
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    *,
    num_images_per_prompt: int = 1,
) -> PromptEmbeds:
    """Encodes prompts and negatives in one pass over the text encoder; equal texts are encoded once.

    Args:
        text_encoder: on the device where it shall run.
        tokenizer: the one it was trained with.
        prompts: N texts.
        negative_prompts: N texts, one for each prompt.
        num_images_per_prompt: each prompt is repeated so many times, repeats side by side: B = N times this.

    Returns:
        Embeddings on the encoder's device, in its dtype.

    Raises:
        ValueError: the numbers of prompts and negatives differ.
    """
    if len(prompts) != len(negative_prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(negative_prompts)} negative prompts.")
    texts = list(dict.fromkeys([*prompts, *negative_prompts]))
    batch = TokenBatch.from_ids([tokenizer.encode(text) for text in texts], tokenizer.pad_token_id)
    encoded = dict(zip(texts, text_encoder.encode_texts(batch), strict=True))
    return join_texts(encoded, prompts, negative_prompts, num_images_per_prompt=num_images_per_prompt)


def join_texts(
    texts: Mapping[str, Text],
    prompts: Sequence[str],
    negative_prompts: Sequence[str],
    *,
    num_images_per_prompt: int = 1,
) -> PromptEmbeds:
    """Puts encoded texts together for the UNet.

    Args:
        texts: every prompt and negative, encoded.
        prompts: see ``encode_prompts``, as the others.
        negative_prompts: likewise.
        num_images_per_prompt: likewise.
    """

    def join(chosen: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = [texts[text] for text in chosen for _ in range(num_images_per_prompt)]
        counts = [torch.tensor([len(text.rows) - 1], device=text.rows.device) for text in found]
        rows = [expand_padding(text.rows[None], count) for text, count in zip(found, counts, strict=True)]
        return torch.cat(rows), torch.stack([text.pooled for text in found])

    (prompt_embeds, pooled), (negative_embeds, negative_pooled) = join(prompts), join(negative_prompts)
    return PromptEmbeds(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled,
    )
