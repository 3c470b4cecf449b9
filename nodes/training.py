"""Nodes that train a LoRA: the dataset, the rarer options, the training itself."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..lora.options import (
    BASE_PRECISIONS,
    INITIALISATIONS,
    LEARNING_RATE_SCHEDULES,
    OPTIMIZERS,
    PRECISIONS,
    DatasetOptions,
    TrainingOptions,
)
from .host import Host, get_host
from .models import DEMO, ChatGLM3Model, KolorsModel

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ..lora.dataset import Dataset
    from ..lora.formats import Lora
    from ..lora.latents import Encoders, TrainingData
    from ..lora.training import Place, Watcher

DEMO_DATASET = Path(__file__).parent.parent / "demo" / "lora_dataset"
PICTURES = DatasetOptions()
DEFAULTS = TrainingOptions()
AUTOMATIC = "as precision"
FOLDER = "kolors_training"
_MANY = 1_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Socket KOLORS_TRAIN_OPTIONS: what the training node has no widget for.

    Attributes:
        training: its rank, alpha, steps, rate, batch, seed and prompts are the training node's.
        regularization_prompts: of pictures that the base model draws itself.
        regularization_count: of these.
        resume: go on with a run of this name that was stopped.
    """

    training: TrainingOptions = DEFAULTS
    regularization_prompts: tuple[str, ...] = ()
    regularization_count: int = 50
    resume: bool = True


