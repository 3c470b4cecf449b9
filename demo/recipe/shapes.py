"""The pictures: one coloured shape on a coloured background, 128 x 128 pixels, antialiased."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RESOLUTION = 128
SUPERSAMPLING = 4

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "green": (34, 160, 70),
    "blue": (38, 84, 222),
    "yellow": (250, 214, 40),
    "purple": (142, 58, 190),
    "orange": (246, 132, 28),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
}
# Shapes the model is not taught by name. The VAE sees them, so that a LoRA can add a word for one,
# and the classifier sees them as "none of the four", so that it cannot flatter a deformed picture.
OTHER_SHAPES = ("cross", "pentagon", "diamond", "ring", "bar", "half", "arrow", "heart", "blob")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a shape stands: centre and diameter in pixels of the 128 x 128 picture, turn in radians."""

    x: float = RESOLUTION / 2
    y: float = RESOLUTION / 2
    diameter: float = 88.0
    turn: float = 0.0


def get_outline(shape: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Returns the polygon of a shape as (N, 2) points in a box of half-width 1, y pointing down.

    `rng` is needed by "blob" alone, which is a random polygon.

    Raises:
        ValueError: `shape` is neither in SHAPES nor in OTHER_SHAPES.
    """

    def ring(count: int, radius: float | np.ndarray = 1.0, start: float = -math.pi / 2) -> np.ndarray:
        angles = start + np.arange(count) * 2 * math.pi / count
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radius, (-1, 1))

    if shape in ("circle", "ring"):
        return ring(128)
    if shape == "square":
        return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    if shape == "triangle":
        return np.array([(0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)])
    if shape == "star":
        # An inner radius of 0.45 is fatter than the pentagram's 0.38: its arms survive an f8 VAE.
        return ring(10, np.where(np.arange(10) % 2 == 0, 1.05, 0.47)) + (0.0, 0.08)
    if shape == "cross":
        a = 0.36
        return np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    if shape in ("pentagon", "diamond"):
        return ring(5 if shape == "pentagon" else 4)
    if shape == "bar":
        return np.array([(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)])
    if shape == "half":
        return ring(128)[:64]
    if shape == "arrow":
        return np.array([(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)])
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y], axis=1) / 17
    if shape == "blob" and rng is not None:
        return ring(9, rng.uniform(0.3, 1.0, 9), rng.uniform(0, 2 * math.pi))
    raise ValueError(f"There is no shape {shape!r}; expected one of {SHAPES + OTHER_SHAPES}.")


def render_mask(shape: str, placement: Placement, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draws the coverage of a shape, (H, W) float32 in [0, 1]."""
    size = RESOLUTION * SUPERSAMPLING
    cos, sin = math.cos(placement.turn), math.sin(placement.turn)
    points = get_outline(shape, rng) @ np.array([(cos, sin), (-sin, cos)])
    points = (points * placement.diameter / 2 + (placement.x, placement.y)) * SUPERSAMPLING
    image = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(point) for point in points.tolist()], fill=255)
    if shape == "ring":
        hole = (points - points.mean(0)) * 0.5 + points.mean(0)
        draw.polygon([tuple(point) for point in hole.tolist()], fill=0)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def paint(mask: np.ndarray, colour: tuple[int, ...], background: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Blends a colour over a background (a colour or an (H, W, 3) picture): (H, W, 3) float32 in [0, 255]."""
    alpha = mask[:, :, None]
    return alpha * np.asarray(colour, np.float32) + (1 - alpha) * np.asarray(background, np.float32)


def draw_placement(rng: np.random.Generator) -> Placement:
    """Draws a place as the model's training pictures have it: 58 to 80 % of the picture, nearly centred."""
    x, y = RESOLUTION / 2 + rng.uniform(-5, 5, 2)
    return Placement(x=x, y=y, diameter=rng.uniform(0.58, 0.80) * RESOLUTION)


def render(shape: str, colour: str, background: str, placement: Placement) -> np.ndarray:
    """Renders one named picture, (H, W, 3) float32 in [0, 255]."""
    return paint(render_mask(shape, placement), COLOURS[colour], BACKGROUNDS[background])


def draw_plain_picture(rng: np.random.Generator) -> np.ndarray:
    """Draws a picture as the model is taught them, of any combination. (H, W, 3) float32 in [0, 255]."""
    shape, colour, background = (str(rng.choice(list(names))) for names in (SHAPES, COLOURS, BACKGROUNDS))
    return render(shape, colour, background, draw_placement(rng))


def draw_wild_picture(rng: np.random.Generator) -> np.ndarray:
    """Draws a picture for the VAE: any shapes, any colours, any place. (H, W, 3) float32 in [0, 255].

    Half of the colours are the palette's; the rest is free, because a VAE that knows the palette alone could
    never let a LoRA teach a new colour.
    """

    def colour(palette: dict[str, tuple[int, int, int]]) -> tuple[int, ...]:
        named = list(palette.values())
        return named[rng.integers(len(named))] if rng.random() < 0.5 else tuple(rng.uniform(0, 255, 3))

    picture: tuple[int, ...] | np.ndarray = colour(BACKGROUNDS)
    for _ in range(1 if rng.random() < 0.75 else 2):
        shape = str(rng.choice(SHAPES if rng.random() < 0.6 else OTHER_SHAPES))
        if rng.random() < 0.6:
            placement = draw_placement(rng)
        else:
            x, y = rng.uniform(0.2, 0.8, 2) * RESOLUTION
            placement = Placement(
                x=x, y=y, diameter=rng.uniform(0.2, 0.9) * RESOLUTION, turn=rng.uniform(0, 2 * math.pi)
            )
        picture = paint(render_mask(shape, placement, rng), colour(COLOURS), picture)
    return np.asarray(picture, np.float32)


def degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds what a generated picture may have: blur, JPEG blocks, a colour cast, noise. [0, 255] in and out."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8)))
    if rng.random() < 0.3:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.integers(30, 95)))
        image = Image.open(buffer)
    out = np.asarray(image, np.float32)
    if rng.random() < 0.5:
        out = out + rng.normal(0, 6, 3).astype(np.float32)
    if rng.random() < 0.4:
        out = out + rng.normal(0, rng.uniform(2, 16), out.shape).astype(np.float32)
    return np.clip(out, 0, 255)
