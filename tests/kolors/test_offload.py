"""Weights that visit the device layer by layer. Here the device is the CPU too: the hooks run, nothing moves."""

from __future__ import annotations

import copy

import pytest
import torch

from kolors_nodes.kolors.offload import get_device_bytes, is_streamed, place, stream_weights
from kolors_nodes.kolors.unet import build_unet, compact_
from kolors_nodes.nodes.host import stop_between_blocks

from ..tiny_models import is_plain
from .test_compact import run

hooks = pytest.importorskip("diffusers.hooks.group_offloading", reason="offloading needs diffusers 0.33 or newer")
CPU = torch.device("cpu")


@pytest.fixture(params=["fp32", "fp8", "nf4"])
def unet(request, tiny_unet):
    unet = copy.deepcopy(tiny_unet)
    return unet if request.param == "fp32" else compact_(unet, request.param, torch.float32)


def is_untouched(unet) -> bool:
    """Whether the modules are as they were built: nothing on the instance, no hook."""
    return not any({"forward", "_diffusers_hook"} & vars(module).keys() for module in unet.modules())


@pytest.fixture
def visits(monkeypatch):
    """Notes how many bytes of weights are on the device after each arrival."""
    present, seen = {}, []

    def note(name: str, act) -> None:
        original = getattr(hooks.ModuleGroup, name)

        def noting(self):
            original(self)
            tensors = [tensor for module in self.modules for tensor in module.parameters()] + list(self.parameters)
            act(id(self), sum(tensor.nbytes for tensor in tensors))

        monkeypatch.setattr(hooks.ModuleGroup, name, noting)

    def arrive(group: int, size: int) -> None:
        present[group] = size
        seen.append(sum(present.values()))

    note("onload_", arrive)
    note("offload_", lambda group, size: present.pop(group, None))
    return seen


@pytest.mark.usefixtures("offloading")
def test_the_same_picture_with_one_layer_at_a_time(unet, visits):
    expected = run(unet)
    with torch.inference_mode(), stream_weights(unet, CPU):
        assert not is_plain(unet)
        assert unet.device == CPU and unet.dtype == torch.float32
        assert torch.equal(run(unet), expected) and torch.equal(run(unet), expected)
    assert max(visits) <= get_device_bytes(unet, "blocks") < 0.2 * get_device_bytes(unet, "none")
    assert len(visits) > 200
    assert is_untouched(unet)
    assert torch.equal(run(unet), expected)


@pytest.mark.usefixtures("offloading")
def test_every_weight_belongs_to_a_group(unet):
    """One that does not would stay on the CPU while the rest computes on the card."""
    with stream_weights(unet, CPU):
        found = set()
        for module in unet.modules():
            if hasattr(module, "_diffusers_hook"):
                group = module._diffusers_hook.get_hook("group_offloading").group
                found |= {id(tensor) for part in group.modules for tensor in part.parameters()}
                found |= {id(tensor) for tensor in group.parameters}
    assert found == {id(parameter) for parameter in unet.parameters()}


@pytest.mark.usefixtures("offloading")
def test_an_interruption_within_a_pass_leaves_nothing_behind(unet):
    expected, calls = run(unet), []

    class Stopped(Exception):
        pass

    def stop() -> None:
        calls.append(None)
        if len(calls) == 5:
            raise Stopped

    with pytest.raises(Stopped), stream_weights(unet, CPU), stop_between_blocks(unet, stop):
        run(unet)
    assert len(calls) == 5
    assert is_untouched(unet)
    with stream_weights(unet, CPU):
        assert torch.equal(run(unet), expected)


def test_on_the_cpu_the_choice_changes_nothing(tiny_unet):
    with place(tiny_unet, CPU, "blocks"):
        assert is_plain(tiny_unet)
    assert not is_streamed("cpu", "blocks") and not is_streamed("cuda", "none") and is_streamed("cuda:1", "blocks")
    with pytest.raises(ValueError, match=r"No offload is called 'layers'. Choose one of: none, blocks"):
        is_streamed("cpu", "layers")


@pytest.mark.parametrize(
    ("precision", "whole", "streamed"), [("fp16", 5.16, 0.12), ("fp8", 2.61, 0.06), ("nf4", 1.99, 0.12)]
)
def test_full_size(precision, whole, streamed):
    """Gigabytes of weights on the device. Beside them a pass at 1024x1024 with guidance holds 0.34 in float16."""
    full = build_unet(device="meta").half()
    if precision != "fp16":
        compact_(full, precision, torch.float16)
    assert get_device_bytes(full, "none") / 1e9 == pytest.approx(whole, abs=0.005)
    assert get_device_bytes(full, "blocks") / 1e9 == pytest.approx(streamed, abs=0.005)
