"""Training a LoRA: one loop on accelerate, for one process or several."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..kolors.options import SCALING_FACTOR, VAE_SCALE_FACTOR, SamplingOptions
from ..kolors.sampling import sample
from ..kolors.schedulers import build_scheduler
from ..kolors.storage import remove_parts, write_bytes
from ..kolors.unet import KOLORS_UNET_CONFIG
from .checkpoint import Checkpoint, check_settings, load_newest_checkpoint, remove_checkpoints, save_checkpoint
from .files import save_lora
from .formats import Lora
from .latents import Sample, TrainingData, get_identity, get_prompt_embeds, get_text_batch
from .names import DIFFUSERS, UNetNames, get_unet_names
from .options import TrainingError, TrainingOptions, check_name
from .order import Order, build_order, draw_sample, get_seed
from .plot import draw_loss
from .sharding import gather, is_sharded, scatter_optimizer_state, set_sharding_
from .trainee import (
    build_trainee,
    get_compute_dtype,
    get_lora,
    get_precision,
    import_bitsandbytes,
    list_trained,
    set_attention_,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel

_SMOOTHING = 0.98  # share of the old running mean in the next
_SPACE_FACTOR = 12  # bytes on disk for each trained parameter and file: weight and two moments in float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What there is to tell after a step.

    Attributes:
        step: steps done.
        total: steps in all.
        loss: of this step.
        smoothed_loss: its running mean.
        learning_rate: of this step.
        steps_per_second: over this run.
        seconds_left: at this speed.
    """

    step: int
    total: int
    loss: float
    smoothed_loss: float
    learning_rate: float
    steps_per_second: float
    seconds_left: float

    def describe(self) -> str:
        """Gives one line for people."""
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return (
            f"step {self.step}/{self.total}, loss {self.smoothed_loss:.4f}, {self.steps_per_second:.2f} steps/s, "
            f"{minutes}:{seconds:02} left"
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run's files are.

    Attributes:
        folder: of the run: checkpoints, samples, log, plot.
        lora: the LoRA so far, and at the end the LoRA.
    """

    folder: Path
    lora: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of sample pictures."""
        return self.folder / "samples"

    @property
    def log(self) -> Path:
        """A JSON object on a line for each step."""
        return self.folder / "log.jsonl"

    @property
    def plot(self) -> Path:
        """The loss as a picture."""
        return self.folder / "loss.png"


def get_place(output: Path, name: str) -> Place:
    """Gives the files of a run of this name under an output folder.

    Raises:
        TrainingError: the name is no plain file name.
    """
    check_name(name)
    return Place(folder=output / f"{name}-training", lora=output / f"{name}.safetensors")


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Who is told of the run, and may stop it. What a function raises ends the run, resumable, and is passed on.

    Attributes:
        on_step: after each step.
        on_samples: with the step and pictures (B, H, W, 3) in [0, 1].
        decode: latents (B, C, h, w) without the scaling factor to pictures; None: no sample pictures.
        should_stop: asked after each step.
    """

    on_step: Callable[[StepReport], None] | None = None
    on_samples: Callable[[int, torch.Tensor], None] | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    should_stop: Callable[[], bool] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """What came of it.

    Attributes:
        lora: the LoRA, or the LoRA so far.
        step: steps done; fewer than asked for where the run was stopped.
        losses: of every step from the first.
        smoothed_losses: likewise.
        samples: pictures (B, H, W, 3) of the last checkpoint, or None.
    """

    lora: Lora
    step: int
    losses: tuple[float, ...]
    smoothed_losses: tuple[float, ...]
    samples: torch.Tensor | None


# ---- one step ----


def get_learning_rate_factor(step: int, options: TrainingOptions) -> float:
    """Gives the learning rate of a step, from 0, as a factor of the peak: linear warm-up, then the schedule."""
    if step < options.lr_warmup_steps:
        return (step + 1) / options.lr_warmup_steps
    share = (step - options.lr_warmup_steps) / max(1, options.max_train_steps - options.lr_warmup_steps)
    match options.lr_schedule:
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return 1 - share
    return 1.0


def get_loss_weight(alphas_cumprod: torch.Tensor, min_snr_gamma: float) -> torch.Tensor:
    """Gives the weight of a noise prediction's error at given alpha-bars: min(SNR, gamma) / SNR; 1 without gamma.

    Source: Hang et al. 2023 (min-SNR), equation 5, for noise prediction.
    """
    if not min_snr_gamma:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=min_snr_gamma) / snr


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A batch for the UNet, float32, on its device.

    Attributes:
        names: of the pictures, for messages.
        noisy_latents: (B, C, h, w).
        noise: (B, C, h, w), what is to be predicted.
        timesteps: (B,) int64.
        weights: (B,) of the samples' losses.
        rows: (B, S, D) compact text.
        mask: (B, S).
        pooled: (B, D).
        time_ids: (B, 6).
    """

    names: tuple[str, ...]
    noisy_latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


def build_batch(
    data: TrainingData, options: TrainingOptions, chosen: Sequence[tuple[int, Sample]],
    alphas_cumprod: torch.Tensor, device: torch.device,
) -> Batch:  # fmt: skip
    """Lays out samples for the UNet.

    Args:
        data: the captions.
        options: seed, noise offset, caption dropout, loss weight.
        chosen: number in the whole run, and sample.
        alphas_cumprod: (T,) of the schedule.
        device: of the UNet.
    """
    draws = [
        draw_sample(
            each, seed=options.seed, number=number, num_timesteps=len(alphas_cumprod),
            caption_dropout=options.caption_dropout,
        )
        for number, each in chosen
    ]  # fmt: skip
    timesteps = torch.tensor([draw.timestep for draw in draws])
    noise = torch.stack([draw.noise + options.noise_offset * draw.offset for draw in draws])
    latents = torch.stack([each.latents[draw.view] for (_, each), draw in zip(chosen, draws, strict=True)])
    alphas = alphas_cumprod[timesteps]
    noisy = alphas.sqrt()[:, None, None, None] * latents + (1 - alphas).sqrt()[:, None, None, None] * noise
    captions = [each.caption if draw.has_caption else "" for (_, each), draw in zip(chosen, draws, strict=True)]
    rows, mask, pooled = get_text_batch([data.captions[caption] for caption in captions])
    time_ids = torch.stack([each.time_ids[draw.view] for (_, each), draw in zip(chosen, draws, strict=True)])
    return Batch(
        names=tuple(each.name for _, each in chosen), timesteps=timesteps.to(device), noisy_latents=noisy.to(device),
        noise=noise.to(device), weights=get_loss_weight(alphas, options.min_snr_gamma).to(device),
        rows=rows.to(device), mask=mask.to(device), pooled=pooled.to(device), time_ids=time_ids.to(device),
    )  # fmt: skip


def get_loss(unet: nn.Module, batch: Batch) -> torch.Tensor:
    """Gives the weighted mean squared error of the predicted noise, a scalar.

    Source: Ho et al. 2020, equation 14, on Kolors' 1100 timesteps.
    """
    predicted = unet(
        batch.noisy_latents, batch.timesteps, encoder_hidden_states=batch.rows, encoder_attention_mask=batch.mask,
        added_cond_kwargs={"text_embeds": batch.pooled, "time_ids": batch.time_ids}, return_dict=False,
    )[0]  # fmt: skip
    errors = F.mse_loss(predicted.float(), batch.noise, reduction="none").mean((1, 2, 3))
    return (errors * batch.weights).mean()


def build_optimizer(parameters: Sequence[nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """Makes the optimizer that the options name.

    Raises:
        TrainingError: its package is missing.
    """
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    match options.optimizer:
        case "adamw8bit":
            return import_bitsandbytes("optimizer adamw8bit").optim.AdamW8bit(parameters, **settings)
        case "prodigy":
            try:
                from prodigyopt import Prodigy
            except ImportError as error:
                raise TrainingError("optimizer prodigy needs prodigyopt. Install it: pip install prodigyopt") from error
            return Prodigy(parameters, **settings, use_bias_correction=True, safeguard_warmup=True)
    return torch.optim.AdamW(parameters, **settings, fused=parameters[0].device.type in ("cpu", "cuda"))


# ---- before the first step ----


def check_place(place: Place, num_parameters: int = 0) -> None:
    """Checks that a run's files can be written.

    Args:
        place: the files.
        num_parameters: that will be trained.

    Raises:
        TrainingError: the folder cannot be made or written to, or the disk is too full.
    """
    try:
        place.checkpoints.mkdir(parents=True, exist_ok=True)
        probe = place.folder / f".write-test-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise TrainingError(
            f"{place.folder} cannot be written to ({error.strerror or error}). Choose another output folder."
        ) from error
    needed = num_parameters * _SPACE_FACTOR * 4
    free = shutil.disk_usage(place.folder).free
    if free < needed + 2**20:
        raise TrainingError(
            f"{place.folder} has {free / 1e9:.2f} GB of free disk space; checkpoints and the LoRA need about "
            f"{needed / 1e9:.2f} GB. Free some, choose another output folder, or lower the rank."
        )


def build_accelerator(options: TrainingOptions, device: torch.device) -> Accelerator:
    """Makes accelerate's object for one run, set up for several processes as accelerate's own configuration says.

    Raises:
        TrainingError: the configuration is one that does not work here; see ``set_sharding_``.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    mixed_precision = {"16-mixed": "fp16", "bf16": "bf16", "32": "no"}[get_precision(options, device)]
    if AcceleratorState._shared_state and "WORLD_SIZE" not in os.environ:
        # A host trains again and again in one process, perhaps in another precision, which accelerate refuses.
        AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        mixed_precision=mixed_precision, cpu=device.type == "cpu", device_placement=False,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
    )  # fmt: skip
    set_sharding_(accelerator, options)
    return accelerator


def get_settings(digest: str, options: TrainingOptions, num_processes: int) -> dict[str, Any]:
    """Gives what must be the same when a run goes on, as plain values; the UNet's identity comes on top.

    Args:
        digest: of the data.
        options: of the run.
        num_processes: that share a batch.
    """
    settings = asdict(options)
    for name in ("checkpoint_every", "sample_prompts", "sample_steps", "sample_guidance_scale"):
        del settings[name]
    if options.lr_schedule == "constant":  # a longer run begins with the same steps
        del settings["max_train_steps"]
    settings["train_batch_size"] *= num_processes
    return {**settings, "data": digest}


def check_resume(place: Place, options: TrainingOptions, digest: str, *, num_processes: int = 1, resume: str) -> None:
    """Checks before anything is encoded what can be known by then of whether a run can go on.

    Args:
        place: the run's files.
        options: of the run.
        digest: of the data, from ``lora.latents.get_digest``.
        num_processes: that share a batch.
        resume: as in ``find_start``.

    Raises:
        TrainingError: what is there has other settings, or went further than asked for.
    """
    find_start(place, get_settings(digest, options, num_processes), options, resume)


def find_start(place: Place, settings: dict[str, Any], options: TrainingOptions, resume: str) -> Checkpoint | None:
    """Finds the checkpoint that a run goes on from.

    Args:
        place: the run's files.
        settings: of this run.
        options: likewise.
        resume: ``no``: start anew; ``yes``: go on with what is there; ``unfinished``: start anew after a finished run
            of other settings.

    Raises:
        TrainingError: what is there has other settings, or went further than asked for.
    """
    checkpoint = None if resume == "no" else load_newest_checkpoint(place.checkpoints)
    if checkpoint and resume == "unfinished" and checkpoint.step >= checkpoint.total:
        try:
            check_settings(checkpoint, settings, place.folder)
        except TrainingError:
            return None
    if checkpoint:
        check_settings(checkpoint, settings, place.folder)
        if checkpoint.step > options.max_train_steps:
            raise TrainingError(
                f"The run in {place.folder} is at step {checkpoint.step} already, more than the "
                f"{options.max_train_steps} asked for. Ask for more, or start without resuming."
            )
    return checkpoint


# ---- the run ----


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self, unet: UNet2DConditionModel, data: TrainingData, options: TrainingOptions, place: Place, watcher: Watcher,
        device: torch.device, metadata: dict[str, str],
    ):  # fmt: skip
        self.data, self.options, self.place, self.watcher = data, options, place, watcher
        self.metadata = metadata
        self.names: UNetNames = get_unet_names(unet)
        self.accelerator = build_accelerator(options, device)
        self.is_sharded = is_sharded(self.accelerator)
        self.device = self.accelerator.device if self.accelerator.num_processes > 1 else device
        processes = self.accelerator.num_processes
        self.settings = get_settings(data.digest, options, processes)
        self.settings["unet"] = get_identity(unet.state_dict().items())
        self.trainee, self.parameters = build_trainee(unet, options, self.device)
        cells = max(each.latents.shape[2] * each.latents.shape[3] for each in data.samples)
        set_attention_(self.trainee, self.device, cells)
        self.optimizer = build_optimizer(list(self.parameters.values()), options)
        self.order: Order = build_order(
            data.samples, seed=options.seed, batch_size=options.train_batch_size * processes,
            regularization_share=options.regularization_share,
        )  # fmt: skip
        self.alphas_cumprod = build_scheduler("EulerDiscreteScheduler").alphas_cumprod
        self.step = 0
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.smoothed_loss = 0.0
        self.samples: torch.Tensor | None = None
        self.in_inference_mode = False
        self.started = time.monotonic()
        self.first_step = 0

    def prepare(self, start: Checkpoint | None) -> None:
        """Restores a checkpoint and hands model and optimizer to accelerate."""
        if self.is_sharded and self.options.sample_prompts and self.accelerator.is_main_process:
            logger.warning("No sample pictures under FSDP: a UNet in parts draws none. Draw with the LoRA file so far.")
        if start:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(start.weights[name])
            self.step = self.first_step = start.step
            self.smoothed_loss = start.smoothed_loss
        self._restore_log()
        self.model, self.optimizer = self.accelerator.prepare(self.trainee, self.optimizer)
        if self.is_sharded:
            self.parameters = list_trained(self.trainee)  # FSDP puts others in their place
        if start:
            state = dict(start.optimizer)
            self.optimizer.load_state_dict(
                scatter_optimizer_state(state, self.parameters) if self.is_sharded else state
            )
            if start.scaler and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(dict(start.scaler))

    def _restore_log(self) -> None:
        """Cuts the log to the steps that are done; a killed run may have written more, or half a line."""
        kept = []
        if self.step and self.place.log.is_file():
            for line in self.place.log.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                    entry = json.loads(line)
                    if len(kept) < self.step and entry["step"] == len(kept) + 1:
                        kept.append(entry)
        self.losses = [entry["loss"] for entry in kept]
        self.smoothed = [entry["smoothed_loss"] for entry in kept]
        if self.accelerator.is_main_process:
            write_bytes(self.place.log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def take_step(self) -> None:
        """Runs all passes of one step and updates the adapters."""
        options = self.options
        factor = get_learning_rate_factor(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        losses = []
        for index in range(options.gradient_accumulation_steps):
            batch = self._get_batch(self.step * options.gradient_accumulation_steps + index)
            with self.accelerator.accumulate(self.model), self._seeded_dropout(index):
                with self._autocast():
                    loss = get_loss(self.model, batch)
                losses.append(self._check_loss(loss, batch))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and options.max_grad_norm:
                    self.accelerator.clip_grad_norm_(list(self.parameters.values()), options.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        self._log(sum(losses) / len(losses), options.learning_rate * factor)

    def _get_batch(self, number: int) -> Batch:
        """Builds this process' part of a global batch."""
        size, rank = self.options.train_batch_size, self.accelerator.process_index
        indices = self.order.get_batch(number)
        first = rank * size
        chosen = [
            (number * len(indices) + place, self.data.samples[indices[place]]) for place in range(first, first + size)
        ]
        return build_batch(self.data, self.options, chosen, self.alphas_cumprod, self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Computes in the run's precision; accelerate does that itself except under FSDP."""
        dtype = get_compute_dtype(self.options, self.device)
        return torch.autocast(self.device.type, dtype, enabled=self.is_sharded and dtype != torch.float32)

    @contextlib.contextmanager
    def _seeded_dropout(self, index: int) -> Iterator[None]:
        """Seeds torch's own generators for the adapters' dropout, the only thing that draws from them."""
        if not self.options.dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(get_seed(self.options.seed, "dropout", self.step, index, self.accelerator.process_index))
            yield

    def _check_loss(self, loss: torch.Tensor, batch: Batch) -> float:
        """Gives the loss over all processes.

        Raises:
            TrainingError: it is not finite.
        """
        value = float(self.accelerator.reduce(loss.detach(), "mean"))
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss is {value} at step {self.step + 1}, with {', '.join(batch.names)}. Lower the learning rate; "
                "train in bf16 or 32; check these pictures. The last checkpoint is from before."
            )
        return value

    def _log(self, loss: float, learning_rate: float) -> None:
        keep = _SMOOTHING if len(self.losses) >= 50 else len(self.losses) / (len(self.losses) + 1)
        self.smoothed_loss = keep * self.smoothed_loss + (1 - keep) * loss
        self.losses.append(loss)
        self.smoothed.append(self.smoothed_loss)
        speed = (self.step - self.first_step) / max(1e-9, time.monotonic() - self.started)
        report = StepReport(
            step=self.step, total=self.options.max_train_steps, loss=loss, smoothed_loss=self.smoothed_loss,
            learning_rate=learning_rate, steps_per_second=speed,
            seconds_left=(self.options.max_train_steps - self.step) / speed,
        )  # fmt: skip
        self.report = report
        if self.accelerator.is_main_process:
            with open(self.place.log, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report)) + "\n")

    def get_lora(self) -> Lora:
        """Gives the LoRA so far; all processes must call it."""
        metadata = {**self.metadata, "steps": str(self.step)}
        return get_lora(gather(self.parameters), self.names, self.options.alpha, metadata)

    def save(self) -> None:
        """Writes checkpoint, LoRA and plot, in the main process; all must call it."""
        weights = gather({name: parameter.detach() for name, parameter in self.parameters.items()})
        optimizer = gather(self.optimizer.state_dict())
        lora = self.get_lora()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        save_checkpoint(self.place.checkpoints, Checkpoint(
            step=self.step, total=self.options.max_train_steps, smoothed_loss=self.smoothed_loss, scaler=scaler,
            weights=weights, optimizer=optimizer, settings=self.settings,
        ))  # fmt: skip
        save_lora(lora, self.place.lora, DIFFUSERS)
        if self.losses:
            draw_loss(self.losses, self.smoothed, self.step - len(self.losses) + 1).save(self.place.plot)

    @torch.no_grad()
    def draw_samples(self) -> None:
        """Draws the sample prompts with the LoRA so far, into files and to the watcher."""
        if not (self.options.sample_prompts and self.watcher.decode and self.accelerator.is_main_process):
            return
        if self.is_sharded:
            return  # told before training; a forward pass needs all processes
        height, width = (VAE_SCALE_FACTOR * side for side in self.data.samples[0].latents.shape[2:])
        pictures = []
        self.trainee.eval()
        for index, prompt in enumerate(self.options.sample_prompts):
            options = SamplingOptions(
                num_inference_steps=self.options.sample_steps, guidance_scale=self.options.sample_guidance_scale,
                height=height, width=width, seed=(self.options.seed + index) % 2**64,
            )  # fmt: skip
            embeds = get_prompt_embeds(self.data.captions[prompt], self.data.captions[""])
            latents = sample(self.trainee, embeds, options, noise_device="cpu")
            with torch.inference_mode(self.in_inference_mode):  # a host moves its VAE in the mode that made it
                pictures.append(self.watcher.decode(latents.float() / SCALING_FACTOR))
        self.trainee.train()
        self.samples = torch.cat([picture.cpu() for picture in pictures])
        self._write_samples()
        if self.watcher.on_samples:
            self.watcher.on_samples(self.step, self.samples)

    def _write_samples(self) -> None:
        from PIL import Image

        self.place.samples.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(self.samples):
            pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).save(self.place.samples / f"step-{self.step:06}-{index}.png")

    def should_stop(self) -> bool:
        """Tells whether any process was asked to stop."""
        wish = bool(self.watcher.should_stop and self.watcher.should_stop())
        if self.accelerator.num_processes == 1:
            return wish
        return bool(self.accelerator.reduce(torch.tensor(float(wish), device=self.device), "sum"))

    def loop(self) -> None:
        """Takes steps until the end or a stop; saves on the way and at the end."""
        while self.step < self.options.max_train_steps:
            self.take_step()
            try:
                if self.watcher.on_step and self.accelerator.is_main_process:
                    self.watcher.on_step(self.report)
                is_due = self.step % self.options.checkpoint_every == 0 or self.step == self.options.max_train_steps
                if is_due:
                    self.save()
                    self.draw_samples()
            except BaseException:
                # A watcher that raises, as ComfyUI's progress does on Cancel, leaves a run that can go on.
                if not self.is_sharded:  # saving takes all processes, and the others do not know
                    self.save()
                raise
            if self.should_stop():
                self.save()
                return


