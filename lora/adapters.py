"""Kinds of adapter: how each turns its small tensors into a change of one weight, in float32."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A change of one weight or bias.

    Attributes:
        alpha: the numerator of alpha / rank; None where the file stores none, which counts as alpha = rank.
        magnitude: DoRA's vector, (out, 1) or (1, in) for a linear weight, with two more 1 for a convolution's: the
            length that each row or column of the changed weight gets. None: no DoRA.

    Raises:
        ValueError: its tensors do not fit each other.
    """

    alpha: float | None = None
    magnitude: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        """What people call it."""
        return f"{self._kind} with DoRA" if self.magnitude is not None else self._kind

    _kind = ""

    @property
    def rank(self) -> int | None:
        """The rank r; None where there is none."""
        return None

    @property
    def scale(self) -> float:
        """The factor alpha / rank; 1 where alpha is unknown."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by field name, those that are there."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def with_alpha(self, alpha: float) -> Adapter:
        """Gives the same adapter with another alpha."""
        return self if self.rank is None else replace(self, alpha=alpha)

    def get_shape(self) -> tuple[int, int]:
        """Gives the shape of the change as a matrix, (out, in times kernel size)."""
        raise NotImplementedError

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Checks that it fits a weight.

        Raises:
            ValueError: it does not; says both shapes.
        """
        size = (shape[0], torch.Size(shape[1:]).numel())
        if self.get_shape() != size:
            raise ValueError(f"it changes a weight of the shape {self.get_shape()}, but this one is {size}")
        if self.magnitude is not None and any(
            side not in (1, expected) for side, expected in zip(self.magnitude.shape, shape, strict=True)
        ):
            raise ValueError(f"its DoRA magnitude is {tuple(self.magnitude.shape)}, but the weight {tuple(shape)}")

    def get_delta(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        """Gives the change before DoRA, times alpha / rank, in float32 and the weight's shape."""
        raise NotImplementedError

    def add_(self, merged: torch.Tensor, base: torch.Tensor, strength: float) -> None:
        """Adds the change, times ``strength``, to ``merged``.

        Args:
            merged: float32, in the weight's shape, contiguous; receives the change.
            base: the weight without any change, for DoRA.
            strength: the user's factor. Under DoRA it goes from the base (0) to what was trained (1) in a straight
                line, so that 0 is the base there too.
        """
        if self.magnitude is None:
            merged.add_(self.get_delta(merged.shape, merged.device), alpha=strength)
            return
        base = base.float()
        magnitude = self.magnitude.to(merged.device, torch.float32)
        changed = self.get_delta(merged.shape, merged.device).add_(base)
        kept = 0 if self.has_row_magnitude else 1
        norm_dims = [dim for dim in range(changed.dim()) if dim != kept]
        norm = torch.linalg.vector_norm(changed, dim=norm_dims, keepdim=True)
        # A row of zeros stays zero instead of becoming NaN.
        changed.mul_(magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny))
        merged.add_(changed.sub_(base), alpha=strength)

    @property
    def has_row_magnitude(self) -> bool:
        """Whether DoRA's magnitude has an entry for each output (as in peft), not for each input."""
        return self.magnitude is not None and self.magnitude.shape[0] != 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Adapter):
    """LoRA, and LoCon, its form for convolutions: up · down.

    Attributes:
        down: (r, in), or of a convolution (r, in, kh, kw); with ``mid`` (r, in, 1, 1).
        up: (out, r) or (out, r, 1, 1).
        mid: (r, r, kh, kw) between the two, or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    mid: torch.Tensor | None = None

    def __post_init__(self) -> None:
        ranks = {"down": self.down.shape[0], "up": self.up.shape[1]}
        if self.mid is not None:
            ranks |= {"mid's first side": self.mid.shape[0], "mid's second side": self.mid.shape[1]}
        if len(set(ranks.values())) > 1:
            raise ValueError("its ranks differ: " + ", ".join(f"{name} has {rank}" for name, rank in ranks.items()))

    @property
    def _kind(self) -> str:
        return "LoRA" if self.down.dim() == 2 else "LoCon"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def get_shape(self) -> tuple[int, int]:
        kernel = 1 if self.mid is None else self.mid.shape[2:].numel()
        return self.up.shape[0], self.down.shape[1:].numel() * kernel

    def get_delta(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        up, down = self.get_factors(device)
        return (up @ down).mul_(self.scale).reshape(shape)

    def add_(self, merged: torch.Tensor, base: torch.Tensor, strength: float) -> None:
        if self.magnitude is not None:
            super().add_(merged, base, strength)
            return
        up, down = self.get_factors(merged.device)
        merged.flatten(1).addmm_(up, down, alpha=self.scale * strength)

    @property
    def is_plain(self) -> bool:
        """Whether the change is up · down and nothing else."""
        return self.mid is None and self.magnitude is None

    def get_factors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives up and down as matrices in float32, (out, r) and (r, in times kernel size), without the scale."""
        up, down = (tensor.to(device, torch.float32).flatten(1) for tensor in (self.up, self.down))
        if self.mid is not None:
            down = torch.einsum("rskl,si->rikl", self.mid.to(device, torch.float32), down).flatten(1)
        return up, down


