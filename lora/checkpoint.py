"""Training's state on disk: one file for each checkpoint, whole or absent, without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kolors.storage import read_tensors, write_tensors
from .options import TrainingError

KEPT = 2  # checkpoints that stay; an older one is there should the newest be damaged
_PREFIX, _SUFFIX = "step-", ".safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped; all else is a function of seed and step.

    Attributes:
        step: steps that are done.
        total: steps of the run.
        weights: the adapters' parameters, by name.
        optimizer: its ``state_dict``.
        scaler: the gradient scaler's ``state_dict``; empty where there is none.
        smoothed_loss: the running mean.
        settings: what must be the same when the run goes on, as plain values.
    """

    step: int
    total: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, float]
    smoothed_loss: float
    settings: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and removes older ones; at every moment a whole one is there."""
    tensors = {f"weights.{name}": tensor for name, tensor in checkpoint.weights.items()}
    plain = _split(dict(checkpoint.optimizer), "optimizer", tensors)
    facts = {
        "step": checkpoint.step, "total": checkpoint.total, "smoothed_loss": checkpoint.smoothed_loss,
        "scaler": dict(checkpoint.scaler), "settings": dict(checkpoint.settings), "optimizer": plain,
    }  # fmt: skip
    path = folder / f"{_PREFIX}{checkpoint.step:08}{_SUFFIX}"
    write_tensors(path, tensors, {"kolors_training": json.dumps(facts, sort_keys=True)})
    for old in _list_files(folder)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Loads the newest whole checkpoint of a folder, passing over damaged ones; None where there is none."""
    for path in _list_files(folder):
        found = read_tensors(path)
        if found and "kolors_training" in found[1]:
            tensors, facts = found[0], json.loads(found[1]["kolors_training"])
            weights = {
                name.removeprefix("weights."): tensor for name, tensor in tensors.items() if name.startswith("weights.")
            }
            facts["optimizer"] = _join(facts["optimizer"], tensors)
            facts["optimizer"]["state"] = {int(key): value for key, value in facts["optimizer"]["state"].items()}
            return Checkpoint(weights=weights, **facts)
    return None


def remove_checkpoints(folder: Path) -> None:
    """Removes all checkpoints, for a run that starts anew."""
    for path in _list_files(folder):
        path.unlink(missing_ok=True)


def check_settings(checkpoint: Checkpoint, settings: Mapping[str, Any], folder: Path) -> None:
    """Checks that a checkpoint is of a run with the same settings; the UNet's is left out where it is not known yet.

    Raises:
        TrainingError: something differs; says what.
    """
    plain = json.loads(json.dumps(settings))
    differing = [
        f"{name} was {checkpoint.settings.get(name)!r}, now {plain.get(name)!r}"
        for name in sorted({*checkpoint.settings, *plain} - ({"unet"} - plain.keys()))
        if checkpoint.settings.get(name) != plain.get(name)
    ]
    if differing:
        raise TrainingError(
            f"The run in {folder} stopped at step {checkpoint.step} and cannot go on with other settings: "
            f"{'; '.join(differing)}. Use the old settings, start without resuming, or choose another name."
        )


def _list_files(folder: Path) -> list[Path]:
    """Lists checkpoints, the newest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"), reverse=True)


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Moves the tensors in nested dicts and lists into a flat table, leaving their names."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {str(key): _split(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value
