"""The node that encodes prompts."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .host import get_host
from .models import ChatGLM3Model

if TYPE_CHECKING:
    import torch

    from ..kolors.prompts import PromptEmbeds


class KolorsTextEncode:
    """Encodes prompts with ChatGLM3."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "chatglm3_model": ("CHATGLM3MODEL", {"tooltip": "The text encoder."}),
                "prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "What the picture shows, in Chinese "
                           "or English, up to 254 tokens. 'a|b' makes a batch of two prompts, '{x|y}' picks one."}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "What it shall not show; "
                                    "one for all prompts. Without effect at a cfg of 1 and below."}),
                "num_images_per_prompt": ("INT", {"default": 1, "min": 1, "max": 128, "step": 1,
                                          "tooltip": "Pictures of each prompt, 1 to 128."}),
            },
            "optional": {
                "wildcard_seed": ("INT", {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "advanced": True,
                                  "tooltip": "Decides what '{x|y}' picks, 0 to 2^64 - 1. The same seed picks the "
                                             "same."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("KOLORS_EMBEDS",)
    RETURN_NAMES = ("kolors_embeds",)
    OUTPUT_TOOLTIPS = ("The encoded prompts and negatives, for Kolors Sampler.",)
    FUNCTION = "encode"
    CATEGORY = "Kolors"
    DESCRIPTION = "Encodes prompts for Kolors: several at once with '|', one of several words with '{x|y}'."
    SEARCH_ALIASES = ["kolors prompt", "clip text encode", "chatglm prompt", "wildcard", "可图"]

    def encode(
        self,
        chatglm3_model: ChatGLM3Model,
        prompt: str,
        negative_prompt: str,
        num_images_per_prompt: int,
        wildcard_seed: int = 0,
    ) -> tuple[dict[str, torch.Tensor]]:
        import random

        from ..kolors.prompts import choose_alternatives, encode_prompts, parse_prompt

        host, generator = get_host(), random.Random(wildcard_seed)
        prompts = parse_prompt(prompt, generator)
        negative_prompts = [choose_alternatives(negative_prompt, generator)] * len(prompts)
        text_encoder = chatglm3_model.text_encoder
        with host.on_device(text_encoder, chatglm3_model):
            embeds = encode_prompts(
                text_encoder, chatglm3_model.tokenizer, prompts, negative_prompts,
                num_images_per_prompt=num_images_per_prompt,
            )  # fmt: skip
        return (to_socket(embeds, host.get_intermediate_device()),)


def to_socket(embeds: PromptEmbeds, device: torch.device) -> dict[str, torch.Tensor]:
    """Gives the socket KOLORS_EMBEDS: a dict of four tensors, as the existing packs pass it."""
    return {field.name: getattr(embeds, field.name).to(device) for field in fields(embeds)}


def from_socket(kolors_embeds: dict[str, torch.Tensor]) -> PromptEmbeds:
    """Reads the socket KOLORS_EMBEDS, whichever pack filled it.

    Raises:
        ValueError: a tensor is missing, or the four do not belong together.
    """
    from ..kolors.prompts import PromptEmbeds

    names = [field.name for field in fields(PromptEmbeds)]
    missing = [name for name in names if name not in kolors_embeds]
    if missing:
        raise ValueError(f"kolors_embeds lacks {', '.join(missing)}; expected the output of Kolors Text Encode.")
    return PromptEmbeds(**{name: kolors_embeds[name] for name in names})
