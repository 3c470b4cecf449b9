"""The command ``kolors train-lora``; also under ``accelerate launch -m kolors_nodes train-lora``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch

    from ..lora.dataset import Dataset
    from ..lora.latents import Encoders, Regularization, TrainingData
    from ..lora.options import TrainingOptions
    from ..lora.training import Place, StepReport

DONE, FAILED, INVALID, STOPPED = 0, 1, 2, 130
_SECONDS_BETWEEN_LINES = 5.0
_UPLOADS = ("modelscope_model_id", "modelscope_access_token")


def add_train_command(commands: Any) -> None:
    """Adds the command to the command line's subparsers."""
    train = commands.add_parser(
        "train-lora",
        help="train a LoRA from a folder of pictures",
        description="Trains a LoRA and prints the paths of its files. Takes the options of DiffSynth-Studio's "
        "train_kolors_lora.py with their defaults. Exit status: 0 done, 1 failed while training, 2 wrong settings or "
        "data, 130 stopped by Ctrl-C (--resume goes on).",
        allow_abbrev=False,
    )
    _add_files(train.add_argument_group("files"))
    _add_pictures(train.add_argument_group("pictures"))
    _add_training(train.add_argument_group("training"))
    _add_other(train.add_argument_group("other"))
    train.set_defaults(handler=run_train)


def _add_files(group: Any) -> None:
    group.add_argument("--pretrained_unet_path", required=True, metavar="PATH", help="the UNet: a file or its folder")
    group.add_argument("--pretrained_text_encoder_path", required=True, metavar="DIR", help="the text encoder")
    group.add_argument("--pretrained_fp16_vae_path", required=True, metavar="PATH", help="the VAE: a file or a folder")
    group.add_argument(
        "--dataset_path",
        required=True,
        metavar="DIR",
        help="pictures with captions: metadata.csv or "
        "metadata.jsonl (file_name, text; also in DIR/train), or .txt files beside the pictures",
    )
    group.add_argument("--reg_data_dir", metavar="DIR", help="pictures of what shall not be forgotten, with captions")
    group.add_argument("--output_path", default="./", metavar="DIR", help="for all files (default: %(default)s)")
    group.add_argument("--name", default="kolors_lora", help="of the LoRA file (default: %(default)s)")
    group.add_argument("--cache_dir", metavar="DIR", help="of what is encoded (default: OUTPUT/kolors-cache)")
    group.add_argument(
        "--save_lightning_ckpt",
        action="store_true",
        help="also write lightning_logs/version_0/checkpoints/epoch=E-step=S.ckpt, as DiffSynth does",
    )


def _add_pictures(group: Any) -> None:
    group.add_argument("--height", type=int, default=1024, help="in pixels (default: %(default)s)")
    group.add_argument("--width", type=int, default=1024, help="in pixels (default: %(default)s)")
    group.add_argument("--center_crop", action="store_true", help="crop the middle instead of random places")
    group.add_argument("--random_flip", action="store_true", help="train on mirror images too")
    group.add_argument("--enable_bucket", action="store_true", help="keep aspect ratios, at about width x height")
    group.add_argument("--crops", type=int, default=4, help="random places for each picture (default: %(default)s)")
    group.add_argument("--caption", default="", help="for pictures that have none")
    group.add_argument(
        "--caption_dropout_rate",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of samples with an empty caption (default: %(default)s)",
    )
    group.add_argument(
        "--regularization_prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="let the base model draw pictures of this, and train on them too (repeatable)",
    )
    group.add_argument("--regularization_count", type=int, default=50, help="of these in all (default: %(default)s)")
    group.add_argument(
        "--regularization_share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of samples from --reg_data_dir and --regularization_prompt (default: %(default)s)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="without effect: pictures are encoded once, before training",
    )


