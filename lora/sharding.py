"""Training whose state is spread over processes: FSDP and DeepSpeed, as accelerate's own configuration sets them up.

Every process holds a part of the UNet and of the optimizer's state. Checkpoints stay whole under FSDP, gathered into
the form that a single process writes, so that a run can go on with or without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .options import TrainingError, TrainingOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

FSDP, DEEPSPEED = "FSDP", "DEEPSPEED"


def get_sharding(accelerator: Accelerator) -> str:
    """Gives ``FSDP``, ``DEEPSPEED``, or nothing where every process holds everything."""
    kind = accelerator.distributed_type.value
    return kind if kind in (FSDP, DEEPSPEED) else ""


def set_sharding_(accelerator: Accelerator, options: TrainingOptions, resume: str) -> None:
    """Checks accelerate's configuration and fills in what the options decide.

    Args:
        accelerator: whose configuration.
        options: of the run.
        resume: as in ``train``.

    Raises:
        TrainingError: FSDP in its first version, an option that needs the whole state in each process, or a run under
            DeepSpeed that is to go on.
    """
    kind = get_sharding(accelerator)
    if not kind:
        return
    if kind == DEEPSPEED and resume == "yes":
        raise TrainingError(
            "A run under DeepSpeed cannot go on where it stopped: DeepSpeed's parts of the optimizer's state are not "
            "kept. Start without --resume, or launch with --multi_gpu or FSDP version 2, which keep checkpoints."
        )
    if options.optimizer != "adamw" or options.base_precision in ("4bit", "8bit"):
        raise TrainingError(
            f"Under {kind} the optimizer is {options.optimizer} and the base precision "
            f"{options.base_precision or 'as the precision'}, expected adamw and no 4bit or 8bit. Choose these, or "
            "launch with --multi_gpu: every process then holds the base whole."
        )
    if kind == DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = options.train_batch_size
        config["gradient_accumulation_steps"] = options.gradient_accumulation_steps
        config["train_batch_size"] = (
            options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes
        )
        config["gradient_clipping"] = options.max_grad_norm
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise TrainingError(
            "accelerate is set to FSDP version 1, which cannot hold frozen and trained weights of different precision "
            "together. Set fsdp_version: 2 in accelerate's configuration, or launch with --fsdp_version 2."
        )
    if plugin.mixed_precision_policy is not None:
        # Autocast decides, as without FSDP: casting the inputs would round the mask that counts the pads.
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, cast_forward_inputs=False)


def gather(value: Any) -> Any:
    """Gives nested dicts and lists with every spread tensor whole and on the CPU. All processes must call it."""
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [gather(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
    return value


def gather_weights(parameters: Mapping[str, nn.Parameter], sharding: str) -> dict[str, torch.Tensor]:
    """Gives parameters whole, in float32 where DeepSpeed keeps such a copy. All processes must call it."""
    if sharding != DEEPSPEED:
        return gather({name: parameter.detach() for name, parameter in parameters.items()})
    from deepspeed.utils import safe_get_full_fp32_param

    whole = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
    return {name: parameters[name].detach() if found is None else found.cpu() for name, found in whole.items()}


def scatter_optimizer_state(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Spreads a whole optimizer's state as its parameters are spread under FSDP.

    Args:
        state: a ``state_dict``, tensors whole.
        parameters: in the optimizer's order.
    """
    from torch.distributed.tensor import distribute_tensor

    def spread(value: Any, like: nn.Parameter) -> Any:
        if isinstance(value, torch.Tensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value

    moments = {
        index: {key: spread(value, like) for key, value in state["state"].get(index, {}).items()}
        for index, like in enumerate(parameters.values())
    }
    return {**state, "state": {index: found for index, found in moments.items() if found}}
