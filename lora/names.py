"""What each format calls a UNet's modules: one exact map, derived from the UNet's own structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DIFFUSERS, PEFT, KOHYA, KOHYA_SGM, COMFYUI, DIFFSYNTH = (
    "diffusers", "peft", "kohya", "kohya (SGM names)", "comfyui", "diffsynth",
)  # fmt: skip
WRITABLE = (DIFFUSERS, KOHYA, DIFFSYNTH)  # formats that are written, not only read

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


@dataclass(frozen=True, kw_only=True)
class ModuleNames:
    """One module of the UNet under its three names.

    Attributes:
        diffusers: such as ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``.
        sgm: such as ``input_blocks.4.1.transformer_blocks.0.attn1.to_q``.
        diffsynth: such as ``blocks.7.transformer_blocks.0.attn1.to_q``.
        shape: of its weight, (out, in) or (out, in, kernel height, kernel width), or (channels,) of a norm.
        has_bias: whether it has a bias.
    """

    diffusers: str
    sgm: str
    diffsynth: str
    shape: tuple[int, ...]
    has_bias: bool

    @property
    def is_attention(self) -> bool:
        """Whether it is a query, key, value or output projection of an attention layer."""
        return ".attn1.to_" in self.diffusers or ".attn2.to_" in self.diffusers

    @property
    def kohya(self) -> str:
        """The name in kohya's files, made from diffusers' name: diffusers' Kolors pipeline knows no SGM names."""
        return f"lora_unet_{_flatten(self.diffusers)}"

    @property
    def processor(self) -> str:
        """diffusers' older spelling for attention layers, the only one that ComfyUI reads; else the plain one."""
        if not self.is_attention:
            return self.diffusers
        return self.diffusers.replace(".to_", ".processor.to_").removesuffix(".0")

    def iterate_aliases(self) -> Iterator[tuple[str, str]]:
        """Yields every spelling in which files name the module, with the format it tells of."""
        yield self.kohya, KOHYA
        yield f"lycoris_{_flatten(self.diffusers)}", KOHYA
        yield f"lora_unet_{_flatten(self.sgm)}", KOHYA_SGM
        yield f"diffusion_model.{self.sgm}", COMFYUI
        yield self.diffsynth, DIFFSYNTH
        spellings = [self.diffusers]
        if self.is_attention:
            inserted = self.diffusers.replace(".to_", ".processor.to_")
            spellings += [self.diffusers.removesuffix(".0"), inserted, inserted.removesuffix(".0")]
        for spelling in spellings:
            yield f"unet.{spelling}", DIFFUSERS
            yield f"unet.base_model.model.{spelling}", DIFFUSERS
            yield f"base_model.model.{spelling}", PEFT
            yield spelling, PEFT


@dataclass(frozen=True)
class UNetNames:
    """The modules of a UNet of one structure. Equal for equal structures; sorted as the UNet lists them."""

    modules: tuple[ModuleNames, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.modules))  # asked for at every look-up in a cache

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def by_diffusers(self) -> dict[str, ModuleNames]:
        """diffusers' name → module."""
        return {module.diffusers: module for module in self.modules}

    @cached_property
    def by_alias(self) -> dict[str, tuple[ModuleNames, str]]:
        """Every spelling → module and the format that it tells of; the first format listed where several agree."""
        found: dict[str, tuple[ModuleNames, str]] = {}
        for module in self.modules:
            for alias, spelling in module.iterate_aliases():
                known = found.setdefault(alias, (module, spelling))
                assert known[0] is module, f"{alias} names {known[0].diffusers} and {module.diffusers}"
        return found


def get_unet_names(unet: UNet2DConditionModel) -> UNetNames:
    """Derives the names from a UNet in SDXL's shape, of any size; on the meta device too."""
    blocks = {row[0]: row[1:] for row in _iterate_blocks(unet)}
    modules = []
    for name, module in unet.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            sgm, diffsynth = _translate(name, blocks)
            has_bias = getattr(module, "bias", None) is not None
            modules.append(
                ModuleNames(diffusers=name, sgm=sgm, diffsynth=diffsynth, shape=tuple(weight.shape), has_bias=has_bias)
            )
    return UNetNames(tuple(modules))


@lru_cache(maxsize=1)
def get_kolors_names() -> UNetNames:
    """Gives the names in the full-size UNet of Kolors, without any weights."""
    from ..kolors.unet import KOLORS_UNET_CONFIG, build_unet

    return get_unet_names(build_unet(KOLORS_UNET_CONFIG, device="meta"))


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


def _flatten(name: str) -> str:
    return name.replace(".", "_")
