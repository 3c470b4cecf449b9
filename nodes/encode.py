"""The node that encodes prompts."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .host import get_host
from .models import ChatGLM3Model

if TYPE_CHECKING:
    import torch

    from ..kolors.prompts import PromptEmbeds


PROMPT_FOLDER = "kolors_prompts"


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
                "cache": (["memory", "disk"], {"default": "memory", "advanced": True, "tooltip": "Where encoded "
                          "prompts are kept, so that a prompt seen before needs no text encoder. memory: up to 256 "
                          f"MB, till the program ends. disk: also up to 1 GB in {PROMPT_FOLDER} in the output "
                          "folder."}),
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
        cache: str = "memory",
    ) -> tuple[dict[str, torch.Tensor]]:
        import random

        from ..kolors.prompts import choose_alternatives, join_texts, parse_prompt

        host, generator = get_host(), random.Random(wildcard_seed)
        prompts = parse_prompt(prompt, generator)
        negative_prompts = [choose_alternatives(negative_prompt, generator)] * len(prompts)
        folder = host.get_output_folder() / PROMPT_FOLDER if cache == "disk" else None
        texts = chatglm3_model.encode_texts(host, [*prompts, *negative_prompts], folder)
        embeds = join_texts(texts, prompts, negative_prompts, num_images_per_prompt=num_images_per_prompt)
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