@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(Adapter):
    """LoHa: the elementwise product of two low-rank matrices.

    Attributes:
        w1_a: (out, r); with ``t1`` (r, out).
        w1_b: (r, in times kernel size); with ``t1`` (r, in).
        w2_a: as ``w1_a``.
        w2_b: as ``w1_b``.
        t1: (r, r, kh, kw) of a convolution in Tucker form, or None.
        t2: likewise.

    Source: Hyeon-Woo et al. 2021 (FedPara); names as in LyCORIS.
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    _kind = "LoHa"

    def __post_init__(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise ValueError("it has one of hada_t1 and hada_t2, expected both or none")
        side = 1 if self.t1 is None else 0
        for a, b, t in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            ranks = {a.shape[side], b.shape[0], *(() if t is None else t.shape[:2])}
            if len(ranks) > 1:
                raise ValueError(f"its ranks differ: {sorted(ranks)}")

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def get_shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return self.w1_a.shape[0], self.w1_b.shape[1]
        return self.w1_a.shape[1], self.w1_b.shape[1] * self.t1.shape[2:].numel()

    def get_delta(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        first = _multiply(self.w1_a, self.w1_b, self.t1, device)
        return first.mul_(_multiply(self.w2_a, self.w2_b, self.t2, device)).mul_(self.scale).reshape(shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Adapter):
    """LoKr: the Kronecker product of two matrices, each whole or the product of two low-rank ones.

    Attributes:
        w1: (out1, in1), or None where w1_a (out1, r) and w1_b (r, in1) stand for it.
        w2: (out2, in2[, kh, kw]), or None where w2_a (out2, r) and w2_b (r, in2 times kernel size) stand for it;
            with ``t2`` w2_a is (r, out2) and w2_b (r, in2).
        t2: (r, r, kh, kw) of a convolution in Tucker form, or None.

    Source: Yeh et al. 2023 (LyCORIS). As there, alpha counts only where something is low-rank.
    """

    w1: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None

    _kind = "LoKr"

    def __post_init__(self) -> None:
        for name, whole, a, b in (("w1", self.w1, self.w1_a, self.w1_b), ("w2", self.w2, self.w2_a, self.w2_b)):
            if (whole is None) == (a is None) or (a is None) != (b is None):
                raise ValueError(f"expected either lokr_{name}, or lokr_{name}_a and lokr_{name}_b")
        if self.t2 is not None and self.w2_a is None:
            raise ValueError("lokr_t2 needs lokr_w2_a and lokr_w2_b")
        if self.w1_a is not None and self.w1_a.shape[1] != self.w1_b.shape[0]:
            raise ValueError(f"its ranks differ: {self.w1_a.shape[1]} and {self.w1_b.shape[0]}")
        if self.w2_a is not None:
            side = 1 if self.t2 is None else 0
            ranks = {self.w2_a.shape[side], self.w2_b.shape[0], *(() if self.t2 is None else self.t2.shape[:2])}
            if len(ranks) > 1:
                raise ValueError(f"its ranks differ: {sorted(ranks)}")

    @property
    def rank(self) -> int | None:
        low_rank = self.w2_b if self.w2_b is not None else self.w1_b
        return None if low_rank is None else low_rank.shape[0]

    def get_shape(self) -> tuple[int, int]:
        rows, columns = self.w1.shape if self.w1 is not None else (self.w1_a.shape[0], self.w1_b.shape[1])
        if self.w2 is not None:
            return rows * self.w2.shape[0], columns * self.w2.shape[1:].numel()
        if self.t2 is None:
            return rows * self.w2_a.shape[0], columns * self.w2_b.shape[1]
        return rows * self.w2_a.shape[1], columns * self.w2_b.shape[1] * self.t2.shape[2:].numel()

    def get_delta(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        w1 = self.w1.to(device, torch.float32) if self.w1 is not None else _multiply(self.w1_a, self.w1_b, None, device)
        if self.w2 is not None:
            w2 = self.w2.to(device, torch.float32)
        else:
            w2 = _multiply(self.w2_a, self.w2_b, self.t2, device)
        kernel = shape[2:]
        w2 = w2.reshape(w2.shape[0], -1, *kernel)  # (out2, in2, kh, kw)
        w1 = w1.reshape(*w1.shape, *(1 for _ in kernel))  # (out1, in1, 1, 1)
        return torch.kron(w1, w2).mul_(self.scale).reshape(shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference(Adapter):
    """The change itself, as trainers store it for norms and biases.

    Attributes:
        diff: in the weight's shape.
    """

    diff: torch.Tensor

    _kind = "difference"

    def get_shape(self) -> tuple[int, int]:
        return self.diff.shape[0], self.diff.shape[1:].numel()

    def get_delta(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        return self.diff.to(device, torch.float32, copy=True).reshape(shape)


def _multiply(
    a: torch.Tensor, b: torch.Tensor, tucker: torch.Tensor | None, device: torch.device | str
) -> torch.Tensor:
    """Gives a · b in float32; in Tucker form (out, in, kh, kw) of a (r, out), b (r, in) and (r, r, kh, kw)."""
    a, b = a.to(device, torch.float32), b.to(device, torch.float32)
    if tucker is None:
        return a @ b
    return torch.einsum("rskl,si,ro->oikl", tucker.to(device, torch.float32), b, a).contiguous()
