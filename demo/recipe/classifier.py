"""The judge: a small network that reads shape, colour and background off a picture."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from .shapes import (
    BACKGROUNDS,
    COLOURS,
    OTHER_SHAPES,
    RESOLUTION,
    SHAPES,
    Placement,
    degrade,
    draw_placement,
    paint,
    render_mask,
)
from .vae import to_tensor

logger = logging.getLogger(__name__)

CLASSIFIER_PATH = Path(__file__).with_name("classifier.safetensors")
OTHER = "other"
CLASSES = {
    "shape": (*SHAPES, OTHER),
    "colour": (*COLOURS, OTHER),
    "background": (*BACKGROUNDS, OTHER),
}
# A free colour counts as "other" from this distance to every named one on; nearer ones are not drawn.
COLOUR_DISTANCE = 70.0


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """How the classifier is trained."""

    pictures: int = 8000
    steps: int = 900
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 4


class Classifier(nn.Module):
    """Four strided convolutions on the picture at half size, average and maximum, one head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 16, 96)
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns logits (B, classes) per attribute for pictures (B, 3, H, W) in [-1, 1]."""
        x = F.avg_pool2d(pictures, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        x = F.relu(self.hidden(x.flatten(1)))  # (B, 96 * 4 * 4) -> (B, 96)
        return {name: head(x) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> list[dict[str, str]]:
        """Names what pictures (B, 3, H, W) in [-1, 1] show; each attribute may be "other"."""
        indices = {name: logits.argmax(1).tolist() for name, logits in self(pictures).items()}
        return [{name: CLASSES[name][indices[name][row]] for name in CLASSES} for row in range(len(pictures))]


def draw_colour(palette: dict[str, tuple[int, int, int]], rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Draws a named colour or, one time in six, one that is far from every named one."""
    names = list(palette)
    if rng.random() > 1 / 6:
        name = names[rng.integers(len(names))]
        return name, np.array(palette[name], np.float32)
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if min(np.linalg.norm(colour - named) for named in map(np.array, palette.values())) > COLOUR_DISTANCE:
            return OTHER, colour


def draw_judged_picture(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, str]]:
    """Draws a picture with its labels; one in six shows a shape that is none of the named ones."""
    colour_name, colour = draw_colour(COLOURS, rng)
    background_name, background = draw_colour(BACKGROUNDS, rng)
    while np.linalg.norm(colour - background) < COLOUR_DISTANCE:
        background_name, background = draw_colour(BACKGROUNDS, rng)
    named = rng.random() > 1 / 6
    shape = str(rng.choice(SHAPES if named else OTHER_SHAPES))
    placement = draw_placement(rng)
    if rng.random() < 0.3:
        x, y = RESOLUTION / 2 + rng.uniform(-14, 14, 2)
        placement = Placement(x=x, y=y, diameter=rng.uniform(0.45, 0.85) * RESOLUTION)
    picture = paint(render_mask(shape, placement, rng), tuple(colour), tuple(background))
    return picture, {"shape": shape if named else OTHER, "colour": colour_name, "background": background_name}


@torch.no_grad()
def draw_dataset(
    count: int, vae: AutoencoderKL | None, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Draws pictures (N, 3, H, W) in [-1, 1] and labels (N,) per attribute.

    Half are degraded (blur, JPEG, cast, noise); with a VAE, a third is passed through it as well, because what
    will be judged comes out of one.
    """
    drawn = [draw_judged_picture(rng) for _ in range(count)]
    pictures = to_tensor([degrade(picture, rng) if rng.random() < 0.5 else picture for picture, _ in drawn])
    if vae is not None:
        for part in torch.from_numpy(rng.permutation(count)[: count // 3]).split(32):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                decoded = vae.decode(vae.encode(pictures[part]).latent_dist.sample()).sample
            pictures[part] = decoded.float().clamp(-1, 1)
    labels = {
        name: torch.tensor([classes.index(names[name]) for _, names in drawn]) for name, classes in CLASSES.items()
    }
    return pictures, labels


def train_classifier(vae: AutoencoderKL, options: ClassifierOptions) -> Classifier:
    """Trains the classifier on rendered pictures of all combinations."""
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    pictures, labels = draw_dataset(options.pictures, vae, rng)
    logger.info("classifier: %d pictures drawn, %.0f s", options.pictures, time.monotonic() - started)
    classifier = Classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=options.learning_rate, weight_decay=0.02)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        pick = torch.from_numpy(rng.integers(0, options.pictures, options.batch_size))
        batch = pictures[pick] + 0.03 * torch.from_numpy(rng.normal(size=(options.batch_size, 3, 1, 1))).float()
        logits = classifier(batch)
        loss = sum(F.cross_entropy(logits[name], labels[name][pick]) for name in CLASSES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            logger.info(
                "classifier step %d/%d loss %.3f, %.0f s", step, options.steps, loss.item(), time.monotonic() - started
            )
    return classifier.eval()


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Writes the classifier in float16."""
    save_file(
        {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in classifier.state_dict().items()
        },
        path,
    )


def load_classifier(path: Path = CLASSIFIER_PATH) -> Classifier:
    """Reads the committed classifier."""
    classifier = Classifier()
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()
    }
    classifier.load_state_dict(tensors)
    return classifier.eval()
