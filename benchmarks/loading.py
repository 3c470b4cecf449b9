"""Loading weights against diffusers' from_pretrained, from a disk cache that holds the file and from one that does not.

A mapped file costs nothing until it is read, so both sides read one number of every page of what they loaded. What a
row can reach at most is the time to read the same file from start to end.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from pairs import Case, Outputs, Pair
from text_encoding import QUARTER, VOCABULARY, build_peer
from torch import nn
from trial_models import MID_SIZE_UNET, build_random_unet

from kolors_nodes.kolors.text_encoder import load_text_encoder
from kolors_nodes.kolors.unet import load_unet

PAGE = 2048  # numbers in half precision; what is wider is in memory already
# A quarter of the mid-size model's channels is enough to see what loading costs.
SMALL_UNET = {**MID_SIZE_UNET, "block_out_channels": (64, 128, 256), "cross_attention_dim": 1024}


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows."""
    config = SMALL_UNET if quick else MID_SIZE_UNET
    layers = 4 if quick else 28
    cases = [
        Case(
            name=f"load {part} {state}",
            build=lambda part=part, state=state: build_pair(part, config, layers, cold=state == "from disk"),
            pairs=3 if quick else 5,
        )
        for part in ("unet", "text encoder")
        for state in ("from disk", "cached")
    ]
    return cases[:2] if quick else cases


@cache
def get_folder() -> tempfile.TemporaryDirectory:
    """Makes the folder for the files, which goes with the process."""
    return tempfile.TemporaryDirectory()


def build_pair(part: str, config: dict, layers: int, *, cold: bool) -> Pair:
    """Pairs loading a half-precision file as it is, as for a graphics card."""
    folder = Path(get_folder().name) / part.replace(" ", "_")
    if not folder.exists():
        write_unet(folder, config) if part == "unet" else write_text_encoder(folder, layers)
    files = sorted(folder.glob("*.safetensors"))
    ours, peer = get_unet_loaders(folder) if part == "unet" else get_text_encoder_loaders(folder)

    def forget() -> None:
        gc.collect()
        if cold:
            evict(files)

    size = sum(file.stat().st_size for file in files)
    return Pair(
        ours=lambda: read_pages(ours()),
        peer=lambda: read_pages(peer()),
        peer_name="diffusers from_pretrained",
        tolerance=0.0,
        least_seconds=min(read_files(files, forget) for _ in range(3)),  # a disk has its moods
        before=forget,
        note=f"float16, {size / 2**20:.0f} MiB",
    )


def write_unet(folder: Path, config: dict) -> None:
    """Writes a random UNet in half precision."""
    build_random_unet(config, dtype=torch.float16).save_pretrained(folder, variant="fp16")


def write_text_encoder(folder: Path, layers: int) -> None:
    """Writes a random text encoder in half precision."""
    sizes = {**QUARTER, "num_layers": layers, "padded_vocab_size": VOCABULARY}
    build_peer(sizes).half().save_pretrained(folder)


def get_unet_loaders(folder: Path) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """Gives our loader and diffusers'."""
    from diffusers import UNet2DConditionModel

    return (
        lambda: load_unet(folder, precision="fp16", device="cuda", on_progress=do_nothing),  # stays on the CPU
        lambda: UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16, variant="fp16"),
    )


def get_text_encoder_loaders(folder: Path) -> tuple[Callable[[], nn.Module], Callable[[], nn.Module]]:
    """Gives our loader and diffusers'."""
    from diffusers.pipelines.kolors import ChatGLMModel

    return (
        lambda: load_text_encoder(folder, precision="fp16", on_progress=do_nothing),
        lambda: ChatGLMModel.from_pretrained(folder, torch_dtype=torch.float16),
    )


def do_nothing(done: int, total: int, text: str) -> None:
    """Stands in for a progress bar."""


def read_pages(module: nn.Module) -> Outputs:
    """Reads one number of every page of every weight, in the order of the names."""
    weights = dict(module.named_parameters())
    weights.pop("output_layer.weight", None)  # the language model's head, which nothing here reads
    return [weights[name].detach().flatten()[::PAGE].clone() for name in sorted(weights)]


def evict(files: list[Path]) -> None:
    """Drops files from the system's cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(files: list[Path], before: Callable[[], None]) -> float:
    """Gives the seconds to read files from start to end, after what brings the cache into its state."""
    buffer = bytearray(2**24)
    before()
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - started
