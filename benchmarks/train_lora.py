"""Measures LoRA training: speed and memory against a plain loop, kills in every phase, two processes.

    python benchmarks/train_lora.py speed       # a quarter of the widths, random, 2 minutes; --model mid: half
    python benchmarks/train_lora.py kills       # kills of runs on the bundled model, then compares the files
    python benchmarks/train_lora.py processes   # two processes under accelerate launch against one

The plain loop does what DiffSynth-Studio's training_step does (diffsynth/trainers/text_to_image.py at 22e4ae99): it
encodes the caption, padded to 256 tokens, and the picture in every step, with all three models in memory, peft's layers
and torch's AdamW. Both loops train the same adapters on the same random UNet, in float32, batch 1, and are given the
same pictures, timesteps and noise: their losses are compared, too.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the three models, where they differ from Kolors'."""

    text_encoder: dict
    unet: dict
    vae_widths: tuple[int, ...]


SIZES = {
    # Every part at a quarter of its width, so a sixteenth of its weights: 390 M : 161 M for 6.24 B : 2.58 B.
    "quarter": Sizes(
        text_encoder={"padded_vocab_size": 16256, "hidden_size": 1024, "ffn_hidden_size": 3424,
                      "num_attention_heads": 8},
        unet={"block_out_channels": (80, 160, 320), "attention_head_dim": (1, 2, 5), "norm_num_groups": 16,
              "cross_attention_dim": 512, "encoder_hid_dim": 1024, "addition_time_embed_dim": 64,
              "projection_class_embeddings_input_dim": 6 * 64 + 1024},
        vae_widths=(32, 64, 128, 128),
    ),
    # The mid-size UNet of the sampling rows, half the channels and the true text width; of the text encoder a quarter
    # of the blocks, so that both have about a quarter of Kolors' arithmetic.
    "mid": Sizes(
        text_encoder={"padded_vocab_size": 16256, "num_layers": 7},
        unet={"block_out_channels": (160, 320, 640)},
        vae_widths=(64, 128, 256, 256),
    ),
}  # fmt: skip


# ---- speed ----


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both loops do.

    Attributes:
        model: a name of ``SIZES``.
        side: of the pictures, in pixels.
        steps: that are timed, after the warm-up.
        gradient_checkpointing: in both loops; off in DiffSynth's script unless asked for, as its tutorial does.
    """

    model: str = "quarter"
    side: int = 256
    steps: int = 5
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process measured.

    Attributes:
        step: median seconds of a step.
        parts: median seconds of each part of a step.
        losses: of all steps.
        peak: memory of the process, in MiB.
    """

    step: float
    parts: dict[str, float]
    losses: list[float]
    peak: float


def build_text_encoder(work: Work):
    import torch

    from kolors_nodes.kolors.text_encoder import TextEncoderConfig, build_text_encoder

    torch.manual_seed(1)
    return build_text_encoder(TextEncoderConfig(**SIZES[work.model].text_encoder)).requires_grad_(False)


def build_vae(work: Work):
    import torch
    from diffusers import AutoencoderKL

    from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, VAE

    torch.manual_seed(2)
    autoencoder = AutoencoderKL.from_config({**SDXL_VAE_CONFIG, "block_out_channels": SIZES[work.model].vae_widths})
    return VAE(autoencoder.eval().requires_grad_(False))


