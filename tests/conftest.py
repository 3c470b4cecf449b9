"""Fixtures for all tests: where the reference data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network; those of downloads reach a server on this machine


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of published facts about the real checkpoint."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("KOLORS_REFERENCE", root.parent / "shared" / "reference"))
    if not folder.is_dir():
        pytest.skip("no reference data: set KOLORS_REFERENCE to the folder with Kolors' published configurations")
    return folder


@pytest.fixture(scope="session")
def offloading() -> None:
    """For tests that offload on the CPU: diffusers' older releases look for a graphics card before they do."""
    import torch
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    try:
        apply_group_offloading(torch.nn.Sequential(torch.nn.Linear(1, 1)), cpu, cpu, "leaf_level")
    except AttributeError:
        pytest.skip("this diffusers offloads only on a machine with a graphics card: pip install -U diffusers")
