"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import copy

import torch


class WeightAverage:
    """Keeps an average of a module's weights; the average is what is evaluated and saved.

    The decay warms up as (1 + step) / (10 + step), so that the initial weights are soon forgotten.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.step = 0

    @torch.no_grad()
    def update_(self, module: torch.nn.Module) -> None:
        """Moves the average towards the module's present weights."""
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        averages, values = list(self.module.parameters()), list(module.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)
