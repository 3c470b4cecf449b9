"""The full-size text encoder on a machine with little memory: what each precision takes, how long, and how near it is.

    python benchmarks/text_encoder_memory.py FOLDER

Writes ChatGLM3's 12 GB of random float16 weights into FOLDER, in 7 shards with the true names and shapes, loads them
at each precision in a process of its own, encodes, and removes them. Memory is the process's peak of anonymous pages
(RssAnon of /proc/self/status, Linux alone): pages mapped from a file can be dropped at any time, these cannot.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kolors_nodes.kolors.precision import TEXT_PRECISIONS
from kolors_nodes.kolors.storage import get_identity
from kolors_nodes.kolors.text_encoder import (
    Text,
    TextEncoderConfig,
    TokenBatch,
    build_text_encoder,
    find_text_encoder,
    load_text_encoder,
)
from kolors_nodes.kolors.tokenizer import Tokenizer

TOKENIZER = Path(__file__).parents[1] / "demo" / "kolors-shapes" / "tokenizer" / "tokenizer.model"
SHARDS = 7
FORMATS = ("safetensors", "bin")
WHOLE = "fp32"  # what the others are compared with
# Random tokens of as many texts; the first is the prompt that is timed.
LENGTHS = (13, 40, 128)
_PIECE = 2**24  # elements drawn at once


def draw_weights(config: TextEncoderConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Draws every tensor as float16, one at a time.

    Normally distributed with a deviation of 1 / sqrt(inputs), each output's times exp(0.3 n) with a normal n, so that
    rows differ in size as trained ones do; the two layers that add to the residual stream are smaller by
    sqrt(2 · blocks), as GPT-2 begins, or the stream would be what the last blocks say. Norms exp(0.3 n) too.
    """
    state = build_text_encoder(config, device="meta").state_dict()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        weight = torch.empty(tensor.shape, dtype=torch.float16)
        if name.endswith("inv_freq"):
            exponents = torch.arange(0, config.kv_channels // 2, 2) / (config.kv_channels // 2)
            weight.copy_(10000.0**-exponents)
        elif tensor.dim() == 1:
            drawn = 0.3 * torch.randn(tensor.shape, generator=generator)
            weight.copy_(drawn if name.endswith("bias") else drawn.exp())
        else:
            factor = 1.0 if "embedding" in name else 1 / math.sqrt(tensor.shape[1])
            if name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                factor /= math.sqrt(2 * config.num_layers)
            for rows in weight.split(max(1, _PIECE // tensor.shape[1])):
                sizes = (0.3 * torch.randn(len(rows), 1, generator=generator)).exp() * factor
                rows.copy_(torch.randn(rows.shape, generator=generator).mul_(sizes))
        yield name, weight


def write_encoder(folder: Path, form: str, config: TextEncoderConfig) -> None:
    """Writes configuration and shards, holding one shard at a time."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    state = build_text_encoder(config, device="meta").state_dict()
    room = sum(tensor.numel() for tensor in state.values()) / SHARDS
    shard: dict[str, torch.Tensor] = {}
    number, held = 1, 0

    def write() -> None:
        stem = f"{'model' if form == 'safetensors' else 'pytorch_model'}-{number:05}-of-{SHARDS:05}"
        if form == "safetensors":
            save_file(shard, folder / f"{stem}.safetensors")
        else:
            torch.save(shard, folder / f"{stem}.bin")
        shard.clear()

    for name, weight in draw_weights(config):
        shard[name] = weight
        held += weight.numel()
        if held >= number * room and number < SHARDS:
            write()
            number += 1
    write()


class AnonymousMemory:
    """Samples this process's anonymous memory every 5 milliseconds, in a thread; entered and left."""

    def __init__(self) -> None:
        self.peak, self._stopped = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.005):
            self.peak = max(self.peak, get_anonymous_bytes())


def get_anonymous_bytes() -> int:
    """Reads how much memory of this process is backed by no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def draw_batch(config: TextEncoderConfig, lengths: tuple[int, ...]) -> TokenBatch:
    """Draws tokens, the same for every precision."""
    generator = torch.Generator().manual_seed(6)
    ids = [torch.randint(3, config.padded_vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return TokenBatch.from_ids(ids, Tokenizer(TOKENIZER).pad_token_id)


def measure(folder: Path, precision: str, texts: Path) -> dict[str, Any]:
    """Loads and encodes in this process.

    Args:
        folder: the encoder's.
        precision: to load.
        texts: where the encoded texts go.
    """
    torch.set_grad_enabled(False)
    config = TextEncoderConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    batch, longer = draw_batch(config, LENGTHS[:1]), draw_batch(config, LENGTHS)
    before = get_anonymous_bytes()
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        encoder = load_text_encoder(folder, precision=precision)
        loaded = time.perf_counter()
        encoder.encode_texts(batch)
        first = time.perf_counter()
        encoder.encode_texts(batch)
        second = time.perf_counter()
        encoded = encoder.encode_texts(longer)
    ended = time.perf_counter()
    get_identity(find_text_encoder(folder).iterate())
    torch.save([asdict(text) for text in encoded], texts)
    weights = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    return {
        "peak_gb": memory.peak / 1e9, "before_gb": before / 1e9, "weights_gb": weights / 1e9,
        "load_s": loaded - started, "first_s": first - loaded, "again_s": second - first,
        "identity_s": time.perf_counter() - ended,
    }  # fmt: skip


def compare(found: list[Text], expected: list[Text]) -> dict[str, float]:
    """Gives how near rows (prompt_embeds) and pooled are: the least and the mean cosine, and the relative error."""
    result = {}
    for name in ("rows", "pooled"):
        actual, wanted = (torch.cat([getattr(text, name).flatten(0, -2) if name == "rows" else text.pooled[None]
                                     for text in texts]).float() for texts in (found, expected))  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity(actual, wanted)
        result[f"{name}_least_cosine"], result[f"{name}_cosine"] = cosine.min().item(), cosine.mean().item()
        result[f"{name}_error"] = ((actual - wanted).norm() / wanted.norm()).item()
    return result


def compare_bundled(precision: str) -> dict[str, float]:
    """Compares the bundled encoder at a precision with itself in float32, on a hundred prompts."""
    from kolors_nodes.demo.recipe.captions import LANGUAGES, SEEN, get_captions

    folder = TOKENIZER.parents[1] / "text_encoder"
    captions = [caption for each in SEEN[:25] for language in LANGUAGES for caption in get_captions(each, language)[:2]]
    tokenizer = Tokenizer(TOKENIZER)
    batch = TokenBatch.from_ids([tokenizer.encode(caption) for caption in captions], tokenizer.pad_token_id)
    found, expected = (load_text_encoder(folder, precision=name).encode_texts(batch) for name in (precision, WHOLE))
    return compare(found, expected)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes, measures in processes of their own, compares and removes."""
    rows = []
    config = TextEncoderConfig(num_layers=options.layers)
    for form in options.format:
        folder = options.folder / form
        if not folder.is_dir():
            started = time.perf_counter()
            write_encoder(folder, form, config)
            print(f"wrote {folder} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for precision in options.precision:
            texts = options.folder / f"{precision}.pt"
            command = [sys.executable, __file__, str(folder), "--child", precision, str(texts)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = {"format": form, "precision": precision, **json.loads(output)}
            whole = options.folder / f"{WHOLE}.pt"
            if whole.is_file() and precision != WHOLE:
                row |= compare(*([Text(**text) for text in torch.load(path)] for path in (texts, whole)))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
        if not options.keep:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Prints memory and times, and what quantising changes."""
    print("| file | precision | peak anonymous memory | weights | load | first prompt | again |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| {format} | {precision} | {peak_gb:.2f} GB | {weights_gb:.2f} GB | {load_s:.1f} s | {first_s:.1f} s | "
              "{again_s:.1f} s |".format(**row))  # fmt: skip
    print("\n| encoder | precision | cosine of prompt_embeds: mean, least | relative error | pooled: cosine, error |")
    print("|---|---|---|---|---|")
    found = [("full size, random", row["precision"], row) for row in rows if "rows_error" in row]
    found += [("bundled", precision, compare_bundled(precision)) for precision in ("quant8", "quant4")]
    for name, precision, row in found:
        print(f"| {name} | {precision} | {row['rows_cosine']:.5f}, {row['rows_least_cosine']:.5f} | "
              f"{row['rows_error']:.4f} | {row['pooled_cosine']:.5f}, {row['pooled_error']:.4f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for 12 GB of weights at a time, and a little more")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--precision", nargs="*", choices=TEXT_PRECISIONS, default=(WHOLE, "fp16", "quant8", "quant4"))
    parser.add_argument("--layers", type=int, default=28, help="blocks; fewer than 28 to try the script")
    parser.add_argument("--keep", action="store_true", help="leave the weights for the next run")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        precision, texts = options.child
        print(json.dumps(measure(options.folder, precision, Path(texts))))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    print_tables(run(options))


if __name__ == "__main__":
    with torch.no_grad():
        main()
