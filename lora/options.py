"""How to train, as checked values. Loads no torch: nodes read their widgets' defaults from here."""

from __future__ import annotations

import re
from dataclasses import dataclass

CELL = 8  # pixels; a picture's sides are multiples of one latent cell
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LEARNING_RATE_SCHEDULES = ("constant", "cosine", "linear")
INITIALISATIONS = ("kaiming", "gaussian")
# Precision of a run → the precision of the frozen base where none is asked for.
PRECISIONS = {"16-mixed": "fp16", "bf16": "bf16", "32": "fp32"}
BASE_PRECISIONS = ("fp16", "bf16", "fp32", "8bit", "4bit")
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
MAX_SEED = 2**64 - 1


class TrainingError(ValueError):
    """Training that cannot start or go on. The message says what is wrong, where, and what to do."""


def _check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        expected = f"{low:g} to {high:g}" if high != float("inf") else f"{low:g} or more"
        raise TrainingError(f"{name} is {value}, expected {expected}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainingError(f"{name} is {value!r}. Choose one of: {', '.join(choices)}.")


def check_name(name: str) -> None:
    """Checks that a name can be a file's, on every system, and leads nowhere.

    Raises:
        TrainingError: it is empty, has a slash, a colon or a control character, starts with a dot, ends with a dot or
            a space, or is one of Windows' devices.
    """
    is_plain = re.fullmatch(r"[^./\\:*?\"<>|\x00-\x1f][^/\\:*?\"<>|\x00-\x1f]*(?<![. ])", name)
    if not is_plain or re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE):
        raise TrainingError(
            f"The LoRA's name is {name!r}, expected a plain file name without folders, such as my_style. "
            "The folder is chosen elsewhere."
        )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """How pictures become training samples.

    Attributes:
        width: of the pictures that are trained on, in pixels, a multiple of 8.
        height: likewise.
        center_crop: crop the middle, else random places.
        crops: random places for each picture; each is encoded once, so more need more of the cache.
        random_flip: train on mirror images too.
        buckets: keep each picture's aspect ratio as far as sizes of about width x height pixels allow.
        repeats: how often each picture is shown in one round, against the pictures of other folders.
        caption: for pictures that have none of their own; empty for none.

    Raises:
        TrainingError: a value is out of range.
    """

    width: int = 1024
    height: int = 1024
    center_crop: bool = True
    crops: int = 4
    random_flip: bool = False
    buckets: bool = False
    repeats: int = 1
    caption: str = ""

    def __post_init__(self) -> None:
        for name, size in (("width", self.width), ("height", self.height)):
            if size < 8 * CELL or size % CELL:
                raise TrainingError(
                    f"The {name} is {size} pixels, expected a multiple of {CELL} from {8 * CELL} on. "
                    f"The nearest is {max(8, round(size / CELL)) * CELL}."
                )
        _check_range("crops", self.crops, 1, 64)
        _check_range("repeats", self.repeats, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train.

    Attributes:
        rank: r of the adapters.
        alpha: scale = alpha / rank.
        dropout: of the adapters' input, 0 to below 1.
        target_modules: ends of the names of the modules that get an adapter.
        init_lora_weights: of the down matrices; the up matrices start at zero.
        optimizer: ``adamw``; ``adamw8bit`` (needs bitsandbytes); ``prodigy``, which finds its own learning rate and
            takes ``learning_rate`` as a factor, usually 1.
        learning_rate: peak.
        weight_decay: decoupled.
        lr_schedule: course after the warm-up.
        lr_warmup_steps: steps of linear rise from 0.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        train_batch_size: samples in one pass of one process.
        gradient_accumulation_steps: passes for each step.
        max_train_steps: steps in all.
        gradient_checkpointing: compute activations twice instead of keeping them.
        precision: arithmetic of a pass; adapters and optimizer are float32 always.
        base_precision: how the frozen UNet is held; empty: as ``precision`` has it.
        min_snr_gamma: cap of the signal-to-noise ratio in the loss weight; 0: every timestep weighs the same.
        noise_offset: share of a constant per channel in the noise; 0: none.
        caption_dropout: share of samples that get the empty caption.
        regularization_share: share of samples from regularisation pictures, where there are any.
        seed: governs everything random.
        checkpoint_every: steps between checkpoints; each comes with sample pictures.
        sample_prompts: of the pictures drawn with the LoRA at every checkpoint.
        sample_steps: sampling steps of these.
        sample_guidance_scale: of these.

    Raises:
        TrainingError: a value is out of range, or two do not go together.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = TARGET_MODULES
    init_lora_weights: str = "kaiming"
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    lr_schedule: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float = 1.0
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 500
    gradient_checkpointing: bool = True
    precision: str = "16-mixed"
    base_precision: str = ""
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    regularization_share: float = 0.5
    seed: int = 0
    checkpoint_every: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample_steps: int = 20
    sample_guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        for name in ("rank", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpoint_every"):
            _check_range(name, getattr(self, name), 1)
        for name in ("weight_decay", "lr_warmup_steps", "max_grad_norm", "min_snr_gamma"):
            _check_range(name, getattr(self, name), 0)
        for name in ("noise_offset", "caption_dropout", "regularization_share"):
            _check_range(name, getattr(self, name), 0, 1)
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_range("sample_steps", self.sample_steps, 1, 1100)
        if not 0 <= self.dropout < 1:
            raise TrainingError(f"dropout is {self.dropout}, expected 0 to below 1.")
        for name in ("alpha", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} is {getattr(self, name)}, expected a number above 0.")
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("lr_schedule", self.lr_schedule, LEARNING_RATE_SCHEDULES)
        _check_choice("init_lora_weights", self.init_lora_weights, INITIALISATIONS)
        _check_choice("precision", self.precision, tuple(PRECISIONS))
        _check_choice("base_precision", self.base_precision, ("", *BASE_PRECISIONS))
        if not self.target_modules or not all(self.target_modules):
            raise TrainingError(f"target_modules is {self.target_modules}, expected names such as to_q, to_out.0.")
        if self.precision == "32" and self.base_precision in ("fp16", "bf16"):
            raise TrainingError(
                f"precision 32 does not go with a base in {self.base_precision}: the base would be rounded and then "
                "computed in float32. Choose precision 16-mixed or bf16, or base precision fp32."
            )
        if self.lr_warmup_steps >= self.max_train_steps:
            raise TrainingError(
                f"lr_warmup_steps is {self.lr_warmup_steps}, which leaves nothing of {self.max_train_steps} steps."
            )
