"""What the machine can do at most, measured in the same run: matrix products and copies."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kolors_nodes.kolors.products import linear


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device's limits.

    Attributes:
        name: of the processor or card, with the number of threads.
        flops: floating-point operations a second in a large matrix product.
        bytes: bytes a second that a large copy reads and writes together.
    """

    name: str
    flops: float
    bytes: float

    def take_best(self, other: Machine) -> Machine:
        """Gives the higher limits of two measurements: what else runs on a machine only lowers them."""
        return Machine(name=self.name, flops=max(self.flops, other.flops), bytes=max(self.bytes, other.bytes))

    def get_least_seconds(self, flops: float, moved_bytes: float) -> float:
        """Gives the least time for so much arithmetic and memory traffic; either hides behind the other."""
        return max(flops / self.flops, moved_bytes / self.bytes)

    def __str__(self) -> str:
        return f"{self.name}: {self.flops / 1e9:.0f} GFLOP/s in matrix products, {self.bytes / 1e9:.1f} GB/s copying"


def measure_machine(device: str = "cpu", *, seconds: float = 1.0) -> Machine:
    """Measures both limits, the best of what fits into so many seconds each.

    Products are float32 on a CPU, torch's way or oneDNN's, and float16 on a card, as the rows there are.
    """
    dtype = torch.float32 if device == "cpu" else torch.float16
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    ways = [lambda: torch.mm(left, right, out=product), lambda: linear(left, right)]
    source = torch.ones(2**26 if device == "cpu" else 2**29, device=device)  # far larger than the caches
    target = torch.empty_like(source)
    return Machine(
        name=get_name(device),
        flops=2 * size**3 / min(get_best_seconds(way, device, seconds / 2) for way in ways),
        bytes=2 * source.nbytes / get_best_seconds(lambda: target.copy_(source), device, seconds),
    )


def get_best_seconds(run, device: str, seconds: float) -> float:
    """Gives the shortest run, of at least three."""
    times: list[float] = []
    run()
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def get_name(device: str) -> str:
    """Names the processor and its threads, or the card."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
