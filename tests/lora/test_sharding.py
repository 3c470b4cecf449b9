"""FSDP with two processes on a CPU. accelerate sets it up for accelerators alone, so the test's subclass insists."""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import replace

import pytest
import torch

from kolors_nodes.lora.options import TrainingError
from kolors_nodes.lora.sharding import set_sharding_
from kolors_nodes.lora.training import Watcher, get_place, train

from .test_training import SHORT, make_data

ONE = replace(SHORT, train_batch_size=2, max_train_steps=4, checkpoint_every=2, dropout=0.0, max_grad_norm=0.05)
TWO = replace(ONE, train_batch_size=1)


def train_spread(rank: int, port: int, unet, folder, options, resume: str, stop: int) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    import accelerate
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.tensor import DTensor

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        transformer_cls_names_to_wrap=["BasicTransformerBlock", "ResnetBlock2D"],
    )  # fmt: skip

    accelerate.state.AcceleratorState._reset_state(True)  # forked along

    class Accelerator(accelerate.Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.state._shared_state["distributed_type"] = DistributedType.FSDP
            self.state._shared_state["fsdp_plugin"] = plugin

    accelerate.Accelerator = Accelerator

    def check(report) -> None:
        assert any(isinstance(each, DTensor) for each in gc.get_objects())  # else nothing was spread

    watcher = Watcher(on_step=check, should_stop=(lambda: True) if stop else None)
    train(unet, make_data(), options, place=get_place(folder, "x"), device="cpu", watcher=watcher, resume=resume)


def run_two(unet, folder, options, resume: str = "no", stop: int = 0) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        train_spread, (port, unet, folder, options, resume, stop), nprocs=2, start_method="fork"
    )


def read_losses(folder) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in (folder / "x-training" / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")
def test_fsdp_learns_what_one_process_learns_and_goes_on(unet, tmp_path):
    whole = train(unet, make_data(), ONE, place=get_place(tmp_path / "one", "x"), device="cpu")
    run_two(unet, tmp_path / "two", TWO, stop=1)
    assert len(read_losses(tmp_path / "two")) == 1
    run_two(unet, tmp_path / "two", TWO, resume="yes")
    # the sums over the batch are made in another order
    assert read_losses(tmp_path / "two") == pytest.approx(whole.losses, rel=1e-5)
    # a single process takes the checkpoint over, and there is nothing left to do
    again = train(unet, make_data(), ONE, place=get_place(tmp_path / "two", "x"), device="cpu", resume="yes")
    assert again.step == 4
    for name, adapter in whole.lora.adapters.items():
        # AdamW divides by the gradients' size, and so blows up the rounding of the smallest
        torch.testing.assert_close(again.lora.adapters[name].down, adapter.down, rtol=1e-3, atol=1e-4)


class FakeAccelerator:
    """What ``set_sharding_`` reads of accelerate's."""

    def __init__(self, kind: str, **plugin):
        from types import SimpleNamespace

        self.distributed_type = SimpleNamespace(value=kind)
        found = SimpleNamespace(mixed_precision_policy=None, **plugin)
        self.state = SimpleNamespace(fsdp_plugin=found)


def test_what_does_not_work_is_told():
    with pytest.raises(TrainingError, match="fsdp_version: 2"):
        set_sharding_(FakeAccelerator("FSDP", fsdp_version=1), SHORT)
    for change in ({"optimizer": "prodigy"}, {"base_precision": "4bit", "precision": "bf16"}):
        with pytest.raises(TrainingError, match="expected adamw and no 4bit"):
            set_sharding_(FakeAccelerator("FSDP", fsdp_version=2), replace(SHORT, **change))
    with pytest.raises(TrainingError, match="DeepSpeed, under which training is not tested"):
        set_sharding_(FakeAccelerator("DEEPSPEED"), SHORT)
