"""LoRA files as tables of tensors: told apart by their keys, turned into one form, and written in three formats."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from .adapters import Adapter, Difference, Hadamard, Kronecker, LowRank
from .names import DIFFSYNTH, DIFFUSERS, KOHYA, WRITABLE, ModuleNames, UNetNames

logger = logging.getLogger(__name__)

PEFT_METADATA = "lora_adapter_metadata"  # diffusers' entry in the header: peft's configuration as JSON
_SHOWN = 5


class LoraError(ValueError):
    """A LoRA file that is damaged, of another model or cannot be written. The message says which and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lora:
    """A LoRA of one UNet, whatever file it came from. Never changed.

    Attributes:
        names: of the UNet's modules.
        adapters: a parameter's name, such as ``conv_in.weight`` or ``conv_in.bias``, → what changes it.
        format: how the file spells its keys: a name of ``lora.names``.
        metadata: of the file's header.
        text_keys: keys for text encoders other than Kolors', which are left out.
        unknown_keys: keys that fit nothing, where these were to be ignored.
    """

    names: UNetNames
    adapters: Mapping[str, Adapter]
    format: str = DIFFUSERS
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    text_keys: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()

    @property
    def lacks_alpha(self) -> bool:
        """Whether some low-rank part comes without alpha, so that its scale is an assumption."""
        return any(adapter.alpha is None and adapter.rank is not None for adapter in self.adapters.values())

    @property
    def ranks(self) -> Counter[int]:
        """Ranks and how many adapters have each."""
        return Counter(adapter.rank for adapter in self.adapters.values() if adapter.rank is not None)

    @property
    def alphas(self) -> Counter[float | None]:
        """Alphas and how many adapters have each; None for adapters that come without."""
        return Counter(adapter.alpha for adapter in self.adapters.values() if adapter.rank is not None)

    @property
    def kinds(self) -> Counter[str]:
        """Kinds of adapter and how many there are of each."""
        return Counter(adapter.kind for adapter in self.adapters.values())

    def with_alpha(self, alpha: float) -> Lora:
        """Gives the same LoRA with this alpha everywhere."""
        return replace(self, adapters={name: adapter.with_alpha(alpha) for name, adapter in self.adapters.items()})


# ---- reading ----

# What stands behind a module's name in a key, and the part of an adapter that it is. LoHa's and LoKr's parts
# name themselves.
_ENDINGS = (
    (r"(?:\.lora_A(?:\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight", "down"),
    (r"(?:\.lora_B(?:\.[^.]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:[._]lora)?\.alpha", "alpha"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.lora_magnitude_vector(?:\.[^.]+)?", "magnitude_vector"),
    (r"\.lora_magnitude_vector\.[^.]+\.weight", "magnitude_vector"),
    (r"\.hada_(?P<hada>[wt][12](?:_[ab])?)(?:\.default)?", "hada"),
    (r"\.lokr_(?P<lokr>w[12](?:_[ab])?|t2)(?:\.default)?", "lokr"),
    (r"\.(?:diff|w_norm)", "diff"),
    (r"\.(?:diff_b|b_norm)", "diff_b"),
)
_KEY = tuple((re.compile(rf"(?P<module>.+?){ending}"), part) for ending, part in _ENDINGS)
_TEXT_PREFIXES = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2.",
                  "text_encoders.", "lycoris_text_")  # fmt: skip


