"""Running a module whose weights stay in main memory: layer by layer they visit the device that computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

# What stays off the device while the UNet runs. A widget's choices, in its order.
OFFLOADS = ("none", "blocks")

_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def is_streamed(device: torch.device | str, offload: str) -> bool:
    """Tells whether weights visit the device layer by layer. On the CPU they are at home whatever is chosen.

    Raises:
        ValueError: no offload has this name.
    """
    import torch

    if offload not in OFFLOADS:
        raise ValueError(f"No offload is called {offload!r}. Choose one of: {', '.join(OFFLOADS)}.")
    return offload == "blocks" and torch.device(device).type != "cpu"


@contextmanager
def place(module: nn.Module, device: torch.device | str, offload: str = "none") -> Iterator[None]:
    """Gives a context in which a module computes on a device; afterwards its weights are on the CPU.

    Raises:
        ValueError: no offload has this name.
        ImportError: as ``stream_weights``.
    """
    if is_streamed(device, offload):
        with stream_weights(module, device):
            yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


@contextmanager
def stream_weights(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Gives a context in which a module computes on a device, and its weights lie on the CPU.

    This is diffusers' group offloading, each layer a group: the largest has 59 MB in float16, so that any card has
    room for it. On CUDA the next layer is copied while one computes, from page-locked memory: the first run copies the
    weights there, and there they stay. Nothing of it is left on the module afterwards, so that it can be copied,
    changed and moved like any other.

    Args:
        module: on the CPU or on the device; afterwards on the CPU.
        device: where its layers compute.

    Raises:
        ImportError: diffusers is older than 0.33.
    """
    import torch

    try:
        from diffusers.hooks import HookRegistry, apply_group_offloading
    except ImportError as error:
        raise ImportError(
            "The offload 'blocks' needs diffusers 0.33 or newer. Update it (pip install -U diffusers), or choose the "
            "offload 'none'."
        ) from error
    device = torch.device(device)
    module.to("cpu")
    streams = {"use_stream": True, "record_stream": True} if device.type == "cuda" else {}
    try:
        apply_group_offloading(module, device, torch.device("cpu"), "leaf_level", **streams)
        yield
    finally:
        for part in module.modules():
            if isinstance(registry := getattr(part, "_diffusers_hook", None), HookRegistry):
                for hook in _HOOKS:
                    registry.remove_hook(hook, recurse=False)
                # What is left is a bound method and an empty registry, which a copy of the module would share.
                del part._diffusers_hook
                part.__dict__.pop("forward", None)
        module.to("cpu")


def get_device_bytes(module: nn.Module, offload: str) -> int:
    """Gives the bytes of weights that lie on the device at once: all, or the two largest layers.

    Args:
        module: of any size; on the meta device too.
        offload: one of ``OFFLOADS``.
    """
    sizes = [sum(parameter.nbytes for parameter in part.parameters(recurse=False)) for part in module.modules()]
    return sum(sizes) if offload == "none" else sum(sorted(sizes)[-2:])
