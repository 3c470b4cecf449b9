"""The benchmarks' modules, importable as they are for the scripts of their folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
