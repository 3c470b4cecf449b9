"""Makes the demo model from nothing: `python -m kolors_nodes.demo.recipe --out build/kolors-shapes`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ...kolors.text_encoder import load_text_encoder
from ...kolors.tokenizer import Tokenizer
from .captions import HELD_OUT, LANGUAGES, SEEN
from .classifier import ClassifierOptions, load_classifier, save_classifier, train_classifier
from .evaluate import EvaluationOptions, choose_prompts, judge, load_demo_model
from .text_encoder import TextEncoderOptions, save_text_encoder, train_text_encoder
from .tokenizer import train_tokenizer
from .unet import UNetOptions, build_scheduler, fold_time_ids_, prepare_data, train_unet
from .vae import VAEOptions, get_psnr, train_vae

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where the parts are written: the model's folder, the judge beside it, and the UNet's running state."""

    folder: Path
    unet_options: UNetOptions

    @property
    def classifier(self) -> Path:
        """The judge's file; it is no part of the model."""
        return self.folder.parent / "classifier.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The UNet's weights, averages and optimizer state, for going on after a stop."""
        return self.folder.parent / "unet-checkpoint.pt"


def save_half(module: AutoencoderKL | UNet2DConditionModel, folder: Path) -> None:
    """Writes a diffusers module in float16 under the file name that Kolors has."""
    module = copy.deepcopy(module)
    module.register_to_config(_name_or_path=None)  # no machine's path in the file
    module.half().save_pretrained(folder, variant="fp16")


def make_tokenizer(place: Workplace) -> Path:
    """Trains the tokenizer (a second) and writes what else the layout needs."""
    build_scheduler().save_pretrained(place.folder / "scheduler")
    index = {
        "_class_name": "KolorsPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (place.folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    path = place.folder / "tokenizer" / "tokenizer.model"
    train_tokenizer(path)
    return path


def make_text_encoder(place: Workplace) -> None:
    """Trains the text encoder."""
    tokenizer = Tokenizer(place.folder / "tokenizer" / "tokenizer.model")
    save_text_encoder(train_text_encoder(tokenizer, TextEncoderOptions()), tokenizer, place.folder / "text_encoder")


def make_vae(place: Workplace) -> None:
    """Trains the VAE."""
    save_half(train_vae(VAEOptions()), place.folder / "vae")
    logger.info("vae in float16: %.2f dB", get_psnr(load_vae(place), np.random.default_rng(99)))


def load_vae(place: Workplace) -> AutoencoderKL:
    """Reads the VAE back as it was saved, so that later parts are made for exactly those weights."""
    return AutoencoderKL.from_pretrained(place.folder / "vae", variant="fp16", torch_dtype=torch.float32).eval()


def make_classifier(place: Workplace) -> None:
    """Trains the judge."""
    save_classifier(train_classifier(load_vae(place), ClassifierOptions()), place.classifier)


def make_unet(place: Workplace) -> None:
    """Trains the UNet; its average so far is written at every checkpoint."""
    tokenizer = Tokenizer(place.folder / "tokenizer" / "tokenizer.model")
    text_encoder = load_text_encoder(place.folder / "text_encoder", precision="fp32")
    data = prepare_data(load_vae(place), text_encoder, tokenizer, place.unet_options)
    logger.info("%d pictures and %d captions encoded", len(data.latents), len(data.rows))

    def on_checkpoint(unet: UNet2DConditionModel, step: int) -> None:
        unet = copy.deepcopy(unet)
        fold_time_ids_(unet)
        save_half(unet, place.folder / "unet")
        log_progress(place, step)

    train_unet(data, place.unet_options, place.checkpoint, on_checkpoint)


def log_progress(place: Workplace, step: int, prompts: int = 12) -> None:
    """Logs how a few pictures of the model as written now are judged."""
    if not place.classifier.exists():
        return
    model, classifier = load_demo_model(place.folder), load_classifier(place.classifier)
    rng = np.random.default_rng(step)
    chosen = [
        pair
        for combinations in (SEEN, HELD_OUT)
        for language in LANGUAGES
        for pair in choose_prompts(combinations, language, prompts, rng)
    ]
    pictures = model.draw([prompt for prompt, _ in chosen], step, 4.0, EvaluationOptions())
    scores = judge(pictures, [combination for _, combination in chosen], classifier)
    logger.info(
        "unet step %d judged: %s",
        step,
        ", ".join(f"{key} {np.mean([score[key] for score in scores]):.3f}" for key in scores[0]),
    )


# In the order in which they need each other; a part that is there already is kept.
PARTS = {
    "tokenizer": (make_tokenizer, "tokenizer/tokenizer.model"),
    "text_encoder": (make_text_encoder, "text_encoder/model.safetensors"),
    "vae": (make_vae, "vae/diffusion_pytorch_model.fp16.safetensors"),
    "classifier": (make_classifier, "../classifier.safetensors"),
    "unet": (make_unet, None),  # goes on from its checkpoint, and does nothing where that is complete
}


def main(arguments: list[str] | None = None) -> int:
    """Makes every part that is missing."""
    defaults = UNetOptions()
    parser = argparse.ArgumentParser(prog="python -m kolors_nodes.demo.recipe", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/kolors-shapes"),
        help="folder of the model; parts that are there already are kept (default: %(default)s)",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="make these parts only")
    parser.add_argument("--unet-steps", type=int, default=defaults.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile (no C++ compiler)")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = replace(defaults, steps=chosen.unet_steps, compile=not chosen.no_compile)
    place = Workplace(folder=chosen.out, unet_options=options)
    place.folder.mkdir(parents=True, exist_ok=True)
    for name in chosen.parts:
        make, product = PARTS[name]
        if product and (place.folder / product).exists():
            logger.info("%s is there already", name)
        else:
            make(place)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
