"""The course of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

_SIZE = (640, 360)
_MARGIN = (56, 16, 16, 32)  # left, top, right, bottom, in pixels


def draw_loss(losses: Sequence[float], smoothed: Sequence[float], first_step: int = 1) -> Image.Image:
    """Draws loss and smoothed loss over the steps, as a picture of 640 x 360 pixels.

    Args:
        losses: one for each step, finite; none: an empty picture.
        smoothed: likewise.
        first_step: the number of the first.
    """
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    if not losses:
        return image
    left, top = _MARGIN[:2]
    right, bottom = _SIZE[0] - _MARGIN[2], _SIZE[1] - _MARGIN[3]
    ordered = sorted(losses)
    # A few high ones must not press the rest flat.
    ceiling = max(ordered[int(0.98 * (len(ordered) - 1))], max(smoothed)) * 1.1 or 1.0
    for part in range(5):
        y = bottom - (bottom - top) * part / 4
        draw.line([(left, y), (right, y)], fill=(225, 225, 225))
        draw.text((6, y - 6), f"{ceiling * part / 4:.3g}", fill=(90, 90, 90))
        step = first_step + round((len(losses) - 1) * part / 4)
        draw.text((left + (right - left) * part / 4 - 12, bottom + 8), str(step), fill=(90, 90, 90))

    def trace(values: Sequence[float], colour: tuple[int, int, int], width: int) -> None:
        span = max(1, len(values) - 1)
        points = [
            (left + (right - left) * index / span, bottom - (bottom - top) * min(1.0, value / ceiling))
            for index, value in enumerate(values)
        ]
        draw.line(points if len(points) > 1 else points * 2, fill=colour, width=width)

    trace(losses, (190, 205, 235), 1)
    trace(smoothed, (30, 70, 170), 2)
    draw.text((right - 190, top), "loss (light), smoothed (dark)", fill=(90, 90, 90))
    return image
