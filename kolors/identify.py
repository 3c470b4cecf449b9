"""What a checkpoint file is, told by the names and shapes of its tensors; nothing of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from .checkpoint import CheckpointError, TensorInfo, find_weight_files, read_headers
from .unet_names import UNET_PREFIXES


class FileKind(Enum):
    """What a file or a folder of weights is. The value is how messages call it."""

    KOLORS_UNET = "Kolors' UNet"
    KOLORS_INPAINTING_UNET = "Kolors' inpainting UNet (9 input channels)"
    FAULTY_KOLORS_UNET = "a Kolors UNet without encoder_hid_proj, as an early, faulty upload was"
    SDXL_UNET = "an SDXL UNet"
    SDXL_CHECKPOINT = "a whole SDXL checkpoint"
    CHATGLM3 = "ChatGLM3"
    CHATGLM3_INT8 = "ChatGLM3 in ChatGLM's own 8-bit form"
    CHATGLM3_INT4 = "ChatGLM3 in ChatGLM's own 4-bit form"
    GLM4 = "GLM-4, a larger language model"
    VAE = "a VAE of SDXL's kind"
    FOREIGN_VAE = "a VAE of another model (SD3's or Flux's, for instance)"
    LORA = "a LoRA"
    CONTROLNET = "a ControlNet"
    IP_ADAPTER = "an IP-Adapter"
    OTHER = "something that this pack does not know"


KOLORS_UNETS = frozenset({FileKind.KOLORS_UNET})
TEXT_ENCODERS = frozenset({FileKind.CHATGLM3, FileKind.CHATGLM3_INT8, FileKind.CHATGLM3_INT4})
VAES = frozenset({FileKind.VAE, FileKind.SDXL_CHECKPOINT})  # a whole checkpoint holds a VAE too
# Part of a model → what may lie there.
PART_KINDS: Mapping[str, frozenset[FileKind]] = MappingProxyType(
    {"unet": KOLORS_UNETS, "text_encoder": TEXT_ENCODERS, "vae": VAES}
)
_PART_NAMES: Mapping[str, str] = MappingProxyType(
    {"unet": "the UNet", "text_encoder": "the text encoder", "vae": "the VAE"}
)

# What belongs where nothing else does: kind → where it is published.
_SOURCES: Mapping[FileKind, str] = MappingProxyType(
    {
        FileKind.KOLORS_UNET: "unet/diffusion_pytorch_model.fp16.safetensors of Kwai-Kolors/Kolors",
        FileKind.CHATGLM3: "the text_encoder folder of Kwai-Kolors/Kolors, or a file of Kijai/ChatGLM3-safetensors",
        FileKind.VAE: "sdxl.vae.safetensors of madebyollin/sdxl-vae-fp16-fix",
    }
)
_CHATGLM_HOME = (
    "belongs in models/LLM, for Load ChatGLM3 Model (with its config.json also in models/diffusers/Kolors/text_encoder)"
)
# Kind → what shall happen to such a file.
_HOMES: Mapping[FileKind, str] = MappingProxyType(
    {
        FileKind.KOLORS_UNET: "belongs in models/diffusion_models, for Load Kolors UNet (with its config.json also in "
        "models/diffusers/Kolors/unet)",
        FileKind.KOLORS_INPAINTING_UNET: "has no node in this pack yet",
        FileKind.FAULTY_KOLORS_UNET: "is of no use: delete it",
        FileKind.SDXL_UNET: "belongs in models/diffusion_models, for ComfyUI's Load Diffusion Model, not for Kolors",
        FileKind.SDXL_CHECKPOINT: "belongs in models/checkpoints, for ComfyUI's Load Checkpoint",
        FileKind.CHATGLM3: _CHATGLM_HOME,
        FileKind.CHATGLM3_INT8: _CHATGLM_HOME,
        FileKind.CHATGLM3_INT4: _CHATGLM_HOME,
        FileKind.GLM4: "is not for Kolors: its sizes differ",
        FileKind.VAE: "belongs in models/vae, for Load Kolors VAE or ComfyUI's Load VAE",
        FileKind.FOREIGN_VAE: "belongs in models/vae, for the model that it is from, not for Kolors",
        FileKind.LORA: "belongs in models/loras, for Kolors LoRA Loader",
        FileKind.CONTROLNET: "belongs in models/controlnet, for ComfyUI's Load ControlNet Model",
        FileKind.IP_ADAPTER: "belongs in models/ipadapter, for an IP-Adapter pack",
        FileKind.OTHER: "is not for Kolors",
    }
)

_LORA_MARKS = re.compile(
    r"\.lora_(A|B|up|down|mid|magnitude_vector)\b|_lora\.(up|down)\.|\.(hada|lokr)_w|\.lora\.(up|down)\.|^lora_unet_|^lycoris_"
)
_QKV = re.compile(r"encoder\.layers\.\d+\.self_attention\.query_key_value\.weight")
_SDXL_POOLED_WIDTH = 2816  # inputs of SDXL's add_embedding; Kolors has 5632
_GLM4_VOCABULARY = 100_000  # pieces: ChatGLM3 has 65,024, GLM-4 151,552


def identify(path: Path) -> FileKind:
    """Tells what a file, or a folder of the diffusers layout, holds.

    Only headers are read. Names decide, with shapes where names are shared: input channels of UNets, latent
    channels of VAEs, stored widths of quantised layers. The name of the file says nothing. ChatGLM2 has ChatGLM3's
    names and shapes and SD 1.5's VAE those of SDXL's, so these pass for them.

    Raises:
        CheckpointError: nothing there, a damaged file, a missing shard, or a pickle that holds more than tensors.
    """
    if not path.exists():
        raise CheckpointError(f"Nothing is at {path}.")
    return classify(read_headers(find_weight_files(path)))


def classify(tensors: Mapping[str, TensorInfo]) -> FileKind:
    """Tells what a table of tensors belongs to, as ``identify``."""
    if any(_LORA_MARKS.search(name) for name in tensors):
        return FileKind.LORA
    if any(name.startswith(("ip_adapter.", "image_proj.")) for name in tensors):
        return FileKind.IP_ADAPTER
    if any(name.startswith(("controlnet_", "control_model.", "zero_convs.", "input_hint_block.")) for name in tensors):
        return FileKind.CONTROLNET
    return _classify_unet(tensors) or _classify_text_encoder(tensors) or _classify_vae(tensors) or FileKind.OTHER


def _classify_unet(tensors: Mapping[str, TensorInfo]) -> FileKind | None:
    for prefix in UNET_PREFIXES:
        for conv_in, conv_out, pooled in (
            ("conv_in", "conv_out", "add_embedding.linear_1"),
            ("input_blocks.0.0", "out.2", "label_emb.0.0"),
        ):
            names = (f"{prefix}{name}.weight" for name in (conv_in, conv_out, pooled))
            conv_in_info, conv_out_info, pooled_info = map(tensors.get, names)
            if conv_in_info and conv_out_info:
                channels = conv_in_info.shape[1]
                has_projection = f"{prefix}encoder_hid_proj.weight" in tensors
                return _choose_unet(tensors, channels, pooled_info, has_projection)
    return None


def _choose_unet(
    tensors: Mapping[str, TensorInfo], channels: int, pooled: TensorInfo | None, has_projection: bool
) -> FileKind:
    if pooled is None:
        return FileKind.OTHER  # SD 1.5's UNet, for instance
    if has_projection:
        kinds = {4: FileKind.KOLORS_UNET, 9: FileKind.KOLORS_INPAINTING_UNET}
        return kinds.get(channels, FileKind.OTHER)
    if pooled.shape[1] == 2 * _SDXL_POOLED_WIDTH:
        return FileKind.FAULTY_KOLORS_UNET
    is_whole = any(name.startswith(("first_stage_model.", "conditioner.")) for name in tensors)
    return FileKind.SDXL_CHECKPOINT if is_whole else FileKind.SDXL_UNET


def _classify_text_encoder(tensors: Mapping[str, TensorInfo]) -> FileKind | None:
    tensors = {name.removeprefix("transformer."): info for name, info in tensors.items()}
    layer = next((name for name in tensors if _QKV.fullmatch(name)), None)
    if layer is None:
        return None
    embedding = tensors.get("embedding.word_embeddings.weight")
    if embedding and embedding.shape[0] > _GLM4_VOCABULARY:
        return FileKind.GLM4
    if f"{layer}_scale" not in tensors:
        return FileKind.CHATGLM3 if "float" in tensors[layer].dtype else FileKind.OTHER
    # Quantised in ChatGLM's form: one byte holds one value, or two. The norm before it has the layer's width.
    norm = tensors.get(layer.replace("self_attention.query_key_value", "input_layernorm"))
    stored, width = tensors[layer].shape[1], norm.shape[0] if norm else 0
    return {width: FileKind.CHATGLM3_INT8, width // 2: FileKind.CHATGLM3_INT4}.get(stored, FileKind.OTHER)


def _classify_vae(tensors: Mapping[str, TensorInfo]) -> FileKind | None:
    for prefix in ("", "first_stage_model.", "vae."):
        conv_in = tensors.get(f"{prefix}decoder.conv_in.weight")
        if conv_in and len(conv_in.shape) == 4:
            return FileKind.VAE if conv_in.shape[1] == 4 else FileKind.FOREIGN_VAE
    return None


def describe_home(kind: FileKind) -> str:
    """Says where a file of a kind belongs, as the end of a sentence about it."""
    return _HOMES[kind]


def check_kind(path: Path, expected: frozenset[FileKind] | set[FileKind], place: str) -> FileKind:
    """Checks that a file, or a folder, is of a kind that a place takes.

    Args:
        path: the file or folder.
        expected: the kinds that may lie there.
        place: what it is read as, for the message: ``the UNet``, ``the text encoder``, ``the VAE``.

    Returns:
        What it is.

    Raises:
        CheckpointError: it is something else. The message says what, which file belongs there, and where this one
            belongs. Also as ``identify``.
    """
    kind = identify(path)
    if kind not in expected:
        wanted, source = next((wanted, source) for wanted, source in _SOURCES.items() if wanted in expected)
        what = "folder's file" if path.is_dir() else "file"
        raise CheckpointError(
            f"{path} is {kind.value}. Expected as {place}: {wanted.value}, {source}. This {what} {describe_home(kind)}."
        )
    return kind


def check_part(path: Path, part: str) -> FileKind:
    """Checks that a file, or a folder, can be read as a part of the model: ``unet``, ``text_encoder`` or ``vae``.

    Raises:
        CheckpointError: it cannot, as ``check_kind``.
    """
    return check_kind(path, PART_KINDS[part], _PART_NAMES[part])
