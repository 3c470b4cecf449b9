"""Measures LoRA training: speed and memory against a plain loop, kills at random moments, two processes.

    python benchmarks/train_lora.py speed       # a mid-size random model, about 3 minutes; SIDE=256: larger pictures
    python benchmarks/train_lora.py kills       # 20 kills of runs on the bundled model, then compares the files
    python benchmarks/train_lora.py processes   # two processes under accelerate launch against one

The plain loop does what DiffSynth-Studio's training_step does (diffsynth/trainers/text_to_image.py at 22e4ae99): it
encodes the caption, padded to 256 tokens, and the picture in every step, with all three models in memory. Both loops
train the same adapters on the same random UNet with the same batch and AdamW, in float32.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo"
SIDE = int(os.environ.get("SIDE", "128"))  # of the pictures, in pixels
STEPS, WARM_UP = 6, 2

# Kolors' parts with a quarter of the width, so a sixteenth of the weights.
TEXT_ENCODER = {
    "padded_vocab_size": 1024, "hidden_size": 1024, "ffn_hidden_size": 3424, "kv_channels": 64,
    "num_attention_heads": 16, "num_layers": 28,
}  # fmt: skip
UNET = {
    "sample_size": SIDE // 8, "block_out_channels": (80, 160, 320), "attention_head_dim": (1, 2, 5),
    "norm_num_groups": 16, "cross_attention_dim": 512, "encoder_hid_dim": 1024, "addition_time_embed_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 64 + 1024,
}  # fmt: skip
VAE_WIDTHS = (32, 64, 128, 128)


# ---- speed ----


def build_text_encoder():
    import torch

    from kolors_nodes.kolors.text_encoder import TextEncoderConfig, build_text_encoder

    torch.manual_seed(1)
    return build_text_encoder(TextEncoderConfig(**TEXT_ENCODER)).requires_grad_(False)


def build_vae():
    import torch
    from diffusers import AutoencoderKL

    from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, VAE

    torch.manual_seed(2)
    autoencoder = AutoencoderKL.from_config({**SDXL_VAE_CONFIG, "block_out_channels": VAE_WIDTHS})
    return VAE(autoencoder.eval().requires_grad_(False))


def build_unet():
    import torch

    from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet

    torch.manual_seed(3)
    return build_unet({**KOLORS_UNET_CONFIG, **UNET}).requires_grad_(False)


def get_options():
    from kolors_nodes.lora.options import TrainingOptions

    return TrainingOptions(
        rank=16, alpha=4.0, max_train_steps=WARM_UP + STEPS, precision="32", gradient_checkpointing=False,
        checkpoint_every=1000,
    )  # fmt: skip


def read_pictures():
    from kolors_nodes.lora.dataset import read_dataset
    from kolors_nodes.lora.options import DatasetOptions

    return read_dataset(DEMO / "lora_dataset", DatasetOptions(width=SIDE, height=SIDE))


def encode(folder: Path, load_text_encoder, load_vae):
    from kolors_nodes.kolors.tokenizer import Tokenizer
    from kolors_nodes.lora.latents import Encoders, encode_dataset

    encoders = Encoders(
        tokenizer=Tokenizer(DEMO / "kolors-shapes" / "tokenizer" / "tokenizer.model"), text_identity="random",
        text_precision="float32", load_text_encoder=load_text_encoder, vae_identity="random", load_vae=load_vae,
    )  # fmt: skip
    return encode_dataset(
        read_pictures(), encoders, other_captions=(), seed=0, cache=folder / "cache", on_progress=lambda *_: None
    )


def run_cache(folder: Path) -> None:
    """Fills the cache."""
    encode(folder, build_text_encoder, lambda: build_vae().encode)


def run_ours(folder: Path) -> list[float]:
    """Trains with everything cached. Returns when each step ended, in seconds."""
    from kolors_nodes.lora.training import Watcher, get_place, train

    data = encode(folder, None, None)
    ended: list[float] = []
    watcher = Watcher(on_step=lambda report: ended.append(time.perf_counter()))
    train(build_unet(), data, get_options(), place=get_place(folder, "x"), device="cpu", watcher=watcher)
    return ended


def run_plain(folder: Path) -> list[float]:
    """Encodes caption and picture in every step. Returns when each step ended, in seconds."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from kolors_nodes.kolors.schedulers import build_scheduler
    from kolors_nodes.kolors.tokenizer import Tokenizer
    from kolors_nodes.lora.dataset import get_views, render_view

    text_encoder, vae, unet, dataset = build_diffusers_text_encoder(), build_vae(), build_unet(), read_pictures()
    tokenizer = Tokenizer(DEMO / "kolors-shapes" / "tokenizer" / "tokenizer.model")
    options = get_options()
    targets = list(options.target_modules)
    inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=targets), unet)
    optimizer = torch.optim.AdamW([value for value in unet.parameters() if value.requires_grad], lr=1e-4)
    scheduler = build_scheduler("EulerDiscreteScheduler")
    time_ids = torch.tensor([[SIDE, SIDE, 0.0, 0.0, SIDE, SIDE]])
    ended = []
    for step in range(WARM_UP + STEPS):
        picture = dataset.pictures[step % len(dataset.pictures)]
        pixels = torch.from_numpy(render_view(picture, get_views(picture, dataset.options, 0)[0]))[None]
        with torch.no_grad():
            rows, pooled = encode_padded(text_encoder, tokenizer, picture.caption)
            latents = vae.encode(pixels) * 0.13025
        noise, timestep = torch.randn_like(latents), torch.randint(1100, (1,))
        alpha = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        added = {"text_embeds": pooled, "time_ids": time_ids}
        predicted = unet(noisy, timestep, encoder_hidden_states=rows, added_cond_kwargs=added).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        ended.append(time.perf_counter())
    return ended