class KolorsLoraDataset:
    """Reads a folder of pictures with captions."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": ("STRING", {"default": DEMO, "tooltip": "An absolute path, a folder in ComfyUI's input "
                           f"folder, or {DEMO!r}. Captions: metadata.csv or metadata.jsonl (file_name, text), or a "
                           ".txt file beside each picture."}),
            },
            "optional": {
                "regularization_folder": ("STRING", {"default": "", "advanced": True, "tooltip": "A second folder, of "
                                          "what the model shall not forget; mixed in. Empty for none."}),
                "caption": ("STRING", {"default": PICTURES.caption, "tooltip": "For pictures that have none."}),
                "center_crop": ("BOOLEAN", {"default": PICTURES.center_crop, "tooltip": "Crop the middle of each "
                                "picture; off: random places."}),
                "random_flip": ("BOOLEAN", {"default": PICTURES.random_flip, "tooltip": "Train on mirror images too. "
                                "Not for what has a left and a right, such as writing."}),
                "buckets": ("BOOLEAN", {"default": PICTURES.buckets, "tooltip": "Keep aspect ratios: sizes of about "
                            "resolution x resolution pixels, from 1:2 to 2:1."}),
                "crops": ("INT", {"default": PICTURES.crops, "min": 1, "max": 64, "advanced": True, "tooltip": "Random "
                          "places for each picture, 1 to 64. Each is encoded once."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("KOLORS_DATASET", "IMAGE", "STRING")
    RETURN_NAMES = ("dataset", "contact_sheet", "report")
    OUTPUT_TOOLTIPS = ("The pictures, for Kolors Train LoRA.", "The pictures in small.", "What was found.")
    FUNCTION = "read"
    CATEGORY = "Kolors/training"
    DESCRIPTION = "Reads and checks a folder of pictures with captions to train on."
    SEARCH_ALIASES = ["training images", "load dataset", "captions", "image folder", "可图"]

    @classmethod
    def VALIDATE_INPUTS(cls, folder: str, regularization_folder: str = "") -> bool | str:
        try:
            for name in (folder, regularization_folder):
                if name:  # None comes from a link
                    resolve_folder(get_host(), name)
        except (FileNotFoundError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(
        cls, folder: str, regularization_folder: str = "", caption: str = PICTURES.caption,
        center_crop: bool = PICTURES.center_crop, random_flip: bool = PICTURES.random_flip,
        buckets: bool = PICTURES.buckets, crops: int = PICTURES.crops,
    ) -> str:  # fmt: skip
        return get_stamp([resolve_folder(get_host(), name) for name in (folder, regularization_folder) if name])

    def read(
        self, folder: str, regularization_folder: str = "", caption: str = PICTURES.caption,
        center_crop: bool = PICTURES.center_crop, random_flip: bool = PICTURES.random_flip,
        buckets: bool = PICTURES.buckets, crops: int = PICTURES.crops,
    ) -> tuple[Dataset, torch.Tensor, str]:  # fmt: skip
        import torch

        from ..lora.dataset import describe_dataset, draw_contact_sheet, read_dataset

        host = get_host()
        options = DatasetOptions(
            caption=caption, center_crop=center_crop, random_flip=random_flip, buckets=buckets, crops=crops
        )
        dataset = read_dataset(resolve_folder(host, folder), options)
        if regularization_folder:
            dataset = dataset.with_regularization(read_dataset(resolve_folder(host, regularization_folder), options))
        return dataset, torch.from_numpy(draw_contact_sheet(dataset)[None]), describe_dataset(dataset)


class KolorsTrainOptions:
    """Sets the rarer options of training."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "optimizer": (list(OPTIMIZERS), {"default": DEFAULTS.optimizer, "tooltip": "adamw8bit needs "
                              "bitsandbytes. prodigy finds its own learning rate: set learning_rate to 1."}),
                "lr_schedule": (list(LEARNING_RATE_SCHEDULES), {"default": DEFAULTS.lr_schedule,
                                "tooltip": "Course of the learning rate after the warm-up."}),
                "lr_warmup_steps": ("INT", {"default": DEFAULTS.lr_warmup_steps, "min": 0, "max": 100000,
                                    "tooltip": "Steps in which the learning rate rises from 0."}),
                "weight_decay": ("FLOAT", {"default": DEFAULTS.weight_decay, "min": 0.0, "max": 10.0, "step": 0.001,
                                 "tooltip": "Pull of the weights to 0, 0 to 10."}),
                "max_grad_norm": ("FLOAT", {"default": DEFAULTS.max_grad_norm, "min": 0.0, "max": 1000.0, "step": 0.1,
                                  "tooltip": "Longer gradients are cut to this length; 0: never."}),
                "gradient_accumulation_steps": ("INT", {"default": DEFAULTS.gradient_accumulation_steps, "min": 1,
                                                "max": 1024, "tooltip": "Batches for each step: a larger batch "
                                                "without more memory."}),
                "gradient_checkpointing": ("BOOLEAN", {"default": DEFAULTS.gradient_checkpointing, "tooltip": "Much "
                                           "less memory, a third more time."}),
                "precision": (list(PRECISIONS), {"default": DEFAULTS.precision, "tooltip": "Of the arithmetic. On a "
                              "CPU 16-mixed becomes 32."}),
                "base_precision": ([AUTOMATIC, *BASE_PRECISIONS], {"default": AUTOMATIC, "tooltip": "Of the frozen "
                                   "UNet. 4bit and 8bit need bitsandbytes and the least memory."}),
                "dropout": ("FLOAT", {"default": DEFAULTS.dropout, "min": 0.0, "max": 0.99, "step": 0.01,
                            "tooltip": "Of the LoRA's input, against learning by heart, 0 to 0.99."}),
                "init_lora_weights": (list(INITIALISATIONS), {"default": DEFAULTS.init_lora_weights,
                                      "tooltip": "How the LoRA's down matrices start."}),
                "target_modules": ("STRING", {"default": ", ".join(DEFAULTS.target_modules), "tooltip": "Ends of the "
                                   "names of the modules that are trained, with commas."}),
                "min_snr_gamma": ("FLOAT", {"default": DEFAULTS.min_snr_gamma, "min": 0.0, "max": 100.0, "step": 0.01,
                                  "tooltip": "Cap of the weight of low noise, usually 5; 0: none."}),
                "noise_offset": ("FLOAT", {"default": DEFAULTS.noise_offset, **share, "tooltip": "For very dark and "
                                 "very bright pictures, usually 0.05; 0: none."}),
                "caption_dropout": ("FLOAT", {"default": DEFAULTS.caption_dropout, **share, "tooltip": "Share of "
                                    "samples without caption, 0 to 1."}),
                "regularization_share": ("FLOAT", {"default": DEFAULTS.regularization_share, **share, "tooltip":
                                         "Share of samples that keep what the model knew, where there are any."}),
                "regularization_prompts": ("STRING", {"default": "", "multiline": True, "tooltip": "One on a line: "
                                           "the base model draws pictures of them before training, and they are "
                                           "mixed in so that it does not forget them. Empty for none."}),
                "regularization_count": ("INT", {"default": TrainOptions.regularization_count, "min": 1, "max": 10000,
                                         "tooltip": "How many it draws in all."}),
                "checkpoint_every": ("INT", {"default": DEFAULTS.checkpoint_every, "min": 1, "max": 100000,
                                     "tooltip": "Steps between checkpoints with sample pictures."}),
                "sample_steps": ("INT", {"default": DEFAULTS.sample_steps, "min": 1, "max": 200, "tooltip": "Sampling "
                                 "steps of sample and regularisation pictures."}),
                "sample_cfg": ("FLOAT", {"default": DEFAULTS.sample_guidance_scale, "min": 0.0, "max": 20.0,
                               "step": 0.1, "tooltip": "cfg of sample and regularisation pictures."}),
                "resume": ("BOOLEAN", {"default": True, "tooltip": "Go on with a run of this name that was "
                           "stopped; off: start anew."}),
            }
        }  # fmt: skip

    RETURN_TYPES = ("KOLORS_TRAIN_OPTIONS",)
    RETURN_NAMES = ("options",)
    OUTPUT_TOOLTIPS = ("For Kolors Train LoRA.",)
    FUNCTION = "build"
    CATEGORY = "Kolors/training"
    DESCRIPTION = "Options of training that are changed less often."
    SEARCH_ALIASES = ["training settings", "optimizer", "prodigy", "可图"]

    def build(
        self, optimizer: str, lr_schedule: str, lr_warmup_steps: int, weight_decay: float, max_grad_norm: float,
        gradient_accumulation_steps: int, gradient_checkpointing: bool, precision: str, base_precision: str,
        dropout: float, init_lora_weights: str, target_modules: str, min_snr_gamma: float, noise_offset: float,
        caption_dropout: float, regularization_share: float, regularization_prompts: str, regularization_count: int,
        checkpoint_every: int, sample_steps: int, sample_cfg: float, resume: bool,
    ) -> tuple[TrainOptions]:  # fmt: skip
        training = TrainingOptions(
            optimizer=optimizer, lr_schedule=lr_schedule, lr_warmup_steps=lr_warmup_steps, weight_decay=weight_decay,
            max_grad_norm=max_grad_norm, gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_checkpointing=gradient_checkpointing, precision=precision,
            base_precision="" if base_precision == AUTOMATIC else base_precision, dropout=dropout,
            init_lora_weights=init_lora_weights, min_snr_gamma=min_snr_gamma, noise_offset=noise_offset,
            target_modules=tuple(name.strip() for name in target_modules.split(",")),
            caption_dropout=caption_dropout, regularization_share=regularization_share,
            checkpoint_every=checkpoint_every, sample_steps=sample_steps, sample_guidance_scale=sample_cfg,
            max_train_steps=_MANY,
        )  # fmt: skip
        prompts = split_lines(regularization_prompts)
        options = TrainOptions(
            training=training, regularization_prompts=prompts, regularization_count=regularization_count, resume=resume
        )
        return (options,)


