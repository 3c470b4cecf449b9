"""Fixtures for the tests of the runner."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kolors_nodes.headless import Runner

STUB_PACK = Path(__file__).with_name("stub_nodes.py")


@pytest.fixture(scope="session")
def stub_pack() -> ModuleType:
    """The stub pack as a module."""
    spec = importlib.util.spec_from_file_location("kolors_stub_nodes", STUB_PACK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stubs(stub_pack) -> dict[str, type]:
    """The classes of the stub pack, its record of calls empty."""
    stub_pack.CALLS.clear()
    stub_pack.Changing.MARK = 1
    return stub_pack.NODE_CLASS_MAPPINGS


@pytest.fixture
def calls(stub_pack) -> list:
    """What the stub nodes were called with."""
    return stub_pack.CALLS


@pytest.fixture
def runner(stubs, tmp_path) -> Runner:
    """A runner over the stub pack, its folders under the test's own."""
    return Runner(stubs, models_dir=tmp_path / "models", input_dir=tmp_path / "input", output_dir=tmp_path / "output")
