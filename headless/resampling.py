"""Resampling of latents and pictures, equal to what ComfyUI's upscale nodes compute.

Source: ComfyUI 0.3.64, `comfy.utils.common_upscale`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resample(samples: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """Resamples (B, C, h, w) or (B, C, T, h, w) to the given size.

    Args:
        samples: latents or channel-first pictures.
        width: new width, in cells of `samples`.
        height: new height, in cells of `samples`.
        method: ``nearest-exact``, ``bilinear``, ``area``, ``bicubic``, ``bislerp`` or ``lanczos`` (pictures in
            [0, 1] only).
        crop: ``center`` cuts the longer side to the new aspect ratio first, ``disabled`` stretches.
    """
    import torch

    if samples.ndim == 5:
        frames = samples.movedim(2, 1)  # (B, T, C, h, w)
        flat = resample(frames.flatten(0, 1), width, height, method, crop)
        return flat.unflatten(0, frames.shape[:2]).movedim(1, 2)
    if crop == "center":
        samples = crop_to_aspect(samples, width / height)
    if method == "bislerp":
        return resample_bislerp(samples, width, height)
    if method == "lanczos":
        return resample_lanczos(samples, width, height)
    return torch.nn.functional.interpolate(samples, size=(height, width), mode=method)


def crop_to_aspect(samples: torch.Tensor, aspect: float) -> torch.Tensor:
    """Cuts equal margins off (…, h, w) so that w / h comes as near to `aspect` as whole cells allow."""
    height, width = samples.shape[-2:]
    old_aspect = width / height
    x = round((width - width * (aspect / old_aspect)) / 2) if old_aspect > aspect else 0
    y = round((height - height * (old_aspect / aspect)) / 2) if old_aspect < aspect else 0
    return samples[..., y : height - y, x : width - x]


def resample_lanczos(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Resamples pictures (B, C, H, W) in [0, 1] with Pillow, through 8 bits per channel."""
    import numpy as np
    import torch
    from PIL import Image

    pictures = []
    for picture in samples:
        pixels = np.clip(255.0 * picture.movedim(0, -1).cpu().numpy(), 0, 255).astype(np.uint8)  # (H, W, C)
        resized = Image.fromarray(pixels).resize((width, height), resample=Image.Resampling.LANCZOS)
        pictures.append(torch.from_numpy(np.array(resized).astype(np.float32) / 255.0).movedim(-1, 0))
    return torch.stack(pictures).to(samples.device, samples.dtype)


def resample_bislerp(samples: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Resamples latents (B, C, h, w) by spherical interpolation of their channel vectors, first along w."""
    result = _slerp_along(samples.float(), -1, width)
    return _slerp_along(result, -2, height).to(samples.dtype)


def _slerp_along(samples: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    first, second, ratio = _get_neighbours(samples.shape[dim], length, samples.device)
    shape = [1] * samples.ndim
    shape[dim] = length
    before = samples.index_select(dim, first).movedim(1, -1).contiguous()  # (B, h, w, C)
    after = samples.index_select(dim, second).movedim(1, -1).contiguous()
    ratio = ratio.reshape(shape).movedim(1, -1)  # (1, h or 1, w or 1, 1)
    return slerp(before, after, ratio).movedim(-1, 1)


def _get_neighbours(old: int, new: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns, for each of `new` cells, the two cells of `old` it lies between and its place between them."""
    import torch

    def stretch(cells: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(cells.reshape(1, 1, 1, -1), size=(1, new), mode="bilinear").flatten()

    cells = torch.arange(old, dtype=torch.float32, device=device)
    place = stretch(cells)
    return place.long(), stretch((cells + 1).clamp(max=old - 1)).long(), place - place.floor()


def slerp(before: torch.Tensor, after: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Interpolates vectors in the last dimension along the arc between them, their lengths linearly.

    Vectors of (nearly) the same direction give the first one, opposite ones the linear interpolation.
    """
    import torch

    before_norm = before.norm(dim=-1, keepdim=True)
    after_norm = after.norm(dim=-1, keepdim=True)
    before_unit = torch.where(before_norm == 0, 0.0, before / before_norm)
    after_unit = torch.where(after_norm == 0, 0.0, after / after_norm)
    cosine = (before_unit * after_unit).sum(-1, keepdim=True)
    angle = torch.acos(cosine)
    before_weight, after_weight = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - ratio, ratio))
    norm = before_norm * (1 - ratio) + after_norm * ratio
    result = (before_weight * before_unit + after_weight * after_unit) * norm
    result = torch.where(cosine > 1 - 1e-5, before, result)
    return torch.where(cosine < 1e-5 - 1, before * (1 - ratio) + after * ratio, result)