class KolorsTrainLora:
    """Trains a LoRA."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kolors_model": ("KOLORSMODEL", {"tooltip": "The model to train on; it is not changed."}),
                "chatglm3_model": ("CHATGLM3MODEL", {"tooltip": "The text encoder, for the captions."}),
                "vae": ("VAE", {"tooltip": "The VAE, for the pictures."}),
                "dataset": ("KOLORS_DATASET", {"tooltip": "From Kolors LoRA Dataset."}),
                "name": ("STRING", {"default": "my_lora", "tooltip": "Of the run: its checkpoints are kept under this "
                         f"name in {FOLDER} in the output folder. A plain name without folders."}),
                "rank": ("INT", {"default": DEFAULTS.rank, "min": 1, "max": 1024, "tooltip": "Size of the LoRA, 1 to "
                         "1024. 4 for a simple object, 16 to 64 for a style."}),
                "alpha": ("FLOAT", {"default": DEFAULTS.alpha, "min": 0.01, "max": 1024.0, "step": 0.01,
                          "tooltip": "Strength in training: alpha / rank. Usually the rank, or half of it."}),
                "steps": ("INT", {"default": DEFAULTS.max_train_steps, "min": 1, "max": _MANY, "tooltip": "Training "
                          "steps in all."}),
                "learning_rate": ("FLOAT", {"default": DEFAULTS.learning_rate, "min": 1e-7, "max": 10.0, "step": 1e-5,
                                  "round": False, "tooltip": "Usually 0.0001; 1 with prodigy."}),
                "batch_size": ("INT", {"default": DEFAULTS.train_batch_size, "min": 1, "max": 256, "tooltip":
                               "Pictures at once, 1 to 256."}),
                "resolution": ("INT", {"default": PICTURES.width, "min": 64, "max": 2048, "step": 8, "tooltip": "Side "
                               "in pixels, 64 to 2048, a multiple of 8. Kolors is at home at 1024."}),
                "seed": ("INT", {"default": DEFAULTS.seed, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "Decides "
                         "everything random, 0 to 2^64 - 1."}),
                "sample_prompts": ("STRING", {"default": "", "multiline": True, "tooltip": "One on a line: drawn at "
                                   "every checkpoint, with the LoRA so far."}),
            },
            "optional": {
                "options": ("KOLORS_TRAIN_OPTIONS", {"tooltip": "From Kolors Train Options."}),
            },
        }  # fmt: skip

    RETURN_TYPES = ("KOLORS_LORA", "KOLORSMODEL", "IMAGE", "IMAGE")
    RETURN_NAMES = ("lora", "kolors_model", "loss_plot", "samples")
    OUTPUT_TOOLTIPS = (
        "The LoRA, for Kolors Save LoRA.", "The model with it.", "The loss over the steps.",
        "The last sample pictures; black where there are no sample prompts.",
    )  # fmt: skip
    FUNCTION = "train"
    CATEGORY = "Kolors/training"
    DESCRIPTION = "Trains a LoRA. Cancel leaves a run that goes on where it stopped when queued again."
    SEARCH_ALIASES = ["lora training", "train kolors", "dreambooth", "fine-tune", "可图"]

    def train(
        self, kolors_model: KolorsModel, chatglm3_model: ChatGLM3Model, vae: Any, dataset: Dataset, name: str,
        rank: int, alpha: float, steps: int, learning_rate: float, batch_size: int, resolution: int, seed: int,
        sample_prompts: str, options: TrainOptions | None = None,
    ) -> tuple[Lora, KolorsModel, torch.Tensor, torch.Tensor]:  # fmt: skip
        import torch

        from ..lora.training import check_place, get_place, train

        host, options = get_host(), options or TrainOptions()
        training = replace(
            options.training, rank=rank, alpha=alpha, max_train_steps=steps, learning_rate=learning_rate,
            train_batch_size=batch_size, seed=seed, sample_prompts=split_lines(sample_prompts),
        )  # fmt: skip
        dataset = replace(dataset, options=replace(dataset.options, width=resolution, height=resolution))
        place = get_place(host.get_output_folder() / FOLDER, name)
        check_place(place)
        data = prepare(host, kolors_model, chatglm3_model, vae, dataset, replace(options, training=training), place)
        result = train(
            kolors_model.patched_unet, data, training, place=place, device=host.get_device(),
            watcher=build_watcher(host, vae), resume="unfinished" if options.resume else "no",
        )  # fmt: skip
        samples = torch.zeros(1, 64, 64, 3) if result.samples is None else result.samples.float()
        return result.lora, kolors_model.with_lora(result.lora, 1.0), draw_plot(result), samples


def split_lines(text: str) -> tuple[str, ...]:
    """Gives the lines that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def resolve_folder(host: Host, name: str) -> Path:
    """Gives a dataset's folder: an absolute one, one in the input folder, or the bundled one.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a relative name leads out of the input folder.
    """
    name = name.strip().strip('"')  # Windows copies paths with quotation marks
    if name == DEMO:
        return DEMO_DATASET
    path = Path(name)
    if not path.is_absolute():
        relative = PurePosixPath(name.replace("\\", "/"))
        if not name or ".." in relative.parts or ":" in name:
            raise ValueError(f"The folder {name!r} is empty or outside of {host.get_input_folder()}.")
        path = host.get_input_folder() / relative
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}. Give an absolute path, or a folder in the input folder.")
    return path