def train(
    unet: UNet2DConditionModel, data: TrainingData, options: TrainingOptions, *, place: Place,
    device: torch.device | str, watcher: Watcher | None = None, resume: str = "no",
    metadata: dict[str, str] | None = None,
) -> TrainingResult:  # fmt: skip
    """Trains a LoRA.

    Args:
        unet: the base; not changed. Made in inference mode or not.
        data: from ``lora.latents``.
        options: how.
        place: where checkpoints, samples, log, plot and the LoRA go.
        device: where to train; several processes take accelerate's.
        watcher: who is told, and may stop the run.
        resume: ``no``, ``yes`` or ``unfinished``; see ``find_start``.
        metadata: for the LoRA's header.

    Raises:
        TrainingError: before the first step, what is wrong with settings, folder or checkpoint; later, a loss that is
            not finite, or too little memory.
    """
    in_inference_mode = torch.is_inference_mode_enabled()
    # ComfyUI runs nodes in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        check_place(place)
        header = {"seed": str(options.seed), **(metadata or {})}
        if unet.config.block_out_channels == KOLORS_UNET_CONFIG["block_out_channels"]:
            header.setdefault("base_model", "Kwai-Kolors/Kolors")
        run = _Run(unet, data, options, place, watcher or Watcher(), torch.device(device), header)
        run.in_inference_mode = in_inference_mode
        check_place(place, sum(parameter.numel() for parameter in run.parameters.values()))
        start = find_start(place, run.settings, options, resume)
        if run.accelerator.is_main_process:
            remove_parts(place.checkpoints)
            remove_parts(place.lora.parent)
            if not start:
                remove_checkpoints(place.checkpoints)
        run.prepare(start)
        try:
            run.loop()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise TrainingError(describe_memory(options, data, run.device)) from error
        run.accelerator.wait_for_everyone()
        if start and run.step == start.step:
            run.save()  # nothing was left to do; the LoRA may be missing
        return TrainingResult(
            lora=run.get_lora(), step=run.step, losses=tuple(run.losses), smoothed_losses=tuple(run.smoothed),
            samples=run.samples,
        )  # fmt: skip


def describe_memory(options: TrainingOptions, data: TrainingData, device: torch.device) -> str:
    """Says what there was too little of, and what to lower."""
    use = ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        use = f": {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB are in use"
    height, width = (VAE_SCALE_FACTOR * max(each.latents.shape[side] for each in data.samples) for side in (2, 3))
    wishes = [f"the batch size ({options.train_batch_size})"] if options.train_batch_size > 1 else []
    wishes += ["turn on gradient checkpointing"] if not options.gradient_checkpointing else []
    wishes += [f"the resolution ({width}x{height})"]
    if options.base_precision not in ("4bit", "8bit"):
        wishes += ["hold the base in 4bit or 8bit"]
    wishes += [f"the rank ({options.rank})"]
    return (
        f"Out of memory on {device}{use}. Lower, or change, in this order: {'; '.join(wishes)}. The last checkpoint "
        "stays, but needs the same settings."
    )