def _add_training(group: Any) -> None:
    group.add_argument("--lora_rank", type=int, default=4, help="(default: %(default)s)")
    group.add_argument("--lora_alpha", type=float, default=4.0, help="scale is alpha / rank (default: %(default)s)")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="(default: %(default)s)")
    group.add_argument("--lora_target_modules", default="to_q,to_k,to_v,to_out", help="(default: %(default)s)")
    group.add_argument(
        "--init_lora_weights", default="kaiming", choices=["gaussian", "kaiming"], help="(default: %(default)s)"
    )
    group.add_argument("--steps_per_epoch", type=int, default=500, help="batches (default: %(default)s)")
    group.add_argument("--max_epochs", type=int, default=1, help="(default: %(default)s)")
    group.add_argument("--max_train_steps", type=int, metavar="N", help="instead of epochs")
    group.add_argument("--batch_size", type=int, default=1, help="in each process (default: %(default)s)")
    group.add_argument("--accumulate_grad_batches", type=int, default=1, help="for a step (default: %(default)s)")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="(default: %(default)s)")
    group.add_argument(
        "--optimizer",
        default="adamw",
        choices=["adamw", "adamw8bit", "prodigy"],
        help="prodigy finds its own learning rate: set --learning_rate 1 (default: %(default)s)",
    )
    group.add_argument("--weight_decay", type=float, default=0.01, help="(default: %(default)s)")
    group.add_argument(
        "--lr_scheduler", default="constant", choices=["constant", "cosine", "linear"], help="(default: %(default)s)"
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="(default: %(default)s)")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0: no clipping (default: %(default)s)")
    group.add_argument("--min_snr_gamma", type=float, default=0.0, help="0: no weighting (default: %(default)s)")
    group.add_argument("--noise_offset", type=float, default=0.0, help="(default: %(default)s)")
    group.add_argument("--use_gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument(
        "--precision",
        default="16-mixed",
        choices=["32", "16", "16-mixed", "bf16"],
        help="of the arithmetic; 16 counts as 16-mixed (default: %(default)s)",
    )
    group.add_argument(
        "--base_precision",
        choices=["fp16", "bf16", "fp32", "8bit", "4bit"],
        help="of the frozen UNet (default: as --precision has it)",
    )
    group.add_argument("--training_strategy", default="auto", help="auto; several GPUs: accelerate launch --multi_gpu")


def _add_other(group: Any) -> None:
    group.add_argument("--seed", type=int, default=0, help="governs everything random (default: %(default)s)")
    group.add_argument("--checkpoint_every", type=int, default=100, metavar="N", help="steps (default: %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint under the output path")
    group.add_argument(
        "--sample_prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="draw this at every checkpoint (repeatable)",
    )
    group.add_argument("--sample_steps", type=int, default=20, help="of these pictures (default: %(default)s)")
    group.add_argument("--sample_cfg", type=float, default=5.0, help="of these pictures (default: %(default)s)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    group.add_argument("--verbose", action="store_true", help="show log messages, and where an error happened")
    for name in _UPLOADS:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS)


def run_train(options: argparse.Namespace, out: TextIO) -> int:
    """The command. Returns the exit status."""
    from ..kolors.checkpoint import CheckpointError
    from ..lora.formats import LoraError
    from ..lora.options import TrainingError
    from .command import show_log

    progress = Progress(sys.stderr)
    try:
        with show_log(sys.stderr, options.verbose):
            return train(options, progress, out)
    except (TrainingError, CheckpointError, LoraError, OSError, ValueError) as error:
        if options.verbose:
            raise
        print(f"error: {error}", file=sys.stderr)
        return FAILED if progress.is_training else INVALID
    except KeyboardInterrupt:
        print("error: Interrupted before training; what is encoded stays in the cache.", file=sys.stderr)
        return STOPPED


def train(options: argparse.Namespace, progress: Progress, out: TextIO) -> int:
    """Checks everything, encodes, trains, and prints the files."""
    from ..lora.dataset import list_enlarged
    from ..lora.training import Watcher, check_place, get_place
    from ..lora.training import train as train_lora

    training, regularization = get_training_options(options), get_regularization(options)
    place = get_place(Path(options.output_path), options.name)
    check_place(place)
    dataset = read_data(options)
    for warning in (*dataset.warnings, *list_enlarged(dataset)):
        print(f"warning: {warning}", file=sys.stderr)
    device = get_device(options.device)
    with in_turn(device):
        data, unet = prepare(options, dataset, training, regularization, device, progress)
    progress.is_training = True
    with listen_for_stop() as stopped:
        watcher = Watcher(
            on_step=progress.on_step, should_stop=stopped.is_set,
            decode=lambda latents: decode(options, device, latents),
        )  # fmt: skip
        result = train_lora(
            unet, data, training, place=place, device=device, watcher=watcher,
            resume="yes" if options.resume else "no",
        )  # fmt: skip
    if not is_main_process():
        return DONE
    print(place.lora, file=out)
    if options.save_lightning_ckpt:
        print(save_lightning_checkpoint(options, place, result.lora, result.step), file=out)
    if result.step < training.max_train_steps:
        print(f"stopped at step {result.step}; the same command with --resume goes on", file=sys.stderr)
        return STOPPED
    return DONE