def get_stamp(folders: list[Path]) -> str:
    """Says for IS_CHANGED whether the files in folders are still the same."""
    import hashlib

    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((*folder.glob("*"), *folder.glob("train/*"))):
            stat = path.stat()
            digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode())
    return digest.hexdigest()


def prepare(
    host: Host, kolors_model: KolorsModel, chatglm3_model: ChatGLM3Model, vae: Any, dataset: Dataset,
    options: TrainOptions, place: Place,
) -> TrainingData:  # fmt: skip
    """Encodes everything, and makes room for training."""
    from ..kolors.options import SamplingOptions
    from ..lora.dataset import list_enlarged
    from ..lora.latents import Regularization, add_regularization, encode_dataset, get_digest
    from ..lora.training import check_resume

    training, prompts = options.training, options.regularization_prompts
    folder = host.get_output_folder() / FOLDER
    for warning in list_enlarged(dataset):
        logger.warning("%s", warning)
    sampling = SamplingOptions(
        num_inference_steps=training.sample_steps, guidance_scale=training.sample_guidance_scale,
        height=dataset.options.height, width=dataset.options.width, seed=training.seed,
    )  # fmt: skip
    regularization = Regularization(prompts=prompts, count=options.regularization_count, sampling=sampling)

    def report(phase: str, done: int, total: int) -> None:
        host.report_work(done, total, f"{phase} {done}/{total}")

    with ExitStack() as on_device:
        encoders = build_encoders(host, chatglm3_model, vae, on_device)
        digest = get_digest(dataset, encoders, regularization)
        check_resume(place, training, digest, resume="unfinished" if options.resume else "no")
        data = encode_dataset(
            dataset, encoders, other_captions=(*training.sample_prompts, *prompts), seed=training.seed,
            cache=folder / "cache", on_progress=report,
        )  # fmt: skip
    unet = kolors_model.patched_unet
    if prompts:
        with host.on_device(unet, kolors_model, offload=kolors_model.offload):
            data = add_regularization(
                data, regularization, unet, text_identity=encoders.text_identity, cache=folder / "cache",
                on_progress=report,
            )  # fmt: skip
    host.make_room(2 * sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters()))
    return data


