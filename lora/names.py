"""What each format calls a UNet's modules: one exact map, derived from the UNet's own structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from ..kolors.unet_names import iterate_module_names

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

DIFFUSERS, PEFT, KOHYA, KOHYA_SGM, COMFYUI, DIFFSYNTH = (
    "diffusers", "peft", "kohya", "kohya (SGM names)", "comfyui", "diffsynth",
)  # fmt: skip
WRITABLE = (DIFFUSERS, KOHYA, DIFFSYNTH)  # formats that are written, not only read


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
    from ..kolors.compact import get_weight_shape  # needs torch, which the nodes load without

    modules = []
    for name, sgm, diffsynth in iterate_module_names(unet):
        module = unet.get_submodule(name)
        shape, has_bias = get_weight_shape(module), getattr(module, "bias", None) is not None
        modules.append(ModuleNames(diffusers=name, sgm=sgm, diffsynth=diffsynth, shape=shape, has_bias=has_bias))
    return UNetNames(tuple(modules))


@lru_cache(maxsize=1)
def get_kolors_names() -> UNetNames:
    """Gives the names in the full-size UNet of Kolors, without any weights."""
    from ..kolors.unet import KOLORS_UNET_CONFIG, build_unet

    return get_unet_names(build_unet(KOLORS_UNET_CONFIG, device="meta"))


def _flatten(name: str) -> str:
    return name.replace(".", "_")
