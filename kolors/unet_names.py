"""What other programs call the modules of a UNet in SDXL's shape: derived from its own structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

# Before the names in a single file: ComfyUI and SGM write the first, tools that save the UNet alone the others.
UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")

# Inside a ResNet block, diffusers' names and SGM's (the code that SDXL was published with).
_SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Outside of all blocks: diffusers' name → SGM's, DiffSynth's.
_OUTSIDE = {
    "conv_in": ("input_blocks.0.0", "conv_in"),
    "time_embedding.linear_1": ("time_embed.0", "time_embedding.0"),
    "time_embedding.linear_2": ("time_embed.2", "time_embedding.2"),
    "add_embedding.linear_1": ("label_emb.0.0", "add_time_embedding.0"),
    "add_embedding.linear_2": ("label_emb.0.2", "add_time_embedding.2"),
    "encoder_hid_proj": ("encoder_hid_proj", "text_intermediate_proj"),
    "conv_norm_out": ("out.0", "conv_norm_out"),
    "conv_out": ("out.2", "conv_out"),
}


def iterate_module_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, str]]:
    """Yields the name of every module with a weight in diffusers, SGM (SDXL's own code) and DiffSynth.

    Args:
        unet: of any size; on the meta device too.
    """
    blocks = {row[0]: row[1:] for row in _iterate_blocks(unet)}
    for name, module in unet.named_modules():
        if getattr(module, "weight", None) is not None:
            yield name, *_translate(name, blocks)


def rename_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], unet: UNet2DConditionModel
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives the tensors of a single file diffusers' names.

    Prefixes go, SGM's names become diffusers'. A name that fits nothing in the UNet passes as it is, but for those
    of the VAE and the text encoders that lie in a whole checkpoint, which are left out.

    Args:
        tensors: names and tensors as a file has them.
        unet: the UNet that they are for, on the meta device.
    """
    known = {name: name for name in unet.state_dict()}
    for name, sgm, _ in iterate_module_names(unet):
        known |= {f"{sgm}.{kind}": f"{name}.{kind}" for kind in ("weight", "bias") if f"{name}.{kind}" in known}
    for name, tensor in tensors:
        if name.startswith(("first_stage_model.", "conditioner.", "cond_stage_model.")):
            continue
        prefix = next(prefix for prefix in UNET_PREFIXES if name.startswith(prefix))
        yield known.get(name.removeprefix(prefix), name), tensor


def _iterate_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, str]]:
    """Yields the name of every block in diffusers, SGM and DiffSynth.

    SGM numbers what lies between two skip connections and opens at 1, after ``conv_in``. DiffSynth numbers
    everything that runs, pushing and popping of skip connections included.

    Source: ``diffsynth/models/sdxl_unet.py`` of modelscope/DiffSynth-Studio at 22e4ae99 for DiffSynth's order.
    """
    stage, step = 1, 0
    for index, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            for slot, part in enumerate(_list_parts(block)):
                yield f"down_blocks.{index}.{part}.{layer}", f"input_blocks.{stage}.{slot}", f"blocks.{step}"
                step += 1
            stage, step = stage + 1, step + 1  # a push
        if block.downsamplers:
            yield f"down_blocks.{index}.downsamplers.0", f"input_blocks.{stage}.0", f"blocks.{step}"
            stage, step = stage + 1, step + 2  # and a push
    middle = ["resnets.0"]
    for layer in range(len(unet.mid_block.attentions)):
        middle += [f"attentions.{layer}", f"resnets.{layer + 1}"]
    for slot, part in enumerate(middle):
        yield f"mid_block.{part}", f"middle_block.{slot}", f"blocks.{step}"
        step += 1
    stage = 0
    for index, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            step += 1  # a pop
            for slot, part in enumerate(_list_parts(block)):
                yield f"up_blocks.{index}.{part}.{layer}", f"output_blocks.{stage}.{slot}", f"blocks.{step}"
                step += 1
            stage += 1
        if block.upsamplers:
            slot = len(_list_parts(block))
            yield f"up_blocks.{index}.upsamplers.0", f"output_blocks.{stage - 1}.{slot}", f"blocks.{step}"
            step += 1


def _list_parts(block: object) -> tuple[str, ...]:
    return ("resnets", "attentions") if hasattr(block, "attentions") else ("resnets",)


def _translate(name: str, blocks: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Gives SGM's and DiffSynth's name for a module that diffusers calls ``name``."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts = name.split(".")
    depth = 3 if parts[0] == "mid_block" else 4
    block, inner = ".".join(parts[:depth]), ".".join(parts[depth:])
    sgm, diffsynth = blocks[block]
    kind = parts[depth - 2]
    if kind == "resnets":
        return f"{sgm}.{_SGM_RESNET[inner]}", f"{diffsynth}.{inner}"
    if kind == "downsamplers":
        return f"{sgm}.op", f"{diffsynth}.conv"
    shortened = inner.replace(".ff.net.0.proj", ".act_fn.proj").replace(".ff.net.2", ".ff").removesuffix(".0")
    return f"{sgm}.{inner}", f"{diffsynth}.{shortened}"