def parse_lora(
    tensors: Mapping[str, torch.Tensor],
    names: UNetNames,
    *,
    metadata: Mapping[str, str] | None = None,
    source: str = "The LoRA",
    ignore_unknown: bool = False,
) -> Lora:
    """Turns a file's tensors into a Lora.

    Args:
        tensors: key → tensor; not changed.
        names: of the UNet that it is for.
        metadata: of the file's header; peft's configuration in there gives alphas.
        source: the file, for messages.
        ignore_unknown: leave out what fits nothing, instead of raising.

    Raises:
        LoraError: nothing fits, something does not and is not to be ignored, tensors contradict each other, or one
            holds NaN or infinity.
    """
    text_keys = tuple(key for key in tensors if key.startswith(_TEXT_PREFIXES))
    groups, formats, unknown = _group_keys(tensors, names, set(text_keys), source)
    adapters: dict[str, Adapter] = {}
    for module, parts in groups.items():
        try:
            built, unused = _build_adapters(module, {part: tensors[key] for part, key in parts.items()})
        except ValueError as error:
            raise LoraError(
                f"{source}: {module.diffusers} ({', '.join(parts.values())}): {error}.{_guess(tensors)}"
            ) from error
        adapters |= built
        unknown += [parts[part] for part in unused]
    _check_use(adapters, unknown, text_keys, tensors, source, ignore_unknown)
    _check_finite(tensors, {key for parts in groups.values() for key in parts.values()} - set(unknown), source)
    found = Lora(
        names=names, adapters=_take_peft_alphas(adapters, metadata or {}, source), metadata=dict(metadata or {}),
        format=formats.most_common(1)[0][0], text_keys=text_keys, unknown_keys=tuple(unknown),
    )  # fmt: skip
    _report(found, source)
    return found


def _group_keys(
    tensors: Mapping[str, torch.Tensor], names: UNetNames, skipped: set[str], source: str
) -> tuple[dict[ModuleNames, dict[str, str]], Counter[str], list[str]]:
    """Sorts keys: module → part → key, how many keys are spelled as in each format, and what fits nothing."""
    groups: dict[ModuleNames, dict[str, str]] = {}
    formats: Counter[str] = Counter()
    unknown = []
    for key in tensors:
        if key in skipped:
            continue
        found = _find_module(key, names)
        if found is None:
            unknown.append(key)
            continue
        module, spelling, part = found
        other = groups.setdefault(module, {}).setdefault(part, key)
        if other != key:
            raise LoraError(
                f"{source} holds {module.diffusers} twice: {other} and {key}. Two LoRAs were put into one file; "
                "take them apart."
            )
        formats[spelling] += 1
    return groups, formats, unknown


def _find_module(key: str, names: UNetNames) -> tuple[ModuleNames, str, str] | None:
    """Reads a key: its module, the format it is spelled in and the part of an adapter; None where it fits nothing."""
    for pattern, part in _KEY:
        match = pattern.fullmatch(key)
        if match and match["module"] in names.by_alias:
            module, spelling = names.by_alias[match["module"]]
            if part in ("hada", "lokr"):
                part = f"{part}_{match[part]}"
            return module, spelling, part
    return None


def _build_adapters(module: ModuleNames, parts: dict[str, torch.Tensor]) -> tuple[dict[str, Adapter], list[str]]:
    """Builds the adapters of one module's weight and bias. Returns them with the parts that were of no use.

    Raises:
        ValueError: parts are missing or do not fit each other or the module.
    """
    unused = dict(parts)
    adapters: dict[str, Adapter] = {}
    if "diff_b" in unused and module.has_bias:
        bias = Difference(diff=unused.pop("diff_b"))
        bias.check_shape(module.shape[:1])
        adapters[f"{module.diffusers}.bias"] = bias
    weight = _build_weight_adapter(module, unused)
    if weight is not None:
        weight.check_shape(module.shape)
        adapters[f"{module.diffusers}.weight"] = weight
    return adapters, list(unused)


def _build_weight_adapter(module: ModuleNames, parts: dict[str, torch.Tensor]) -> Adapter | None:
    """Builds the adapter of a module's weight and takes what it uses out of ``parts``."""
    hada = {part.removeprefix("hada_"): part for part in parts if part.startswith("hada_")}
    lokr = {part.removeprefix("lokr_"): part for part in parts if part.startswith("lokr_")}
    found = {"LoRA": "down" in parts or "up" in parts, "LoHa": hada, "LoKr": lokr, "a difference": "diff" in parts}
    kinds = [kind for kind, is_there in found.items() if is_there]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ValueError(f"it holds several kinds of adapter at once: {', '.join(kinds)}")
    for part, tensor in parts.items():
        if part != "alpha" and not tensor.is_floating_point():
            raise ValueError(f"{part} holds {tensor.dtype}, expected floating-point numbers")
    if "diff" in parts:
        return Difference(diff=parts.pop("diff"))
    common = {"alpha": _take_alpha(parts), "magnitude": _take_magnitude(module, parts)}
    if hada:
        if missing := {"w1_a", "w1_b", "w2_a", "w2_b"} - set(hada):
            raise ValueError(f"it lacks {', '.join(sorted(f'hada_{part}' for part in missing))}")
        return Hadamard(**{name: parts.pop(part) for name, part in hada.items()}, **common)
    if lokr:
        return Kronecker(**{name: parts.pop(part) for name, part in lokr.items()}, **common)
    for part, other in (("down", "up"), ("up", "down")):
        if part not in parts:
            raise ValueError(f"it has lora_{other} without lora_{part}")
    down, up, mid = parts.pop("down"), parts.pop("up"), parts.pop("mid", None)
    return LowRank(**_lay_out(module.shape, down, up, mid), **common)


