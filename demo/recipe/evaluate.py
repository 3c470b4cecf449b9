"""Judges the bundled model: does it draw what captions say? Run `python -m kolors_nodes.demo.recipe.evaluate`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from ...kolors.prompts import encode_prompts
from ...kolors.sampling import SamplingOptions, sample
from ...kolors.text_encoder import TextEncoder, find_tokenizer, load_text_encoder
from ...kolors.tokenizer import Tokenizer
from ...kolors.unet import load_unet
from ...kolors.vae import SCALING_FACTOR, VAE, load_vae
from .captions import HELD_OUT, LANGUAGES, SEEN, Combination, get_captions
from .classifier import CLASSES, Classifier, draw_judged_picture, load_classifier
from .shapes import BACKGROUNDS, COLOURS, RESOLUTION, SHAPES, Placement, draw_placement, render, render_mask
from .vae import to_tensor

MODEL_FOLDER = Path(__file__).parents[1] / "kolors-shapes"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is drawn and judged: `prompts` per group, each with `seeds` seeds, at every guidance scale."""

    prompts: int = 24
    seeds: int = 4
    num_inference_steps: int = 25
    guidance_scales: tuple[float, ...] = (3.0, 5.0)
    scheduler: str = "EulerDiscreteScheduler"


@dataclass(frozen=True)
class DemoModel:
    """The bundled model's parts, on the CPU in float32."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet2DConditionModel
    vae: VAE

    def draw(self, prompts: list[str], seed: int, guidance_scale: float, options: EvaluationOptions) -> torch.Tensor:
        """Draws one picture per prompt, (B, H, W, 3) in [0, 1]; the noise is drawn for the batch as a whole."""
        embeds = encode_prompts(self.text_encoder, self.tokenizer, prompts, [""] * len(prompts))
        latents = sample(
            self.unet,
            embeds,
            SamplingOptions(
                num_inference_steps=options.num_inference_steps,
                guidance_scale=guidance_scale,
                scheduler=options.scheduler,
                height=RESOLUTION,
                width=RESOLUTION,
                seed=seed,
            ),
        )
        return self.vae.decode(latents / SCALING_FACTOR)


def load_demo_model(folder: Path = MODEL_FOLDER) -> DemoModel:
    """Reads the model as the nodes do."""
    return DemoModel(
        tokenizer=Tokenizer(find_tokenizer(folder)),
        text_encoder=load_text_encoder(folder / "text_encoder", precision="fp32"),
        unet=load_unet(folder / "unet"),
        vae=load_vae(folder / "vae"),
    )


def choose_prompts(
    combinations: tuple[Combination, ...], language: str, count: int, rng: np.random.Generator
) -> list[tuple[str, Combination]]:
    """Chooses `count` different prompts, spread evenly over combinations, in random phrasings."""
    chosen: dict[str, Combination] = {}
    while len(chosen) < count:
        for index in rng.permutation(len(combinations)):
            captions = get_captions(combinations[index], language)
            if len(chosen) < count:
                chosen[captions[rng.integers(len(captions))]] = combinations[index]
    return list(chosen.items())


@cache
def get_templates(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shape at every diameter from 48 to 124 pixels: areas (N,) and 2-d spectra (N, H, W / 2 + 1)."""
    masks = np.stack([render_mask(shape, Placement(diameter=d)) >= 0.5 for d in np.arange(48.0, 125.0, 2.0)])
    return masks.sum((1, 2)), np.fft.rfft2(masks)


def get_overlap(picture: np.ndarray, combination: Combination) -> float:
    """Returns the IoU of the drawn shape with the ideal one.

    Drawn is every pixel that is nearer to the named colour than to the named background. Ideal is the rendered
    shape at the position (whole pixels) and diameter (2 pixel steps) where it overlaps the drawn one best: the
    prompt leaves both open. Stray pixels and holes count against it, and so does any wrong colour.

    Args:
        picture: (H, W, 3) in [0, 255].
        combination: what the prompt named.
    """
    colour = np.square(picture - np.array(COLOURS[combination.colour])).sum(2)
    background = np.square(picture - np.array(BACKGROUNDS[combination.background])).sum(2)
    drawn = (colour < background).astype(np.float64)  # (H, W)
    areas, spectra = get_templates(combination.shape)
    # The correlation theorem gives the intersection with each template at all shifts at once.
    shifted = np.fft.irfft2(np.fft.rfft2(drawn) * spectra.conj(), s=drawn.shape)  # (N, H, W)
    intersection = shifted.max((1, 2))
    return float((intersection / (areas + drawn.sum() - intersection)).max())


def judge(pictures: torch.Tensor, combinations: list[Combination], classifier: Classifier) -> list[dict[str, float]]:
    """Scores pictures (B, H, W, 3) in [0, 1]: 0 or 1 per attribute, all three, and the overlap."""
    read = classifier.read(pictures.movedim(-1, 1) * 2 - 1)
    scores = []
    for picture, combination, names in zip(pictures.numpy(), combinations, read, strict=True):
        score = {name: float(names[name] == value) for name, value in asdict(combination).items()}
        score["all"] = min(score.values())
        score["iou"] = get_overlap(picture * 255, combination)
        scores.append(score)
    return scores