def build_diffusers_text_encoder():
    """Makes the same encoder as diffusers' class, which computes all 256 rows as DiffSynth does."""
    import torch
    from diffusers.pipelines.kolors import ChatGLMModel

    settings = dict(TEXT_ENCODER, multi_query_attention=True, multi_query_group_num=2, add_qkv_bias=True,
                    rmsnorm=True, original_rope=True, add_bias_linear=False, seq_length=256)  # fmt: skip
    settings |= {"bias_dropout_fusion": True, "torch_dtype": "float32"}
    encoder = ChatGLMModel(ChatGLMModel.config_class(**settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():  # it allocates without initialising
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return encoder.float()


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


def measure_speed(folder: Path) -> None:
    """Runs cache, ours and plain in processes of their own, for their peak memory, and prints the comparison."""
    found = {}
    for kind in ("cache", "ours", "plain", "ours", "plain"):  # twice, in turn: the machine's speed may drift
        command = [sys.executable, "-W", "ignore", __file__, "--child", kind, str(folder)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.setdefault(kind, []).append(json.loads(output.splitlines()[-1]))
    text_encoder = sum(parameter.numel() for parameter in build_text_encoder().parameters()) * 4 / 2**20
    ours, plain = (max(run["speed"] for run in found[kind]) for kind in ("ours", "plain"))
    peaks = {kind: max(run["peak"] for run in runs) for kind, runs in found.items()}
    print(f"random model, {SIDE}x{SIDE} pixels, batch 1, float32; text encoder {text_encoder:.0f} MiB")
    print(f"plain loop   {plain:.3f} steps/s  peak {peaks['plain']:.0f} MiB")
    print(f"ours         {ours:.3f} steps/s  peak {peaks['ours']:.0f} MiB (while caching {peaks['cache']:.0f} MiB)")
    print(f"{ours / plain:.2f} times as fast, {peaks['plain'] - peaks['ours']:.0f} MiB less memory")


def run_child(kind: str, folder: Path) -> None:
    """Runs one part and prints its speed after the warm-up, and the process' peak memory in MiB."""
    ended = {"cache": run_cache, "ours": run_ours, "plain": run_plain}[kind](folder)
    speed = (len(ended) - WARM_UP) / (ended[-1] - ended[WARM_UP - 1]) if ended else 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"speed": speed, "peak": peak}))


# ---- the command on the bundled model ----


def get_command(output: Path, *more: str) -> list[str]:
    model = DEMO / "kolors-shapes"
    return [
        "train-lora", "--pretrained_unet_path", str(model / "unet"), "--pretrained_fp16_vae_path", str(model / "vae"),
        "--pretrained_text_encoder_path", str(model / "text_encoder"), "--dataset_path", str(DEMO / "lora_dataset"),
        "--width", "128", "--height", "128", "--precision", "32", "--learning_rate", "1e-3", "--output_path",
        str(output), *more,
    ]  # fmt: skip


def run_forked(arguments: list[str], seconds: float | None) -> bool:
    """Runs the command in a fork, so that nothing is imported again; kills it after a time. True: it ended itself."""
    from kolors_nodes.headless.command import main

    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(arguments))
    deadline = time.monotonic() + seconds if seconds is not None else float("inf")
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, f"the run failed with {status}"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def measure_kills(folder: Path, kills: int = 20) -> None:
    """Kills runs at random moments until there were so many kills, and compares what they end with."""
    import torch

    import_everything()
    torch.set_num_threads(1)  # a fork has no threads
    settings = ("--max_train_steps", "12", "--checkpoint_every", "1", "--batch_size", "2", "--lora_dropout", "0.1")
    started = time.monotonic()
    assert run_forked(get_command(folder / "whole", *settings), None)
    duration = time.monotonic() - started
    chance = random.Random(0)
    done, endings, moments = 0, 0, []
    while done < kills or (folder / "killed").exists():
        moment = chance.uniform(0, duration) if done < kills else None
        phase = describe_files(folder / "killed")
        if not run_forked(get_command(folder / "killed", *settings, "--resume"), moment):
            done += 1
            moments.append(f"{phase}->{describe_files(folder / 'killed')}")
            continue
        assert filecmp.cmp(folder / "whole/kolors_lora.safetensors", folder / "killed/kolors_lora.safetensors", False)
        losses = [(folder / name / "kolors_lora-training/log.jsonl").read_text() for name in ("whole", "killed")]
        assert get_losses(losses[0]) == get_losses(losses[1])
        endings += 1
        shutil.rmtree(folder / "killed")
    print(f"{done} kills within {duration:.1f} s runs, {endings} runs ended, every file equal to the last bit")
    print("what was there before and after each kill (cached files, newest checkpoint): " + ", ".join(moments))


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


def describe_files(output: Path) -> str:
    """Says how far a run's files are."""
    cached = len(list(output.glob("kolors-cache/*/*.safetensors")))
    steps = [path.stem for path in output.glob("kolors_lora-training/checkpoints/step-*")]
    return f"{cached}c/{int(max(steps).removeprefix('step-')) if steps else 0}s"


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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        run_child(chosen.child[0], Path(chosen.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        measures = {"speed": measure_speed, "kills": measure_kills, "processes": measure_processes}
        measures[chosen.what](Path(folder))


if __name__ == "__main__":
    main()