def build_encoders(host: Host, chatglm3_model: ChatGLM3Model, vae: Any, on_device: ExitStack) -> Encoders:
    """Says how text encoder and VAE get onto the device; the first leaves it when the second is needed."""
    from ..lora.latents import Encoders, get_identity

    def load_text_encoder() -> Any:
        text_encoder = chatglm3_model.text_encoder
        on_device.enter_context(host.on_device(text_encoder, chatglm3_model))
        return text_encoder

    def load_vae() -> Any:
        on_device.close()
        return vae.encode

    network = getattr(vae, "first_stage_model", None) or vae.autoencoder
    return Encoders(
        tokenizer=chatglm3_model.tokenizer, text_identity=chatglm3_model.identity,
        text_precision=chatglm3_model.arithmetic, load_text_encoder=load_text_encoder,
        vae_identity=get_identity(network.state_dict().items()), load_vae=load_vae,
    )  # fmt: skip


def build_watcher(host: Host, vae: Any) -> Watcher:
    """Connects a training run with the host: progress, text, sample pictures, and Cancel."""
    from ..lora.training import StepReport, Watcher

    latest: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        latest[:] = [report]
        host.report_work(report.step, report.total, report.describe())

    def on_samples(step: int, pictures: torch.Tensor) -> None:
        report = latest[0]
        host.report_work(report.step, report.total, report.describe(), to_strip(pictures))

    return Watcher(on_step=on_step, on_samples=on_samples, decode=vae.decode)


def to_strip(pictures: torch.Tensor) -> Image:
    """Gives pictures (B, H, W, 3) side by side."""
    import torch
    from PIL import Image

    pixels = torch.cat(list(pictures.float().clamp(0, 1).cpu()), dim=1)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def draw_plot(result: Any) -> torch.Tensor:
    """Gives the loss plot as an IMAGE."""
    import numpy as np
    import torch

    from ..lora.plot import draw_loss

    first = result.step - len(result.losses) + 1
    picture = draw_loss(result.losses, result.smoothed_losses, first)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)[None] / 255)