def build_unet(work: Work):
    import torch

    from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet

    torch.manual_seed(3)
    sizes = SIZES[work.model].unet
    return build_unet({**KOLORS_UNET_CONFIG, **sizes, "sample_size": work.side // 8}).requires_grad_(False)


def get_options(work: Work):
    from kolors_nodes.lora.options import TrainingOptions

    return TrainingOptions(
        rank=16, alpha=4.0, max_train_steps=WARM_UP + work.steps, precision="32", max_grad_norm=0.0,
        gradient_checkpointing=work.gradient_checkpointing, checkpoint_every=1000,
    )  # fmt: skip


def read_pictures(work: Work):
    from kolors_nodes.lora.dataset import read_dataset
    from kolors_nodes.lora.options import DatasetOptions

    return read_dataset(DEMO / "lora_dataset", DatasetOptions(width=work.side, height=work.side))


def encode(work: Work, folder: Path, load_text_encoder, load_vae):
    from kolors_nodes.kolors.tokenizer import Tokenizer
    from kolors_nodes.lora.latents import Encoders, encode_dataset

    encoders = Encoders(
        tokenizer=Tokenizer(DEMO / "kolors-shapes" / "tokenizer" / "tokenizer.model"), text_identity="random",
        text_precision="float32", load_text_encoder=load_text_encoder, vae_identity="random", load_vae=load_vae,
    )  # fmt: skip
    return encode_dataset(
        read_pictures(work), encoders, other_captions=(), seed=0, cache=folder / "cache", on_progress=lambda *_: None
    )


def run_cache(work: Work, folder: Path) -> Run:
    """Fills the cache."""
    started = time.perf_counter()
    encode(work, folder, lambda: build_text_encoder(work), lambda: build_vae(work).encode)
    return Run(step=time.perf_counter() - started, parts={}, losses=[], peak=get_peak())


def run_ours(work: Work, folder: Path) -> Run:
    """Trains with everything cached."""
    from kolors_nodes.lora.training import Watcher, get_place, train

    data = encode(work, folder, None, None)
    ended: list[float] = []
    watcher = Watcher(on_step=lambda report: ended.append(time.perf_counter()))
    place = get_place(folder / "run", "x")
    result = train(build_unet(work), data, get_options(work), place=place, device="cpu", watcher=watcher)
    taken = [after - before for before, after in zip(ended[WARM_UP - 1 :], ended[WARM_UP:], strict=False)]
    return Run(step=statistics.median(taken), parts={}, losses=list(result.losses), peak=get_peak())


class Clock:
    """Collects the seconds of a loop's parts."""

    def __init__(self):
        self.taken: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.taken.setdefault(part, []).append(time.perf_counter() - started)

    def get_medians(self) -> dict[str, float]:
        return {part: statistics.median(taken[WARM_UP:] or taken[1:]) for part, taken in self.taken.items()}


def run_plain(work: Work, folder: Path) -> Run:
    """Encodes caption and picture in every step."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from kolors_nodes.kolors.tokenizer import Tokenizer
    from kolors_nodes.lora.dataset import get_views, render_view
    from kolors_nodes.lora.order import get_seed

    text_encoder, vae, unet, dataset = (
        build_diffusers_text_encoder(work),
        build_vae(work),
        build_unet(work),
        read_pictures(work),
    )
    tokenizer = Tokenizer(DEMO / "kolors-shapes" / "tokenizer" / "tokenizer.model")
    options = get_options(work)
    targets = list(options.target_modules)
    torch.manual_seed(get_seed(options.seed, "adapters"))
    inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets), unet)
    if work.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([value for value in unet.train().parameters() if value.requires_grad], lr=1e-4)
    clock, losses = Clock(), []
    for draw, alpha, picture in list_draws(dataset, options):
        with clock.time("step"):
            pixels = torch.from_numpy(render_view(picture, get_views(picture, dataset.options, 0)[0]))[None]
            with torch.no_grad(), clock.time("caption"):
                rows, pooled = encode_padded(text_encoder, tokenizer, picture.caption)
            with torch.no_grad(), clock.time("picture"):
                latents = vae.encode(pixels) * 0.13025
            noisy, timestep = alpha.sqrt() * latents + (1 - alpha).sqrt() * draw.noise, torch.tensor([draw.timestep])
            time_ids = torch.tensor([[picture.height, picture.width, 0.0, 0.0, work.side, work.side]])
            with clock.time("unet"):
                added = {"text_embeds": pooled, "time_ids": time_ids}
                predicted = unet(noisy, timestep, encoder_hidden_states=rows, added_cond_kwargs=added).sample
                loss = torch.nn.functional.mse_loss(predicted, draw.noise[None])
                loss.backward()
            with clock.time("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    peak = get_peak()
    for _ in range(4):  # for the shares: the same with few rows of text instead of 256
        with clock.time("unet, short text"):
            mask = torch.ones(1, 16)
            few = {"encoder_hidden_states": rows[:, :16], "encoder_attention_mask": mask, "added_cond_kwargs": added}
            unet(noisy, timestep, **few).sample.square().mean().backward()
        optimizer.zero_grad()
    parts = clock.get_medians()
    return Run(step=parts.pop("step"), parts=parts, losses=losses, peak=peak)


def list_draws(dataset, options):
    """Yields noise and timestep, alpha-bar and picture of each step of our training."""
    import torch

    from kolors_nodes.kolors.schedulers import build_scheduler
    from kolors_nodes.lora.latents import Sample
    from kolors_nodes.lora.order import build_order, draw_sample

    size = dataset.options.height // 8
    samples = [
        Sample(name="", caption="", latents=torch.zeros(1, 4, size, size), time_ids=torch.zeros(1, 6),
               is_regularization=False)
        for _ in dataset.pictures
    ]  # fmt: skip
    order = build_order(samples, seed=options.seed, batch_size=1, regularization_share=0.0)
    alphas_cumprod = build_scheduler("EulerDiscreteScheduler").alphas_cumprod
    for step in range(options.max_train_steps):
        (index,) = order.get_batch(step)
        draw = draw_sample(samples[index], seed=options.seed, number=step, num_timesteps=1100, caption_dropout=0.0)
        yield draw, alphas_cumprod[draw.timestep], dataset.pictures[index]


def build_diffusers_text_encoder(work: Work):
    """Makes the same encoder as diffusers' class, which computes all 256 rows as DiffSynth does."""
    import torch
    from diffusers.pipelines.kolors import ChatGLMModel

    settings = {
        "multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "rmsnorm": True,
        "original_rope": True, "add_bias_linear": False, "seq_length": 256, "bias_dropout_fusion": True,
        "torch_dtype": "float32", "empty_init": False, **SIZES[work.model].text_encoder,
    }  # fmt: skip
    with torch.device("meta"):
        encoder = ChatGLMModel(ChatGLMModel.config_class(**settings)).eval()
    encoder.requires_grad_(False)
    missing = encoder.load_state_dict(build_text_encoder(work).state_dict(), strict=False, assign=True).missing_keys
    assert all("output_layer" in name or "inv_freq" in name for name in missing), missing
    del encoder.output_layer  # of no use here; DiffSynth keeps it in memory
    return encoder


def encode_padded(text_encoder, tokenizer, caption: str):
    """Encodes one caption, padded on the left to 256 tokens."""
    import torch

    ids = tokenizer.encode(caption)
    pads = 256 - len(ids)
    states = text_encoder(
        input_ids=torch.tensor([[tokenizer.pad_token_id] * pads + ids]),
        attention_mask=torch.tensor([[0] * pads + [1] * len(ids)]),
        position_ids=torch.tensor([[0] * pads + list(range(len(ids)))]), output_hidden_states=True,
    ).hidden_states  # fmt: skip
    return states[-2].permute(1, 0, 2), states[-1][-1]


def get_peak() -> float:
    """Gives this process' largest memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare_speed(work: Work = Work(), pairs: int = 2) -> dict:  # noqa: B008
    """Runs ours and the plain loop in turn, each in a process of its own, and compares them.

    Returns:
        The row ``name, ours_s, peer_s, ratio, spread, max_relative_difference`` (of the losses), and ``parts`` of the
        plain loop's step in seconds, ``peaks`` in MiB of ``cache``, ``ours`` and ``plain``, ``text_encoder`` in MiB.
    """
    found: dict[str, list[Run]] = {"cache": [], "ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cache", *("ours", "plain") * pairs):
            command = [sys.executable, "-W", "ignore", __file__, "--child", kind, folder, json.dumps(asdict(work))]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[kind].append(Run(**json.loads(output.splitlines()[-1])))
    ours, plain = found["ours"], found["plain"]
    ratios = [theirs.step / own.step for own, theirs in zip(ours, plain, strict=True)]
    losses = [abs(a - b) / b for a, b in zip(ours[0].losses, plain[0].losses, strict=True)]
    return {
        "name": f"train_step_{work.side}", "ours_s": statistics.median(run.step for run in ours),
        "peer_s": statistics.median(run.step for run in plain), "ratio": statistics.median(ratios),
        "spread": max(ratios) - min(ratios), "max_relative_difference": max(losses),
        "parts": {part: statistics.median(run.parts[part] for run in plain) for part in plain[0].parts},
        "peaks": {kind: max(run.peak for run in runs) for kind, runs in found.items()},
        "text_encoder": count_text_encoder(work) * 4 / 2**20,
    }  # fmt: skip


def count_text_encoder(work: Work) -> int:
    """Counts the text encoder's parameters."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_text_encoder(work).parameters())


def measure_speed(work: Work, pairs: int) -> None:
    """Prints the comparison."""
    row = compare_speed(work, pairs)
    parts, peaks, ours, peer = row["parts"], row["peaks"], row["ours_s"], row["peer_s"]
    checkpointing = "with" if work.gradient_checkpointing else "without"
    print(f"random model ({work.model}), {work.side}x{work.side} pixels, batch 1, float32,", end=" ")
    print(f"{checkpointing} gradient checkpointing")
    print(f"plain loop   {1 / peer:.3f} steps/s  peak {peaks['plain']:.0f} MiB")
    print(f"ours         {1 / ours:.3f} steps/s  peak {peaks['ours']:.0f} MiB (while caching {peaks['cache']:.0f} MiB)")
    less = f"{peaks['plain'] - peaks['ours']:.0f} MiB less memory (text encoder {row['text_encoder']:.0f} MiB)"
    print(f"{row['ratio']:.2f} times as fast (spread {row['spread']:.2f}), {less}")
    print(f"losses differ by at most {row['max_relative_difference']:.1e}")
    unet = parts["unet"] + parts["optimizer"]
    print(f"the plain loop's step, {peer:.2f} s, and where ours, {ours:.2f} s, saves:")
    print(f"  caption   {parts['caption']:.2f} s, saved")
    print(f"  picture   {parts['picture']:.2f} s, saved")
    short = parts["unet"] - parts["unet, short text"]
    print(f"  UNet and optimizer {unet:.2f} s, of which {short:.2f} s for 256 rows of text instead of few")


def run_child(kind: str, folder: Path, work: Work) -> None:
    """Runs one part and prints what it measured."""
    print(json.dumps(asdict({"cache": run_cache, "ours": run_ours, "plain": run_plain}[kind](work, folder))))


# ---- the command on the bundled model ----


def get_command(output: Path, *more: str) -> list[str]:
    model = DEMO / "kolors-shapes"
    return [
        "train-lora", "--pretrained_unet_path", str(model / "unet"), "--pretrained_fp16_vae_path", str(model / "vae"),
        "--pretrained_text_encoder_path", str(model / "text_encoder"), "--dataset_path", str(DEMO / "lora_dataset"),
        "--width", "128", "--height", "128", "--precision", "32", "--learning_rate", "1e-3", "--output_path",
        str(output), *more,
    ]  # fmt: skip


def run_forked(arguments: list[str], plan: tuple[str, int, bool] | None) -> bool:
    """Runs the command in a fork, so that nothing is imported again. True: it ended itself; False: it was killed.

    Args:
        arguments: of the command.
        plan: phase, how many writes of that phase to let pass, and whether to die after renaming instead of before;
            None: lets it end.
    """
    from kolors_nodes.headless.command import main

    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if plan:
            die_when_writing(*plan)
        os._exit(main(arguments))
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the run failed with {code}"
    return code == 0


def die_when_writing(phase: str, passed: int, is_after: bool) -> None:
    """Lets this process kill itself like ``kill -9`` around the renaming that puts a file in its place."""
    rename, left = os.replace, [passed]

    def replace(source, target) -> None:
        is_meant = get_phase(Path(target)) == phase
        if is_meant and not left[0] and not is_after:
            with open(source, "r+b") as file:
                file.truncate(os.path.getsize(source) // 2)  # as if killed in the middle of writing
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if is_meant and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= is_meant

    os.replace = replace


def get_phase(path: Path) -> str:
    """Names what a file belongs to: captions, latents, checkpoints, or the file itself."""
    return path.parent.name if path.parent.name in ("captions", "latents", "checkpoints") else path.name


def list_plans(chance: random.Random, kills: int) -> list[tuple[str, int, bool]]:
    """Spreads kills evenly over the phases, before and after renaming, after a random number of writes."""
    phases = {"captions": 15, "latents": 15, "checkpoints": 3, "kolors_lora.safetensors": 3, "log.jsonl": 0}
    turns = [(phase, is_after) for phase in phases for is_after in (False, True)]
    chosen = [turns[index % len(turns)] for index in range(kills)]
    return [(phase, chance.randint(0, phases[phase]), is_after) for phase, is_after in chosen]


def measure_kills(folder: Path, kills: int = 30) -> None:
    """Kills runs in every phase, half of them in the middle of a file, and compares what they end with."""
    import torch

    import_everything()
    torch.set_num_threads(1)  # a fork has no threads
    settings = ("--max_train_steps", "6", "--checkpoint_every", "1", "--batch_size", "2", "--lora_dropout", "0.1")
    assert run_forked(get_command(folder / "whole", *settings), None)
    chance = random.Random(0)
    done, endings, killed = [], 0, folder / "killed"
    plans = list_plans(chance, kills)
    while plans or killed.exists():
        plan = plans.pop(0) if plans else None
        if not run_forked(get_command(killed, *settings, "--resume"), plan):
            done.append(f"{plan[0]} {'after' if plan[2] else 'before'} {plan[1]}")
            continue
        assert filecmp.cmp(folder / "whole/kolors_lora.safetensors", killed / "kolors_lora.safetensors", False)
        losses = [(folder / name / "kolors_lora-training/log.jsonl").read_text() for name in ("whole", "killed")]
        assert get_losses(losses[0]) == get_losses(losses[1])
        endings += 1
        shutil.rmtree(killed)
    print(f"{len(done)} kills, {endings} runs ended, every file equal to the last bit")
    print("each around a renaming (phase, before or after, writes let pass): " + ", ".join(done))


def import_everything() -> None:
    """Imports what a run needs, once for all forks, so that kills hit its work."""
    import importlib

    names = ("accelerate", "peft", "PIL.Image", "sentencepiece", "kolors_nodes.headless.train_command")
    names += tuple(f"kolors_nodes.kolors.{name}" for name in ("text_encoder", "unet", "vae", "sampling"))
    for name in (*names, "kolors_nodes.lora.training", "torch._dynamo", "peft.tuners.lora"):
        importlib.import_module(name)
    import diffusers

    for name in ("UNet2DConditionModel", "AutoencoderKL", "EulerDiscreteScheduler"):
        getattr(diffusers, name)


def get_losses(log: str) -> list[float]:
    return [json.loads(line)["loss"] for line in log.splitlines()]


def measure_processes(folder: Path) -> None:
    """Trains with two processes of batch 2 and one of batch 4, and prints by how much the losses differ."""
    settings = ("--max_train_steps", "20", "--checkpoint_every", "10", "--cache_dir", str(folder / "cache"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
              "kolors_nodes"]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "kolors_nodes", *get_command(folder / "one", *settings, "--batch_size", "4")]
    two = [*launch, *get_command(folder / "two", *settings, "--batch_size", "2")]
    for command in (one, two):
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    losses = [get_losses((folder / name / "kolors_lora-training/log.jsonl").read_text()) for name in ("one", "two")]
    worst = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    print(f"{len(losses[0])} steps, one process of batch 4 and two of batch 2: losses differ by at most {worst:.1e}")
    assert worst <= 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["speed", "kills", "processes"], default="speed")
    parser.add_argument("--model", choices=SIZES, default=Work.model, help="how wide (default: %(default)s)")
    parser.add_argument("--side", type=int, default=Work.side, help="of the pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Work.steps, help="that are timed (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2, help="of runs (default: %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing in both loops")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        kind, folder, work = chosen.child
        run_child(kind, Path(folder), Work(**json.loads(work)))
    elif chosen.what == "speed":
        work = Work(
            model=chosen.model, side=chosen.side, steps=chosen.steps, gradient_checkpointing=chosen.checkpointing
        )
        measure_speed(work, chosen.pairs)
    else:
        with tempfile.TemporaryDirectory() as folder:
            {"kills": measure_kills, "processes": measure_processes}[chosen.what](Path(folder))


if __name__ == "__main__":
    main()
