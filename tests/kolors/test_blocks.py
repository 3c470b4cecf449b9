"""Compiled blocks: the same numbers, one translation for all sizes and runs, and plain blocks without a compiler."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kolors_nodes.kolors import blocks, denoiser
from kolors_nodes.kolors.denoiser import Denoiser
from kolors_nodes.kolors.options import SpeedOptions
from kolors_nodes.kolors.sampling import get_conditioning

TIMESTEPS = torch.tensor([900.0, 100.0])


@pytest.fixture
def compiled(monkeypatch):
    """Lets blocks be traced and run as traced, which needs no compiler, and counts the translations."""
    counter = CompileCounter()
    torch._dynamo.reset()
    blocks.compile_blocks.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(denoiser, "can_compile", lambda device_type: True)
    yield counter
    blocks.compile_blocks.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def can_compile(monkeypatch):
    """The check itself, as on a machine that would gain from compiling."""
    blocks.can_compile.cache_clear()
    monkeypatch.setattr(blocks, "has_onednn", lambda: False)
    yield blocks.can_compile
    blocks.can_compile.cache_clear()


@torch.no_grad()
def predict(unet, make_embeds, size, speed):
    conditioning = get_conditioning(make_embeds(1), unet, height=8 * size[0], width=8 * size[1], guided=True)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    run = Denoiser(unet, conditioning, TIMESTEPS, size=size, speed=speed)
    return run.is_compiled, torch.stack([run(latents, index) for index in range(len(TIMESTEPS))])


def test_compiled_blocks_give_the_same_and_serve_all_sizes_and_runs(tiny_unet, make_embeds, compiled):
    counts = []
    for size in ((8, 8), (12, 16), (8, 8), (20, 10), (16, 16)):
        is_compiled, found = predict(tiny_unet, make_embeds, size, SpeedOptions(compile=True))
        counts.append(compiled.frame_count)
        was_compiled, expected = predict(tiny_unet, make_embeds, size, SpeedOptions())
        assert is_compiled and not was_compiled
        # The same operations on tensors in another memory layout: rounding.
        assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    # A square may be translated as such; from the first other one on there is a translation for every size.
    assert 0 < counts[0] <= counts[1] < 2 * counts[0]
    assert counts[1:] == [counts[1]] * 4


@pytest.mark.parametrize(
    "error", [RuntimeError("Cannot find a working triton installation."), ImportError("x"), OSError()]
)
def test_without_a_compiler_the_log_says_so(can_compile, monkeypatch, caplog, error):
    def fail(function):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level(logging.INFO, "kolors_nodes"):
        assert not can_compile("cpu")
        assert not can_compile("cpu")
    (record,) = caplog.records  # once
    assert record.levelno == logging.WARNING and (str(error) or type(error).__name__) in record.getMessage()


def test_on_a_cpu_with_fast_products_nothing_is_compiled(can_compile, monkeypatch, caplog):
    monkeypatch.setattr(blocks, "has_onednn", lambda: True)
    with caplog.at_level(logging.INFO, "kolors_nodes"):
        assert not can_compile("cpu")
    assert "nothing is compiled" in caplog.text
