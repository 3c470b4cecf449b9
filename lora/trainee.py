"""The UNet in training: a copy of the base's structure with adapters in it; the base itself never changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..kolors.compact import expand_
from .adapters import LowRank
from .apply import share_parameters
from .formats import Lora
from .linear import replace_layers_
from .names import UNetNames
from .options import PRECISIONS, TrainingError, TrainingOptions
from .order import get_seed

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_QUANTISED = ("4bit", "8bit")
_PLAIN_ATTENTION_CELLS = 1024


def get_precision(options: TrainingOptions, device: torch.device) -> str:
    """Gives the precision of a run: CPUs compute fp16 slower than float32, so 16-mixed becomes 32 there."""
    return "32" if device.type == "cpu" and options.precision == "16-mixed" else options.precision


def get_base_precision(options: TrainingOptions, device: torch.device) -> str:
    """Gives the precision in which the frozen UNet is held."""
    precision = options.base_precision or PRECISIONS[get_precision(options, device)]
    return "fp32" if device.type == "cpu" and precision == "fp16" else precision


def build_trainee(
    unet: UNet2DConditionModel, options: TrainingOptions, device: torch.device
) -> tuple[UNet2DConditionModel, dict[str, nn.Parameter]]:
    """Gives a UNet with adapters, and the adapters' parameters by name.

    Parameters that need neither another device nor another precision are the base's own.

    Raises:
        TrainingError: no module fits ``target_modules``, or bitsandbytes is needed and missing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    base_precision = get_base_precision(options, device)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(base_precision, torch.float16)
    if device.type == "cpu" and dtype == torch.float16:
        dtype = torch.float32
    trainee = expand_(share_parameters(unet), dtype).requires_grad_(False)
    if base_precision in _QUANTISED:
        replace_linears_(trainee, base_precision, get_compute_dtype(options, device))
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout,
        target_modules=list(options.target_modules),
        init_lora_weights="gaussian" if options.init_lora_weights == "gaussian" else True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(get_seed(options.seed, "adapters"))
        try:
            inject_adapter_in_model(config, trainee)
        except ValueError as error:
            raise TrainingError(f"target_modules is {', '.join(options.target_modules)}: {error}") from error
    for module in list(trainee.modules()):
        _place_(module, device, dtype)
    replace_layers_(trainee)
    if options.gradient_checkpointing:
        trainee.enable_gradient_checkpointing()
    return trainee.train(), list_trained(trainee)


def list_trained(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Gives the parameters that are trained, in the order of their names, which is the optimizer's."""
    return dict(sorted((name, value) for name, value in unet.named_parameters() if value.requires_grad))


def get_compute_dtype(options: TrainingOptions, device: torch.device) -> torch.dtype:
    """Gives the dtype of the arithmetic in a pass."""
    precision = get_precision(options, device)
    return {"16-mixed": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[precision]


def _place_(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a module's own parameters; frozen ones get ``dtype``, those in training float32."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if type(parameter) is not nn.Parameter:  # bitsandbytes' own, quantised as it moves
            module.to(device)
            return
        moved = parameter.detach().to(device, torch.float32 if parameter.requires_grad else dtype)
        if moved.is_inference():  # made in inference mode by an earlier node; autograd could not use it
            moved = moved.clone()
        if moved.data_ptr() != parameter.data_ptr() or moved.device != parameter.device or parameter.is_inference():
            setattr(module, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))


def replace_linears_(unet: nn.Module, base_precision: str, dtype: torch.dtype) -> None:
    """Puts bitsandbytes' layers in place of the linear ones of all attention blocks.

    Raises:
        TrainingError: bitsandbytes is missing.
    """
    bnb = import_bitsandbytes(f"base precision {base_precision}")
    for name, module in list(unet.named_modules()):
        if not isinstance(module, nn.Linear) or "attentions" not in name:
            continue
        size = (module.in_features, module.out_features, module.bias is not None)
        weight = module.weight.detach()
        if base_precision == "4bit":
            layer = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        parent, _, attribute = name.rpartition(".")
        setattr(unet.get_submodule(parent), attribute, layer)


def import_bitsandbytes(purpose: str) -> Any:
    """Imports bitsandbytes.

    Raises:
        TrainingError: it is not there; says what to install.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise TrainingError(f"{purpose} needs bitsandbytes. Install it: pip install bitsandbytes") from error
    return bitsandbytes


def set_attention_(unet: UNet2DConditionModel, device: torch.device, cells: int) -> None:
    """Chooses plain attention on CPUs for small pictures: its backward pass is faster there than the fused one's.

    Args:
        unet: gets the processors.
        device: where it runs.
        cells: latent cells of the largest picture; the plain one's memory grows with their square.
    """
    if device.type == "cpu" and cells <= _PLAIN_ATTENTION_CELLS:
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())


def get_lora(
    parameters: Mapping[str, torch.Tensor], names: UNetNames, alpha: float, metadata: Mapping[str, str]
) -> Lora:
    """Gives what was trained so far as a Lora, in float32 copies on the CPU."""
    adapters = {}
    for name, down in parameters.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            up = parameters[name.replace(".lora_A.", ".lora_B.")]
            copies = {"down": down, "up": up}
            copies = {part: tensor.detach().float().cpu().clone() for part, tensor in copies.items()}
            adapters[f"{module}.weight"] = LowRank(alpha=alpha, **copies)
    return Lora(names=names, adapters=adapters, metadata=dict(metadata))
