"""Nodes that load: the UNet, the text encoder, the VAE."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..kolors.offload import OFFLOADS
from ..kolors.precision import TEXT_PRECISIONS, UNET_PRECISIONS
from .host import Host, get_host
from .models import (
    DEMO,
    KOLORS,
    MODEL_CHOICES,
    ChatGLM3Model,
    KolorsModel,
    describe_missing,
    describe_offline,
    find_model,
    find_vae,
    list_vae_folders,
    list_vaes,
    locate_model,
    locate_published_vae,
)

AS_FILE = "as file"
_TEXT_FOLDERS = ("LLM", "text_encoders")
_SUFFIXES = frozenset({".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt"})
OFFLOAD_OPTIONS = {"default": "none", "advanced": True, "tooltip": "For cards with less memory than the weights take. "
                   "blocks: they stay in main memory and visit the card layer by layer, which is slower."}  # fmt: skip
EMBEDDING_OPTIONS = {"default": False, "advanced": True, "tooltip": "For cards with little memory: the table of word "
                     "vectors (0.5 GB) stays in main memory."}  # fmt: skip


class DownloadAndLoadKolorsModel:
    """Loads Kolors' UNet from ``models/diffusers``, and fetches it first if it is not there."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL_CHOICES, {"default": KOLORS, "tooltip": "Kolors itself (5 GB, in models/diffusers/"
                          "Kolors), or the small model of coloured shapes that comes with this pack."}),
                "precision": (list(UNET_PRECISIONS), {"default": "fp16", "tooltip": "Number format of the weights: "
                              "fp16 and bf16 take 5.2 GB, fp32 10.3 GB, fp8 2.6 GB, nf4 2.0 GB. fp8 and nf4 compute "
                              "as fp16. What the device cannot compute is replaced, with a line in the log."}),
            },
            "optional": {"source": declare_source(), "offload": (list(OFFLOADS), OFFLOAD_OPTIONS)},
        }  # fmt: skip

    RETURN_TYPES = ("KOLORSMODEL",)
    RETURN_NAMES = ("kolors_model",)
    OUTPUT_TOOLTIPS = ("The UNet, for Kolors Sampler.",)
    FUNCTION = "loadmodel"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads the Kolors UNet, the network that draws. Downloads it first if it is not there."
    SEARCH_ALIASES = ["kolors unet loader", "kwai kolors", "load diffusion model", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool | str:
        return check_model(model, "unet")

    def loadmodel(self, model: str, precision: str, source: str = "auto", offload: str = "none") -> tuple[KolorsModel]:
        host = get_host()
        folder = find_model(host, model, "unet", source)
        return (load_kolors(host, folder / "unet", precision, offload),)


class LoadKolorsUNet:
    """Loads Kolors' UNet from one file in ``models/diffusion_models``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "unet_name": (list_unets(get_host()), {"tooltip": "A file in models/diffusion_models or models/unet: "
                              "Kolors' UNet in fp16, bf16, fp32 or fp8, with diffusers' or ComfyUI's names."}),
            },
            "optional": {
                "precision": ([AS_FILE, *UNET_PRECISIONS], {"default": AS_FILE, "tooltip": "Number format of the "
                              "weights: that of the file, or fp16 and bf16 (5.2 GB), fp32 (10.3 GB), fp8 (2.6 GB), nf4 "
                              "(2.0 GB). What the device cannot compute is replaced, with a line in the log."}),
                "offload": (list(OFFLOADS), OFFLOAD_OPTIONS),
            },
        }  # fmt: skip

    RETURN_TYPES = ("KOLORSMODEL",)
    RETURN_NAMES = ("kolors_model",)
    OUTPUT_TOOLTIPS = ("The UNet, for Kolors Sampler.",)
    FUNCTION = "load_unet"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads the Kolors UNet, the network that draws, from a single file."
    SEARCH_ALIASES = ["kolors single file", "kolors fp8", "unet loader", "load diffusion model", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str) -> bool | str:
        return check_file("diffusion_models", unet_name, "unet")

    def load_unet(self, unet_name: str, precision: str = AS_FILE, offload: str = "none") -> tuple[KolorsModel]:
        host = get_host()
        return (load_kolors(host, host.resolve_file("diffusion_models", unet_name), precision, offload),)


class DownloadAndLoadChatGLM3:
    """Loads Kolors' text encoder, ChatGLM3-6B, from ``models/diffusers``, and fetches it first if it is not there."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "precision": (list(TEXT_PRECISIONS), {"default": "fp16", "tooltip": "Number format of the weights: "
                              "fp16, bf16 and fp32 take 12.0 GB (fp32 computes only), quant8 6.4 GB, quant4 3.9 GB."}),
            },
            "optional": {
                "model": (MODEL_CHOICES, {"default": KOLORS, "tooltip": "Must be the model that the UNet is from."}),
                "source": declare_source(),
                "embedding_on_cpu": ("BOOLEAN", EMBEDDING_OPTIONS),
            },
        }  # fmt: skip

    RETURN_TYPES = ("CHATGLM3MODEL",)
    RETURN_NAMES = ("chatglm3_model",)
    OUTPUT_TOOLTIPS = ("The text encoder with its tokenizer, for Kolors Text Encode.",)
    FUNCTION = "loadmodel"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads ChatGLM3, which reads the prompts for Kolors. Downloads it first if it is not there."
    SEARCH_ALIASES = ["kolors text encoder loader", "chatglm", "glm3", "clip loader", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = KOLORS) -> bool | str:
        return check_model(model, "text_encoder")

    def loadmodel(
        self, precision: str, model: str = KOLORS, source: str = "auto", embedding_on_cpu: bool = False
    ) -> tuple[ChatGLM3Model]:
        from ..kolors.text_encoder import find_tokenizer

        host = get_host()
        folder = find_model(host, model, "text_encoder", source)
        tokenizer = find_tokenizer(folder)
        return (load_chatglm3(host, folder / "text_encoder", tokenizer, precision, embedding_on_cpu),)