def get_training_options(options: argparse.Namespace) -> TrainingOptions:
    """Translates the command line.

    Raises:
        TrainingError: a value is out of range, or asks for what this command does not do.
    """
    from ..lora.options import TrainingError, TrainingOptions

    if any(getattr(options, name) for name in _UPLOADS):
        raise TrainingError("This command uploads nothing: leave --modelscope_model_id and its token out.")
    if options.training_strategy != "auto":
        raise TrainingError(
            f"--training_strategy is {options.training_strategy!r}, expected auto. For several GPUs: "
            "accelerate launch --multi_gpu -m kolors_nodes train-lora …"
        )
    steps = options.max_train_steps
    if steps is None:
        steps = options.steps_per_epoch * options.max_epochs // max(1, options.accumulate_grad_batches)
    targets = [name.strip() for name in options.lora_target_modules.split(",")]
    return TrainingOptions(
        rank=options.lora_rank, alpha=options.lora_alpha, dropout=options.lora_dropout,
        target_modules=tuple("to_out.0" if name == "to_out" else name for name in targets),
        init_lora_weights=options.init_lora_weights, optimizer=options.optimizer,
        learning_rate=options.learning_rate, weight_decay=options.weight_decay, lr_schedule=options.lr_scheduler,
        lr_warmup_steps=options.lr_warmup_steps, max_grad_norm=options.max_grad_norm,
        train_batch_size=options.batch_size, gradient_accumulation_steps=options.accumulate_grad_batches,
        max_train_steps=steps, gradient_checkpointing=options.use_gradient_checkpointing,
        precision="16-mixed" if options.precision == "16" else options.precision,
        base_precision=options.base_precision or "", min_snr_gamma=options.min_snr_gamma,
        noise_offset=options.noise_offset, caption_dropout=options.caption_dropout_rate,
        regularization_share=options.regularization_share, seed=options.seed,
        checkpoint_every=options.checkpoint_every, sample_prompts=tuple(options.sample_prompt),
        sample_steps=options.sample_steps, sample_guidance_scale=options.sample_cfg,
    )  # fmt: skip


def get_regularization(options: argparse.Namespace) -> Regularization:
    """Translates what the base model shall draw."""
    from ..kolors.options import SamplingOptions
    from ..lora.latents import Regularization

    sampling = SamplingOptions(
        num_inference_steps=options.sample_steps, guidance_scale=options.sample_cfg, height=options.height,
        width=options.width, seed=options.seed,
    )  # fmt: skip
    return Regularization(
        prompts=tuple(options.regularization_prompt), count=options.regularization_count, sampling=sampling
    )


def read_data(options: argparse.Namespace) -> Dataset:
    """Reads and checks the dataset, with the regularisation pictures where there are any."""
    from ..lora.dataset import read_dataset
    from ..lora.options import DatasetOptions

    how = DatasetOptions(
        width=options.width, height=options.height, center_crop=options.center_crop, crops=options.crops,
        random_flip=options.random_flip, buckets=options.enable_bucket, caption=options.caption,
    )  # fmt: skip
    dataset = read_dataset(options.dataset_path, how)
    return dataset.with_regularization(read_dataset(options.reg_data_dir, how)) if options.reg_data_dir else dataset


