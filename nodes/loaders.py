"""Nodes that load: the UNet, the text encoder, the VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..kolors.precision import PRECISIONS, get_dtype
from .host import Host, get_host
from .models import (
    DEMO,
    KOLORS,
    MODEL_CHOICES,
    ChatGLM3Model,
    KolorsModel,
    describe_missing,
    find_model,
    list_vae_folders,
)

QUANTISED = ("quant4", "quant8")

logger = logging.getLogger(__name__)


class DownloadAndLoadKolorsModel:
    """Loads Kolors' UNet from ``models/diffusers``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL_CHOICES, {"default": KOLORS, "tooltip": "Kolors itself (5 GB, in models/diffusers/"
                          "Kolors), or the small model of coloured shapes that comes with this pack."}),
                "precision": (list(PRECISIONS), {"default": "fp16", "tooltip": "Number format of the weights: fp16 and "
                              "bf16 take 5 GB, fp32 10 GB. What the device cannot compute is replaced, with a "
                              "line in the log."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("KOLORSMODEL",)
    RETURN_NAMES = ("kolors_model",)
    OUTPUT_TOOLTIPS = ("The UNet, for Kolors Sampler.",)
    FUNCTION = "loadmodel"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads the Kolors UNet, the network that draws."
    SEARCH_ALIASES = ["kolors unet loader", "kwai kolors", "load diffusion model", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool | str:
        return check_model(model, "unet")

    def loadmodel(self, model: str, precision: str) -> tuple[KolorsModel]:
        from ..kolors.unet import load_unet

        host = get_host()
        folder = find_model(host, model, "unet")
        return (KolorsModel(load_unet(folder / "unet", precision=precision, device=host.get_device())),)


class DownloadAndLoadChatGLM3:
    """Loads Kolors' text encoder, ChatGLM3-6B, from ``models/diffusers``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "precision": (["fp16", *QUANTISED, "bf16", "fp32"], {"default": "fp16", "tooltip": "Number format "
                              "of the weights: fp16 and bf16 take 12 GB, fp32 24 GB. quant4 and quant8 load as fp16 "
                              "for now."}),
            },
            "optional": {
                "model": (MODEL_CHOICES, {"default": KOLORS, "tooltip": "Must be the model that the UNet is from."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("CHATGLM3MODEL",)
    RETURN_NAMES = ("chatglm3_model",)
    OUTPUT_TOOLTIPS = ("The text encoder with its tokenizer, for Kolors Text Encode.",)
    FUNCTION = "loadmodel"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads ChatGLM3, which reads the prompts for Kolors."
    SEARCH_ALIASES = ["kolors text encoder loader", "chatglm", "glm3", "clip loader", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = KOLORS) -> bool | str:
        return check_model(model, "text_encoder")

    def loadmodel(self, precision: str, model: str = KOLORS) -> tuple[ChatGLM3Model]:
        from ..kolors.text_encoder import find_tokenizer

        host = get_host()
        folder = find_model(host, model, "text_encoder")
        return (load_chatglm3(host, folder / "text_encoder", find_tokenizer(folder), precision),)


class LoadChatGLM3:
    """Loads Kolors' text encoder from one file in ``models/LLM``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "chatglm3_checkpoint": (list_checkpoints(get_host()), {"tooltip": "A file in models/LLM, fp16 "
                                        "(12 GB). Its tokenizer.model is looked for beside it and in "
                                        "models/diffusers/Kolors."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("CHATGLM3MODEL",)
    RETURN_NAMES = ("chatglm3_model",)
    OUTPUT_TOOLTIPS = ("The text encoder with its tokenizer, for Kolors Text Encode.",)
    FUNCTION = "loadmodel"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads ChatGLM3, which reads the prompts for Kolors, from a single file."
    SEARCH_ALIASES = ["chatglm3 single file", "kolors text encoder loader", "clip loader", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, chatglm3_checkpoint: str) -> bool | str:
        try:
            resolve_checkpoint(get_host(), chatglm3_checkpoint)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    def loadmodel(self, chatglm3_checkpoint: str) -> tuple[ChatGLM3Model]:
        from ..kolors.text_encoder import find_tokenizer

        host = get_host()
        path = resolve_checkpoint(host, chatglm3_checkpoint)
        beside = path.parent / "tokenizer.model"
        tokenizer = beside if beside.is_file() else find_tokenizer(find_model(host, KOLORS, "tokenizer"))
        return (load_chatglm3(host, path, tokenizer, "fp16"),)


class KolorsVAELoader:
    """Loads a VAE for Kolors from a file, a diffusers folder or the bundled model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = get_host()
        names = [*list_vae_folders(host), *host.list_files("vae")]
        return {
            "required": {
                "vae_name": (names, {"default": DEMO, "tooltip": "A file in models/vae (SDXL's VAE fits Kolors), the "
                             "vae folder of a model in models/diffusers, or the bundled model's."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for VAE Decode and VAE Encode.",)
    FUNCTION = "load_vae"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads the VAE that turns latents into pictures and back. Reads the bundled model's too."
    SEARCH_ALIASES = ["sdxl vae", "vae loader", "可图"]

    def load_vae(self, vae_name: str) -> tuple[Any]:
        host = get_host()
        folder = list_vae_folders(host).get(vae_name)
        return (host.load_vae(folder or host.resolve_file("vae", vae_name)),)


def check_model(model: str, part: str) -> bool | str:
    """Says for VALIDATE_INPUTS whether a model's part is there or can be fetched: True, or what is missing."""
    try:
        return describe_missing(get_host(), model, part) or True
    except ValueError as error:
        return str(error)


def load_chatglm3(host: Host, path: Path, tokenizer_path: Path, precision: str) -> ChatGLM3Model:
    """Loads text encoder and tokenizer onto the CPU."""
    from ..kolors.text_encoder import load_text_encoder
    from ..kolors.tokenizer import Tokenizer

    if precision in QUANTISED:
        logger.warning("%s is not supported yet: loading the text encoder as fp16 (12 GB).", precision)
        precision = "fp16"
    tokenizer = Tokenizer(tokenizer_path)
    return ChatGLM3Model(load_text_encoder(path, precision=precision, device=host.get_device()), tokenizer)


def list_checkpoints(host: Host) -> list[str]:
    """Lists ``models/LLM``, with or without the sub-folder ``checkpoints`` that saved workflows leave out."""
    return sorted({name.removeprefix("checkpoints/") for name in host.list_files("LLM")})


def resolve_checkpoint(host: Host, name: str) -> Path:
    """Gives the path of a file that ``list_checkpoints`` names.

    Raises:
        FileNotFoundError: it is not there; says what is.
        ValueError: the name leads out of the folder.
    """
    for candidate in (name, f"checkpoints/{name}"):
        try:
            return host.resolve_file("LLM", candidate)
        except FileNotFoundError:
            continue
    there = ", ".join(list_checkpoints(host)) or "nothing"
    raise FileNotFoundError(f"There is no file {name!r} in {host.get_folders('LLM')[0]}; there is: {there}.")