class LoadChatGLM3:
    """Loads Kolors' text encoder from one file in ``models/LLM`` or ``models/text_encoders``."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "chatglm3_checkpoint": (list_checkpoints(get_host()), {"tooltip": "A file in models/LLM or "
                                        "models/text_encoders, or the first of its shards: ChatGLM3, also in its own "
                                        "8-bit and 4-bit form. tokenizer.model is looked for beside it and in "
                                        "models/diffusers/Kolors."}),
            },
            "optional": {
                "precision": ([AS_FILE, *TEXT_PRECISIONS], {"default": AS_FILE, "tooltip": "Number format of the "
                              "weights: that of the file, or as in (Down)load ChatGLM3 Model. ChatGLM's own 8-bit and "
                              "4-bit files stay as they are."}),
                "embedding_on_cpu": ("BOOLEAN", EMBEDDING_OPTIONS),
            },
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
            return check_path(resolve_checkpoint(get_host(), chatglm3_checkpoint), "text_encoder")
        except (FileNotFoundError, ValueError) as error:
            return str(error)

    def loadmodel(
        self, chatglm3_checkpoint: str, precision: str = AS_FILE, embedding_on_cpu: bool = False
    ) -> tuple[ChatGLM3Model]:
        from ..kolors.text_encoder import find_tokenizer

        host = get_host()
        path = resolve_checkpoint(host, chatglm3_checkpoint)
        beside = (path if path.is_dir() else path.parent) / "tokenizer.model"
        tokenizer = beside if beside.is_file() else find_tokenizer(find_model(host, KOLORS, "tokenizer"))
        return (load_chatglm3(host, path, tokenizer, precision, embedding_on_cpu),)


class KolorsVAELoader:
    """Loads a VAE for Kolors from a file, a diffusers folder or the bundled model."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        host = get_host()
        return {
            "required": {
                "vae_name": (list_vaes(host), {"default": DEMO, "tooltip": "A file in models/vae: SDXL's VAE fits "
                             "Kolors, and sdxl.vae.safetensors (335 MB) is downloaded if it is not there. Or the vae "
                             "folder of a model in models/diffusers, or the bundled model's."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("VAE",)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for VAE Decode and VAE Encode.",)
    FUNCTION = "load_vae"
    CATEGORY = "Kolors"
    DESCRIPTION = "Loads the VAE that turns latents into pictures and back. Reads the bundled model's too."
    SEARCH_ALIASES = ["sdxl vae", "vae loader", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str) -> bool | str:
        return check_vae(vae_name)

    def load_vae(self, vae_name: str) -> tuple[Any]:
        host = get_host()
        return (host.load_vae(find_vae(host, vae_name)),)


def declare_source() -> tuple[list[str], dict[str, Any]]:
    """Gives the declaration of the input ``source``."""
    from ..kolors.download import SOURCES  # not with the pack: it loads Python's network modules

    return list(SOURCES), {"default": SOURCES[0], "advanced": True, "tooltip": "Where the files come from if they are "
                           "not there: huggingface, modelscope, or auto, the first that answers."}  # fmt: skip


def check_model(model: str, part: str) -> bool | str:
    """Says for VALIDATE_INPUTS whether a model's part can be loaded or fetched: True, or what is wrong with it."""
    from ..kolors.download import find_missing

    try:
        folder = locate_model(get_host(), model, part)
        if find_missing(folder, part):
            return describe_missing(get_host(), model, part) or True
    except ValueError as error:
        return str(error)
    return check_path(folder / part, part)


def check_vae(name: str) -> bool | str:
    """Says for VALIDATE_INPUTS whether a VAE can be loaded or fetched: True, or what is wrong with it."""
    from ..kolors.download import is_whole

    folder = list_vae_folders(get_host()).get(name)
    if folder:
        return check_path(folder, "vae")
    published = locate_published_vae(get_host(), name)
    if published and not is_whole(published):
        return describe_offline(published.parent, "vae") or True
    return check_file("vae", name, "vae")


def check_file(folder_kind: str, name: str, part: str) -> bool | str:
    """Says for VALIDATE_INPUTS whether a listed file can be loaded as a part: True, or what is wrong with it."""
    host = get_host()
    try:
        return check_path(host.resolve_file(folder_kind, name), part)
    except (FileNotFoundError, ValueError) as error:
        return str(error)


def check_path(path: Path, part: str) -> bool | str:
    """Says whether a file or folder can be loaded as a part, by its header: True, or what is wrong with it."""
    from ..kolors.checkpoint import CheckpointError
    from ..kolors.identify import check_part

    try:
        check_part(path, part)
    except CheckpointError as error:
        return str(error)
    return True


def list_unets(host: Host) -> list[str]:
    """Lists the model files in ``models/diffusion_models`` and ``models/unet``, whatever they are."""
    return host.list_files("diffusion_models")


def load_kolors(host: Host, path: Path, precision: str, offload: str) -> KolorsModel:
    """Loads a UNet onto the CPU; ``AS_FILE`` is the precision that the file has."""
    from ..kolors.inventory import read_precision
    from ..kolors.unet import load_unet

    precision = read_precision(path) if precision == AS_FILE else precision
    unet = load_unet(path, precision=precision, device=host.get_device(), on_progress=host.report_work)
    return KolorsModel(unet, offload=offload)


def load_chatglm3(
    host: Host, path: Path, tokenizer_path: Path, precision: str, embedding_on_cpu: bool = False
) -> ChatGLM3Model:
    """Loads the tokenizer, and looks at the text encoder, which is loaded when a text is to be encoded.

    ``AS_FILE`` is the precision that the file has; ChatGLM's own 8- and 4-bit files stay what they are.
    """
    from ..kolors.inventory import read_precision
    from ..kolors.text_encoder import find_text_encoder
    from ..kolors.tokenizer import Tokenizer

    if precision == AS_FILE:
        stored = read_precision(path)
        precision = stored if stored in TEXT_PRECISIONS else "fp16"
    return ChatGLM3Model(
        files=find_text_encoder(path), tokenizer=Tokenizer(tokenizer_path), precision=precision,
        device=host.get_device(), embedding_on_cpu=embedding_on_cpu,
    )  # fmt: skip


def list_checkpoints(host: Host) -> list[str]:
    """Lists ``models/LLM`` and behind it ``models/text_encoders``: single files, and of shards the first.

    The sub-folder ``checkpoints`` of ``models/LLM`` is left out of the names, as saved workflows have them.
    """
    names = {
        name.removeprefix("checkpoints/"): None for kind in _TEXT_FOLDERS for name in sorted(host.list_files(kind))
    }
    return [name for name in names if Path(name).suffix.lower() in _SUFFIXES and get_shard_number(name) <= 1]


def get_shard_number(name: str) -> int:
    """Gives the number of a shard by its file's name, such as ``model-00002-of-00007.bin``; 0 for a single file."""
    shard = re.search(r"-(\d{5})-of-\d{5}\.\w+$", name)
    return int(shard[1]) if shard else 0


def resolve_checkpoint(host: Host, name: str) -> Path:
    """Gives the path of a file that ``list_checkpoints`` names, or of a shard the folder.

    Raises:
        FileNotFoundError: it is not there; says what is.
        ValueError: the name leads out of the folder.
    """
    for kind, candidate in (("LLM", name), ("LLM", f"checkpoints/{name}"), ("text_encoders", name)):
        try:
            path = host.resolve_file(kind, candidate)
        except FileNotFoundError:
            continue
        return path.parent if get_shard_number(name) else path
    there = ", ".join(list_checkpoints(host)) or "nothing"
    raise FileNotFoundError(f"There is no file {name!r} in {host.get_folders('LLM')[0]}; there is: {there}.")