def prepare(
    options: argparse.Namespace, dataset: Dataset, training: TrainingOptions, regularization: Regularization,
    device: torch.device, progress: Progress,
) -> tuple[TrainingData, Any]:  # fmt: skip
    """Encodes everything, then loads the UNet: text encoder and VAE have left memory by then."""
    import torch

    from ..kolors.precision import PRECISIONS
    from ..kolors.unet import load_unet
    from ..lora.latents import add_regularization, encode_dataset, get_digest
    from ..lora.trainee import get_base_precision
    from ..lora.training import check_resume, get_place

    cache = Path(options.cache_dir) if options.cache_dir else Path(options.output_path) / "kolors-cache"
    encoders = build_encoders(options, device)
    check_resume(
        get_place(Path(options.output_path), options.name), training, get_digest(dataset, encoders, regularization),
        num_processes=int(os.environ.get("WORLD_SIZE", 1)), resume="yes" if options.resume else "no",
    )  # fmt: skip
    data = encode_dataset(
        dataset, encoders, other_captions=(*training.sample_prompts, *regularization.prompts), seed=training.seed,
        cache=cache, on_progress=progress.on_phase,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.empty_cache()
    precision = get_base_precision(training, device)
    unet = load_unet(
        options.pretrained_unet_path, precision=precision if precision in PRECISIONS else "fp16", device=device,
    )  # fmt: skip
    if regularization.prompts:
        data = add_regularization(
            data, regularization, unet.to(device), text_identity=encoders.text_identity, cache=cache,
            on_progress=progress.on_phase,
        )  # fmt: skip
    return data, unet


def build_encoders(options: argparse.Namespace, device: torch.device) -> Encoders:
    """Says where text encoder and VAE come from; loads the tokenizer alone."""
    from ..kolors.checkpoint import CheckpointError, find_weight_files, iterate_tensors
    from ..kolors.precision import get_dtype
    from ..kolors.text_encoder import find_tokenizer, load_text_encoder
    from ..kolors.tokenizer import Tokenizer
    from ..kolors.vae import load_vae
    from ..lora.latents import Encoders, get_identity

    text_path, vae_path = Path(options.pretrained_text_encoder_path), Path(options.pretrained_fp16_vae_path)
    for path in (text_path, vae_path, Path(options.pretrained_unet_path)):
        if not path.exists():
            raise CheckpointError(f"There is no {path}. Give the path of the model's file or folder.")
    try:
        tokenizer = find_tokenizer(text_path)
    except CheckpointError:
        tokenizer = find_tokenizer(text_path.parent)
    dtype = get_dtype("fp16", device)
    return Encoders(
        tokenizer=Tokenizer(tokenizer), text_precision=str(dtype),
        text_identity=get_identity(iterate_tensors(find_weight_files(text_path))),
        load_text_encoder=lambda: load_text_encoder(text_path, precision="fp16", device=device).to(device),
        vae_identity=get_identity(iterate_tensors(find_weight_files(vae_path))),
        load_vae=lambda: load_vae(vae_path, device=device).encode,
    )  # fmt: skip


def decode(options: argparse.Namespace, device: torch.device, latents: torch.Tensor) -> torch.Tensor:
    """Decodes sample pictures with a VAE that is loaded for the moment."""
    from ..kolors.vae import load_vae

    return load_vae(options.pretrained_fp16_vae_path, device=device).decode(latents)


def save_lightning_checkpoint(options: argparse.Namespace, place: Place, lora: Any, step: int) -> Path:
    """Writes the file that DiffSynth's script writes, under its name."""
    from ..lora.files import save_lora
    from ..lora.names import DIFFSYNTH

    folder = place.lora.parent / "lightning_logs" / "version_0" / "checkpoints"
    return save_lora(lora, folder / f"epoch={options.max_epochs - 1}-step={step}.ckpt", DIFFSYNTH)


def get_device(name: str | None) -> torch.device:
    """Gives the device to train on: the one asked for, or the best there is.

    Raises:
        ValueError: it is not there.
    """
    import torch

    from .host import HeadlessHost

    device = torch.device(HeadlessHost(device=name).get_device())
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def is_main_process() -> bool:
    """Tells whether this is the first process of a launch, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Lets the first process of a launch go first, so that the others find its cache."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=device.type == "cpu").main_process_first():
        yield


@contextlib.contextmanager
def listen_for_stop() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step; the second one ends at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        stopped.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Lines about the phases and steps, at most one in some seconds; on a terminal they replace each other."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.is_training = False
        self._last = 0.0
        self._is_terminal = stream.isatty()

    def on_phase(self, phase: str, done: int, total: int) -> None:
        """Tells how far encoding is."""
        self._write(f"{phase} {done}/{total}", is_last=done == total)

    def on_step(self, report: StepReport) -> None:
        """Tells how far training is."""
        self._write(report.describe(), is_last=report.step == report.total)

    def _write(self, line: str, *, is_last: bool) -> None:
        now, pause = time.monotonic(), 0.2 if self._is_terminal else _SECONDS_BETWEEN_LINES
        if is_main_process() and (is_last or now - self._last >= pause):
            self._last = now
            end = "\r" if self._is_terminal and not is_last else "\n"
            print(f"{line:<72}" if self._is_terminal else line, end=end, file=self.stream, flush=True)