def get_classifier_accuracy(classifier: Classifier, count: int = 2000, seed: int = 1234) -> dict[str, float]:
    """Measures the judge on rendered pictures: "named" ones as the model is taught, and ones with anything else.

    Returns:
        The share of pictures read right in all three attributes ("named"), and per attribute over pictures of
        which many show a shape, colour or background without a name ("with others: …").
    """
    rng = np.random.default_rng(seed)
    named = [
        Combination(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), str(rng.choice(list(BACKGROUNDS))))
        for _ in range(count)
    ]
    pictures = to_tensor([render(c.shape, c.colour, c.background, draw_placement(rng)) for c in named])
    read = [names for part in pictures.split(250) for names in classifier.read(part)]
    accuracy = {"named": float(np.mean([names == asdict(c) for names, c in zip(read, named, strict=True)]))}
    drawn = [draw_judged_picture(rng) for _ in range(count)]
    pictures = to_tensor([picture for picture, _ in drawn])
    read = [names for part in pictures.split(250) for names in classifier.read(part)]
    for name in CLASSES:
        accuracy[f"with others: {name}"] = float(
            np.mean([names[name] == labels[name] for names, (_, labels) in zip(read, drawn, strict=True)])
        )
    return accuracy


def measure_seconds(model: DemoModel, options: EvaluationOptions, repeats: int = 3) -> float:
    """Returns the median seconds for one picture, prompt to pixels, with guidance."""
    seconds = []
    for seed in range(repeats):
        started = time.perf_counter()
        model.draw(["a red circle on a white background"], seed, 5.0, options)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def evaluate(
    model: DemoModel, classifier: Classifier, options: EvaluationOptions
) -> tuple[list[dict[str, float | str]], list[np.ndarray]]:
    """Draws and judges every group at every guidance scale.

    Returns:
        One row of the table per group and scale, and for each a contact sheet (prompts x seeds).
    """
    rows, sheets = [], []
    for scale in options.guidance_scales:
        for name, combinations in (("seen", SEEN), ("held out", HELD_OUT)):
            for language in LANGUAGES:
                chosen = choose_prompts(combinations, language, options.prompts, np.random.default_rng(7))
                prompts, named = [prompt for prompt, _ in chosen], [combination for _, combination in chosen]
                drawn = [model.draw(prompts, seed, scale, options) for seed in range(options.seeds)]
                scores = [score for pictures in drawn for score in judge(pictures, named, classifier)]
                means = {key: float(np.mean([score[key] for score in scores])) for key in scores[0]}
                rows.append(
                    {
                        "combinations": name,
                        "language": language,
                        "cfg": scale,
                        "pictures": len(scores),
                        **means,
                        "worst_iou": min(score["iou"] for score in scores),
                    }
                )
                grid = torch.stack(drawn).permute(0, 2, 1, 3, 4).reshape(options.seeds * RESOLUTION, -1, 3)
                sheets.append((grid.numpy() * 255).astype(np.uint8))
    return rows, sheets


def format_table(rows: list[dict[str, float | str]]) -> str:
    """Lays the rows out as a table."""
    head = f"{'combinations':<13}{'lang':<6}{'cfg':>4}{'n':>5}{'backgr.':>9}{'colour':>8}{'shape':>8}{'all':>8}"
    lines = [head + f"{'IoU':>8}{'worst':>8}"]
    for row in rows:
        lines.append(
            f"{row['combinations']:<13}{row['language']:<6}{row['cfg']:>4.1f}{row['pictures']:>5}"
            f"{row['background']:>9.3f}{row['colour']:>8.3f}{row['shape']:>8.3f}{row['all']:>8.3f}"
            f"{row['iou']:>8.3f}{row['worst_iou']:>8.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Evaluates and prints; the exit status is 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="python -m kolors_nodes.demo.recipe.evaluate", description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=MODEL_FOLDER, help="folder of the model (default: the bundled one)"
    )
    parser.add_argument("--prompts", type=int, default=EvaluationOptions.prompts, help="prompts per group")
    parser.add_argument("--seeds", type=int, default=EvaluationOptions.seeds, help="pictures per prompt")
    parser.add_argument("--steps", type=int, default=EvaluationOptions.num_inference_steps, help="sampling steps")
    parser.add_argument(
        "--cfg", type=float, nargs="+", default=list(EvaluationOptions.guidance_scales), help="guidance scales"
    )
    parser.add_argument("--scheduler", default=EvaluationOptions.scheduler, help="a name of Kolors' scheduler table")
    parser.add_argument("--sheet", type=Path, help="write all pictures as one PNG: a block of seeds x prompts per row")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    chosen = parser.parse_args(arguments)
    options = EvaluationOptions(
        prompts=chosen.prompts,
        seeds=chosen.seeds,
        num_inference_steps=chosen.steps,
        guidance_scales=tuple(chosen.cfg),
        scheduler=chosen.scheduler,
    )
    model, classifier = load_demo_model(chosen.model), load_classifier()
    accuracy = get_classifier_accuracy(classifier)
    seconds = measure_seconds(model, options)
    rows, sheets = evaluate(model, classifier, options)
    if chosen.sheet:
        Image.fromarray(np.concatenate(sheets)).save(chosen.sheet)
    if chosen.json:
        print(
            json.dumps(
                {"classifier": accuracy, "seconds_per_picture": seconds, "options": asdict(options), "rows": rows},
                indent=2,
            )
        )
        return 0
    print("classifier, read right: " + ", ".join(f"{name} {value:.4f}" for name, value in accuracy.items()))
    print(f"one picture, {options.num_inference_steps} steps: {seconds:.2f} s on {torch.get_num_threads()} threads")
    print(format_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
