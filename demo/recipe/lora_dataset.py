"""A word the bundled model has never drawn, to teach with a LoRA: the pictures, and a judge of what was learned.

`python -m kolors_nodes.demo.recipe.lora_dataset` writes `demo/lora_dataset`; with `--judge LORA.safetensors` it draws
with a LoRA instead and prints how much is drawn right.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .captions import Combination, get_captions
from .shapes import BACKGROUNDS, COLOURS, SHAPES, draw_placement, render

DATASET_FOLDER = Path(__file__).parents[1] / "lora_dataset"
NEW_SHAPE = "cross"
SHOWN_COLOURS = ("red", "green", "blue", "yellow")
UNSHOWN_COLOURS = tuple(colour for colour in COLOURS if colour not in SHOWN_COLOURS)
PICTURES = 16
IOU_FLOOR = 0.7


def choose_captions() -> list[tuple[str, Combination]]:
    """Chooses the captions of the dataset: every shown colour four times, languages and backgrounds in turn."""
    chosen = []
    for index in range(PICTURES):
        colour = SHOWN_COLOURS[index % len(SHOWN_COLOURS)]
        background = list(BACKGROUNDS)[(index + index // len(SHOWN_COLOURS)) % len(BACKGROUNDS)]
        combination = Combination(NEW_SHAPE, colour, background)
        captions = get_captions(combination, ("en", "zh")[index // len(SHOWN_COLOURS) % 2])
        chosen.append((captions[index // 2 % len(captions)], combination))
    return chosen


def write_dataset(folder: Path = DATASET_FOLDER) -> None:
    """Renders the pictures and writes `metadata.csv`; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(16)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_name", "text"])
        for index, (caption, named) in enumerate(choose_captions()):
            picture = render(named.shape, named.colour, named.background, draw_placement(rng))
            name = f"{named.shape}_{index:02}.png"
            Image.fromarray(picture.round().astype(np.uint8)).save(folder / name, optimize=True)
            writer.writerow([name, caption])


def list_regularization_prompts() -> list[str]:
    """Lists prompts of what the model knows: every old shape in every colour, languages and backgrounds in turn."""
    prompts = []
    for index, (shape, colour) in enumerate((shape, colour) for shape in SHAPES for colour in COLOURS):
        background = list(BACKGROUNDS)[(index + index // len(COLOURS)) % len(BACKGROUNDS)]
        captions = get_captions(Combination(shape, colour, background), ("en", "zh")[(index + index // 6) % 2])
        prompts.append(captions[index // 2 % len(captions)])
    return prompts


def choose_new_prompts(colours: tuple[str, ...], count: int = 24) -> list[tuple[str, Combination]]:
    """Chooses different prompts for the new shape, half per language, evenly over colours and backgrounds."""
    chosen: dict[str, Combination] = {}
    index = 0
    while len(chosen) < count:
        colour = colours[index % len(colours)]
        background = list(BACKGROUNDS)[index // len(colours) % len(BACKGROUNDS)]
        combination = Combination(NEW_SHAPE, colour, background)
        captions = get_captions(combination, ("en", "zh")[len(chosen) % 2])
        chosen.setdefault(captions[(index * 7 + 3) % len(captions)], combination)
        index += 1
    return list(chosen.items())


def judge_lora(path: Path | None, seeds: int = 2, guidance_scale: float = 4.0) -> dict[str, float]:
    """Draws the new shape and the old ones with a LoRA (None: without) and gives the shares drawn right.

    Right are colour and background as the classifier reads them, and an IoU of at least 0.7 with the shape; for an
    old shape the classifier must name it, for the new one it must say "other".
    """
    from dataclasses import replace

    from ...lora.apply import apply_loras
    from ...lora.files import load_lora
    from ...lora.names import get_unet_names
    from .captions import SEEN
    from .classifier import load_classifier
    from .evaluate import EvaluationOptions, choose_prompts, get_overlap, load_demo_model
    from .vae import to_tensor

    model, classifier = load_demo_model(), load_classifier()
    if path:
        model = replace(model, unet=apply_loras(model.unet, [(load_lora(path, get_unet_names(model.unet)), 1.0)]))
    rng = np.random.default_rng(9)
    groups = {
        "shown colours": choose_new_prompts(SHOWN_COLOURS),
        "unshown colours": choose_new_prompts(UNSHOWN_COLOURS),
        "old shapes": [*choose_prompts(SEEN, "en", 24, rng), *choose_prompts(SEEN, "zh", 24, rng)],
    }
    scores = {}
    for name, prompts in groups.items():
        right = []
        for seed in range(seeds):
            pictures = model.draw([prompt for prompt, _ in prompts], 100 + seed, guidance_scale, EvaluationOptions())
            pixels = [picture * 255 for picture in pictures.numpy()]
            read = classifier.read(to_tensor(pixels))
            for picture, names, (_, named) in zip(pixels, read, prompts, strict=True):
                shape = named.shape if named.shape in SHAPES else "other"
                right.append(
                    names == {"shape": shape, "colour": named.colour, "background": named.background}
                    and get_overlap(picture, named) >= IOU_FLOOR
                )
        scores[name] = float(np.mean(right))
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Writes the dataset, or judges."""
    parser = argparse.ArgumentParser(prog="python -m kolors_nodes.demo.recipe.lora_dataset", description=__doc__)
    parser.add_argument("--out", type=Path, default=DATASET_FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--judge", metavar="LORA", help="judge a LoRA file, or 'none' for the bare model")
    chosen = parser.parse_args(arguments)
    if chosen.judge:
        print(json.dumps(judge_lora(None if chosen.judge == "none" else Path(chosen.judge)), indent=1))
    else:
        write_dataset(chosen.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
