"""Which sample a step sees, and with which noise: pure functions of the seed and the sample's number.

Nothing here has a state, so a resumed run sees what an uninterrupted one would, and several processes see the parts
of one global batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .latents import Sample


def get_seed(*parts: object) -> int:
    """Gives a 63-bit seed for a purpose, such as ``get_seed(seed, "noise", 7)``."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def shuffle(count: int, *parts: object) -> list[int]:
    """Gives 0 to count - 1 in an order that the parts decide."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(get_seed(*parts))).tolist()


@dataclass(frozen=True)
class Group:
    """Samples of one size: only these can be in a batch together.

    Attributes:
        learned: indices of the samples to learn.
        kept: indices of the regularisation samples.
    """

    learned: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of all batches.

    Attributes:
        groups: samples by size, none without samples to learn.
        seed: decides everything.
        batch_size: of a global batch: all processes together.
        regularization_share: share of regularisation samples in the batches of a group that has some.
    """

    groups: tuple[Group, ...]
    seed: int
    batch_size: int
    regularization_share: float

    def get_batch(self, number: int) -> list[int]:
        """Gives the indices of the samples in a global batch, numbered from 0.

        A round has one entry for each batch that a group fills; rounds are shuffled. Within a group samples go round
        in shuffled order, each once before any comes again, whatever the batches' borders.
        """
        turns = _get_turns(self)
        round_number, place = divmod(number, len(turns))
        shuffled = _shuffle_turns(self, round_number)
        group = shuffled[place]
        earlier = round_number * turns.count(group) + shuffled[:place].count(group)
        return [self._get_index(group, earlier * self.batch_size + i) for i in range(self.batch_size)]

    def _get_index(self, number: int, slot: int) -> int:
        """Gives the sample in a slot of a group's endless row."""
        group = self.groups[number]
        share = self.regularization_share if group.kept else 0.0
        kept_before, kept_after = math.floor(slot * share), math.floor((slot + 1) * share)
        if kept_after > kept_before:
            return _pick(group.kept, kept_before, (self.seed, "kept", number))
        return _pick(group.learned, slot - kept_before, (self.seed, "learned", number))


@lru_cache(maxsize=8)
def _get_turns(order: Order) -> tuple[int, ...]:
    return tuple(
        index
        for index, group in enumerate(order.groups)
        for _ in range(math.ceil(len(group.learned) / order.batch_size))
    )


@lru_cache(maxsize=8)
def _shuffle_turns(order: Order, round_number: int) -> tuple[int, ...]:
    turns = _get_turns(order)
    return tuple(turns[index] for index in shuffle(len(turns), order.seed, "round", round_number))


@lru_cache(maxsize=64)
def _shuffle_cached(count: int, *parts: object) -> list[int]:
    return shuffle(count, *parts)


def _pick(indices: Sequence[int], number: int, parts: tuple) -> int:
    round_number, place = divmod(number, len(indices))
    return indices[_shuffle_cached(len(indices), *parts, round_number)[place]]


def build_order(samples: Sequence[Sample], *, seed: int, batch_size: int, regularization_share: float) -> Order:
    """Groups samples by size. Regularisation samples of a size that nothing is learned at are not used."""
    learned: dict[tuple[int, ...], list[int]] = {}
    kept: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        found = kept if sample.is_regularization else learned
        found.setdefault(tuple(sample.latents.shape[2:]), []).append(index)
    groups = tuple(Group(tuple(learned[size]), tuple(kept.get(size, ()))) for size in sorted(learned))
    return Order(groups=groups, seed=seed, batch_size=batch_size, regularization_share=regularization_share)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """What chance decides for one sample.

    Attributes:
        timestep: 0 to ``num_timesteps`` - 1.
        view: index of the view.
        has_caption: whether it keeps its caption.
        noise: (C, h, w) float32, normal.
        offset: (C, 1, 1) float32, normal: for the noise offset.
    """

    timestep: int
    view: int
    has_caption: bool
    noise: torch.Tensor
    offset: torch.Tensor


def draw_sample(sample: Sample, *, seed: int, number: int, num_timesteps: int, caption_dropout: float) -> Draw:
    """Draws for the sample with this number in the whole run, on the CPU, in a fixed order."""
    generator = torch.Generator().manual_seed(get_seed(seed, "sample", number))
    _, *shape = sample.latents.shape
    timestep = int(torch.randint(num_timesteps, (), generator=generator))
    view = int(torch.randint(len(sample.latents), (), generator=generator))
    has_caption = float(torch.rand((), generator=generator)) >= caption_dropout
    offset = torch.randn((shape[0], 1, 1), generator=generator)
    noise = torch.randn(shape, generator=generator)
    return Draw(timestep=timestep, view=view, has_caption=has_caption, noise=noise, offset=offset)
