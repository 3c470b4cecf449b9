"""Makes the bundled LoRAs, a new shape and a style: `python -m kolors_nodes.demo.recipe.loras`.

They are trained as any LoRA is, by `lora/training.py`, on pictures that are rendered here.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from ...kolors.text_encoder import TokenBatch
from ...lora.files import save_lora
from ...lora.formats import Lora
from ...lora.latents import Sample, TrainingData
from ...lora.names import KOHYA
from ...lora.options import TrainingOptions
from ...lora.training import Watcher, get_place, train
from .captions import COMBINATIONS, LANGUAGES, Combination, get_captions
from .evaluate import DemoModel, load_demo_model
from .shapes import BACKGROUNDS, COLOURS, draw_placement, paint, render_mask
from .unet import get_time_ids
from .vae import to_tensor

logger = logging.getLogger(__name__)

LORA_FOLDER = Path(__file__).parents[1] / "loras"
# Convolutions are trained too: with attention alone, shapes stay ragged and colours hardly move. The loss weighs noisy
# timesteps up to 40 times as much as clear ones, because they decide shape and colour.
OPTIONS = TrainingOptions(
    rank=8, alpha=16.0, target_modules=("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "conv1", "conv2"),
    learning_rate=1.5e-3, weight_decay=0.0, lr_schedule="cosine", lr_warmup_steps=20, train_batch_size=24,
    max_train_steps=600, min_snr_gamma=0.025, gradient_checkpointing=False, precision="32", seed=5,
    checkpoint_every=10_000,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a LoRA is taught.

    Attributes:
        combinations: of the new pictures.
        pictures: how many new ones.
        old_pictures: of what the model knows already; they fill half of each batch, so that it is kept. 0: none.
        whiteness: how much white is mixed into the shapes' colours of the new pictures, 0 to 1.
    """

    combinations: tuple[Combination, ...]
    pictures: int = 144
    old_pictures: int = 144
    whiteness: float = 0.0


# "Heart" is a word that the UNet was never shown and the text encoder knows; the style needs no word.
CONCEPTS = {
    "heart": Concept(combinations=tuple(Combination("heart", *names) for names in product(COLOURS, BACKGROUNDS))),
    "pastel": Concept(combinations=COMBINATIONS, pictures=288, old_pictures=0, whiteness=0.5),
}


def prepare_data(model: DemoModel, concept: Concept) -> TrainingData:
    """Renders and encodes new pictures and old ones, each with a caption in every language."""
    rng = np.random.default_rng(OPTIONS.seed)
    samples = [
        *build_samples(model, concept.combinations, concept.pictures, rng, whiteness=concept.whiteness),
        *build_samples(model, COMBINATIONS, concept.old_pictures, rng, is_regularization=True),
    ]
    captions = sorted({sample.caption for sample in samples})
    ids = [model.tokenizer.encode(caption) for caption in captions]
    with torch.no_grad():
        texts = model.text_encoder.encode_texts(TokenBatch.from_ids(ids, model.tokenizer.pad_token_id))
    return TrainingData(samples=tuple(samples), captions=dict(zip(captions, texts, strict=True)), digest="rendered")


@torch.no_grad()
def build_samples(
    model: DemoModel, combinations: Sequence[Combination], count: int, rng: np.random.Generator, *,
    whiteness: float = 0.0, is_regularization: bool = False,
) -> list[Sample]:  # fmt: skip
    """Renders pictures of combinations in turn, and encodes them."""
    samples = []
    for index in range(count):
        combination = combinations[index % len(combinations)]
        mask = render_mask(combination.shape, draw_placement(rng))
        colour = tuple(value + whiteness * (255 - value) for value in COLOURS[combination.colour])
        picture = to_tensor([paint(mask, colour, BACKGROUNDS[combination.background])])
        autoencoder = model.vae.autoencoder
        latents = autoencoder.encode(picture).latent_dist.mean * autoencoder.config.scaling_factor
        for language in LANGUAGES:
            captions = get_captions(combination, language)
            samples.append(Sample(
                name=str(combination), caption=captions[index // len(combinations) % len(captions)], latents=latents,
                time_ids=get_time_ids(1), is_regularization=is_regularization,
            ))  # fmt: skip
    return samples


def train_lora(model: DemoModel, concept: Concept) -> Lora:
    """Trains a LoRA, in float32, and gives it in float16, which halves the file."""
    watcher = Watcher(on_step=lambda report: report.step % 50 or logger.info("%s", report.describe()))
    with tempfile.TemporaryDirectory() as folder:
        place = get_place(Path(folder), "lora")
        data = prepare_data(model, concept)
        lora = train(model.unet, data, OPTIONS, place=place, device="cpu", watcher=watcher).lora
    adapters = {
        name: replace(adapter, down=adapter.down.half(), up=adapter.up.half())
        for name, adapter in lora.adapters.items()
    }
    return replace(lora, adapters=adapters)


def main(arguments: list[str] | None = None) -> int:
    """Trains the LoRAs and writes them."""
    parser = argparse.ArgumentParser(prog="python -m kolors_nodes.demo.recipe.loras", description=__doc__)
    parser.add_argument("--out", type=Path, default=LORA_FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--only", choices=CONCEPTS, help="train this one only")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = load_demo_model()
    for name in [chosen.only] if chosen.only else CONCEPTS:
        lora = train_lora(model, CONCEPTS[name])
        metadata = {
            "base_model": "kolors-shapes",
            "concept": name,
            "learning_rate": f"{OPTIONS.learning_rate:g}",
        }
        logger.info("wrote %s", save_lora(lora, chosen.out / f"{name}.safetensors", KOHYA, metadata=metadata))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