def _lay_out(
    shape: tuple[int, ...], down: torch.Tensor, up: torch.Tensor, mid: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """Gives LoRA's factors the dimensions of the module: files hold 1 x 1 convolutions for linear layers and more.

    Raises:
        ValueError: a factor is no matrix and no convolution.
    """
    for name, tensor in (("lora_down", down), ("lora_up", up)):
        if tensor.dim() not in (2, 4):
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected a matrix or a convolution")
    if mid is not None and (mid.dim() != 4 or len(shape) != 4):
        raise ValueError(f"lora_mid has the shape {tuple(mid.shape)} on a weight of the shape {shape}")
    if len(shape) == 2:
        return {"down": down.flatten(1), "up": up.flatten(1), "mid": None}
    if down.dim() == 2 and len(shape) == 4:
        kernel = (1, 1) if mid is not None else shape[2:]
        if down.shape[1] != shape[1] * math.prod(kernel):
            raise ValueError(f"lora_down has the shape {tuple(down.shape)} for a weight of the shape {shape}")
        down = down.reshape(down.shape[0], shape[1], *kernel)
    return {"down": down, "up": up.reshape(*up.shape[:2], 1, 1) if up.dim() == 2 else up, "mid": mid}


def _take_alpha(parts: dict[str, torch.Tensor]) -> float | None:
    alpha = parts.pop("alpha", None)
    if alpha is None:
        return None
    if alpha.numel() != 1:
        raise ValueError(f"its alpha has the shape {tuple(alpha.shape)}, expected one number")
    return float(alpha)


def _take_magnitude(module: ModuleNames, parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Takes DoRA's magnitude out, in the shape that an Adapter has: peft's runs over outputs, LyCORIS' over either."""
    ones = (1,) * (len(module.shape) - 1)
    if "magnitude_vector" in parts:
        return parts.pop("magnitude_vector").reshape(-1, *ones)
    magnitude = parts.pop("dora_scale", None)
    if magnitude is None:
        return None
    if magnitude.shape[0] == 1 and magnitude.dim() > 1:
        return magnitude.reshape(1, -1, *ones[1:])
    return magnitude.reshape(-1, *ones)


def _check_use(
    adapters: Mapping[str, Adapter],
    unknown: list[str],
    text_keys: tuple[str, ...],
    tensors: Mapping[str, torch.Tensor],
    source: str,
    ignore_unknown: bool,
) -> None:
    """Raises LoraError where nothing fits, or something does not and shall not be ignored."""
    if not adapters:
        if not tensors:
            raise LoraError(f"{source} holds no tensors. Was it saved before the training began?")
        if len(text_keys) == len(tensors):
            raise LoraError(
                f"{source} is a LoRA for a text encoder ({len(text_keys)} tensors, such as {text_keys[0]}), and this "
                "needs one for the UNet. Kolors' own text encoder has no use for CLIP's."
            )
        raise LoraError(
            f"{source} fits nothing in this UNet: none of its {len(tensors)} tensors ({_show(list(tensors))})."
            f"{_guess(tensors) or ' It is no LoRA in a known format.'}"
        )
    if unknown and not ignore_unknown:
        raise LoraError(
            f"{source}: {len(unknown)} of {len(tensors)} tensors fit nothing in this UNet ({_show(unknown)}); "
            f"{len(adapters)} weights would be changed.{_guess(tensors)} To use what fits, ignore unknown keys."
        )


def _check_finite(tensors: Mapping[str, torch.Tensor], keys: set[str], source: str) -> None:
    broken = [key for key in tensors if key in keys and not torch.isfinite(tensors[key].float()).all()]
    if broken:
        raise LoraError(
            f"{source}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity ({_show(broken)}). The training "
            "had diverged when it was saved; take an earlier checkpoint."
        )


def _report(lora: Lora, source: str) -> None:
    if lora.text_keys:
        logger.warning("%s: %d tensors for text encoders are left out (%s): Kolors has another text encoder.",
                       source, len(lora.text_keys), _show(list(lora.text_keys)))  # fmt: skip
    if lora.unknown_keys:
        logger.warning("%s: %d tensors that fit nothing are ignored (%s).",
                       source, len(lora.unknown_keys), _show(list(lora.unknown_keys)))  # fmt: skip
    if lora.lacks_alpha:
        logger.info("%s stores no alpha: alpha = rank is assumed, a scale of 1.", source)


def _take_peft_alphas(adapters: dict[str, Adapter], metadata: Mapping[str, str], source: str) -> dict[str, Adapter]:
    """Sets the alphas that peft's configuration in the header gives, where the tensors give none."""
    if PEFT_METADATA not in metadata:
        return adapters
    try:
        config = json.loads(metadata[PEFT_METADATA])
        config = {key.removeprefix("unet."): value for key, value in config.items()}
        patterns = {name.removeprefix("^"): float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()}
        default = config.get("lora_alpha", config.get("alpha"))  # the latter for LoHa and LoKr
        default = None if default is None else float(default)
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise LoraError(f"{source}: {PEFT_METADATA} in its header is unreadable ({error}).") from error
    changed = dict(adapters)
    for name, adapter in adapters.items():
        module = name.removesuffix(".weight")
        alpha = next((patterns[key] for key in patterns if f".{module}".endswith(f".{key}")), default)
        if adapter.rank is not None and adapter.alpha is None and alpha is not None:
            # Rank-stabilised LoRA divides by the root of the rank.
            changed[name] = adapter.with_alpha(alpha * math.sqrt(adapter.rank) if config.get("use_rslora") else alpha)
    return changed


def _guess(tensors: Mapping[str, torch.Tensor]) -> str:
    """Says which other model a file seems to be for, as a sentence with a space before it; empty if none is known."""
    if any(re.search(r"double_blocks|single_blocks|single_transformer_blocks", key) for key in tensors):
        return " It seems to be a LoRA for Flux."
    if any(re.search(r"joint_blocks|transformer\.transformer_blocks", key) for key in tensors):
        return " It seems to be a LoRA for Stable Diffusion 3."
    widths = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL or Kolors"}
    for key, tensor in tensors.items():
        if re.search(r"attn2[._](?:processor[._])?to_[kv]\b.*(?:lora_A|down)|attn2[._].*to_[kv]_lora\.down", key):
            model = widths.get(tensor.shape[1] if tensor.dim() > 1 else 0)
            return f" It seems to be a LoRA for {model}." if model else ""
    return ""


def _show(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")


# ---- writing ----


def to_tensors(lora: Lora, file_format: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Gives a Lora's tensors under a format's keys, and the metadata that belongs to them.

    Args:
        lora: what to write.
        file_format: a name of ``WRITABLE``.

    Returns:
        Key → contiguous tensor, and the header: the Lora's own, with rank and alpha.

    Raises:
        LoraError: the format cannot hold one of its adapters; says which can.
    """
    if file_format not in WRITABLE:
        raise LoraError(f"No format is called {file_format!r}. Choose one of: {', '.join(WRITABLE)}.")
    if file_format == DIFFUSERS and len({adapter.magnitude is None for adapter in lora.adapters.values()}) > 1:
        raise LoraError("diffusers files cannot hold DoRA on some modules alone. Write it as kohya, which holds all.")
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in lora.adapters.items():
        module, _, parameter = name.rpartition(".")
        written = _WRITERS[file_format](lora.names.by_diffusers[module], parameter, adapter)
        if written is None:
            raise LoraError(
                f"{file_format} files cannot hold {name}, which is {adapter.kind}. Write it as kohya, which holds all."
            )
        tensors |= written
    metadata = {key: value for key, value in lora.metadata.items() if key != PEFT_METADATA}
    metadata |= _describe(lora)
    if file_format == DIFFUSERS and set(lora.alphas) != {None}:
        metadata[PEFT_METADATA] = json.dumps(_get_peft_config(lora), sort_keys=True)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, metadata


def _to_kohya(module: ModuleNames, parameter: str, adapter: Adapter) -> dict[str, torch.Tensor] | None:
    if isinstance(adapter, Difference):
        return {f"{module.kohya}.{'diff' if parameter == 'weight' else 'diff_b'}": adapter.diff}
    prefix = {LowRank: "lora_", Hadamard: "hada_", Kronecker: "lokr_"}[type(adapter)]
    ending = ".weight" if isinstance(adapter, LowRank) else ""
    written = {
        f"{module.kohya}.{prefix}{part}{ending}": tensor
        for part, tensor in adapter.tensors.items()
        if part != "magnitude"
    }
    if adapter.magnitude is not None:
        written[f"{module.kohya}.dora_scale"] = adapter.magnitude
    return written | _get_alpha(module.kohya, adapter)


def _to_diffusers(module: ModuleNames, parameter: str, adapter: Adapter) -> dict[str, torch.Tensor] | None:
    """diffusers' older spelling: every release of diffusers reads it, and so does ComfyUI, which lacks the newer."""
    if not isinstance(adapter, LowRank) or adapter.mid is not None:
        return None
    if adapter.magnitude is not None and not adapter.has_row_magnitude:
        return None
    joint = "_lora" if module.is_attention else ".lora"
    written = {
        f"unet.{module.processor}{joint}.down.weight": adapter.down,
        f"unet.{module.processor}{joint}.up.weight": adapter.up,
    }
    if adapter.magnitude is not None:
        shape = (-1,) if len(module.shape) == 2 else (1, -1, 1, 1)
        written[f"unet.{module.processor}.lora_magnitude_vector.weight"] = adapter.magnitude.reshape(shape)
    return written


def _to_diffsynth(module: ModuleNames, parameter: str, adapter: Adapter) -> dict[str, torch.Tensor] | None:
    """DiffSynth's keys. Its own files lack alpha; its loader passes over ours."""
    if not isinstance(adapter, LowRank) or adapter.mid is not None or adapter.magnitude is not None:
        return None
    return {
        f"{module.diffsynth}.lora_A.default.weight": adapter.down,
        f"{module.diffsynth}.lora_B.default.weight": adapter.up,
    } | _get_alpha(module.diffsynth, adapter)


def _get_alpha(prefix: str, adapter: Adapter) -> dict[str, torch.Tensor]:
    return {} if adapter.alpha is None else {f"{prefix}.alpha": torch.tensor(adapter.alpha)}


_WRITERS: Mapping[str, Callable[[ModuleNames, str, Adapter], dict[str, torch.Tensor] | None]] = MappingProxyType(
    {DIFFUSERS: _to_diffusers, KOHYA: _to_kohya, DIFFSYNTH: _to_diffsynth}
)


def _describe(lora: Lora) -> dict[str, str]:
    """Gives rank and alpha for the header, in plain words and in kohya's, which model browsers show."""
    described = {}
    for name, kohya_name, values in (
        ("rank", "ss_network_dim", lora.ranks),
        ("alpha", "ss_network_alpha", lora.alphas),
    ):
        if values:
            text = f"{next(iter(values)):g}" if len(values) == 1 and None not in values else "mixed"
            text = "unknown" if set(values) == {None} else text
            described |= {name: text, kohya_name: text}
    return described


def _get_peft_config(lora: Lora) -> dict[str, Any]:
    """Gives peft's configuration under diffusers' prefix: the one place where a diffusers file says alpha."""
    modules = {name.removesuffix(".weight"): adapter for name, adapter in lora.adapters.items()}
    alphas = {name: each.rank if each.alpha is None else each.alpha for name, each in modules.items()}
    rank, alpha = lora.ranks.most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        # Anchored: a bare name would also stand for longer ones that end with it.
        "rank_pattern": {f"^{name}": each.rank for name, each in modules.items() if each.rank != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
        "use_dora": any(each.magnitude is not None for each in modules.values()),
    }
    return {f"unet.{key}": value for key, value in config.items()}
