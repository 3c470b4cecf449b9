"""Training whose state is spread over processes: FSDP, as accelerate's own configuration sets it up.

Every process holds a part of the UNet and of the optimizer's state. Checkpoints stay whole, gathered into the form that
a single process writes, so that a run can go on with or without it.
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


def is_sharded(accelerator: Accelerator) -> bool:
    """Tells whether accelerate is set to FSDP."""
    return accelerator.distributed_type.value == "FSDP"


def set_sharding_(accelerator: Accelerator, options: TrainingOptions) -> None:
    """Checks accelerate's configuration, and fits it to adapters on a frozen base.

    Raises:
        TrainingError: DeepSpeed, FSDP in its first version, or an option that needs the whole state in each process.
    """
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise TrainingError(
            "accelerate is set to DeepSpeed, under which training is not tested here. A LoRA's state is small: launch "
            "with --multi_gpu, or with --use_fsdp --fsdp_version 2 to spread the UNet over the GPUs."
        )
    if not is_sharded(accelerator):
        return
    if options.optimizer != "adamw" or options.base_precision in ("4bit", "8bit"):
        raise TrainingError(
            f"Under FSDP the optimizer is {options.optimizer} and the base precision "
            f"{options.base_precision or 'as the precision'}, expected adamw and no 4bit or 8bit. Choose these, or "
            "launch with --multi_gpu: every process then holds the base whole."
        )
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
