"""Stand-ins for the core nodes of ComfyUI that Kolors graphs use: same names, inputs, types and results.

Source: ComfyUI 0.3.64, `nodes.py`. Different on purpose: file names never lead out of their folder, files appear
under their name only when they are complete, and a missing picture is told together with where it was looked
for, and a damaged one is an error instead of a picture that ends half-way.
"""

from __future__ import annotations

import json
import mimetypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .graph import NodeClasses
from .host import HeadlessHost, get_running_host

if TYPE_CHECKING:
    import torch

MAX_RESOLUTION = 16384
HIDDEN_METADATA = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


def get_host() -> HeadlessHost:
    """Returns the running host, or one with the default folders when a class is asked outside of a run."""
    return get_running_host() or HeadlessHost()


class VAELoader:
    """Loads a VAE from a file in ``models/vae``."""

    DISPLAY_NAME = "Load VAE"
    # For the message about a missing file: the folder that its list shows, and what fetches one that fits.
    MODEL_FILES = {"vae_name": ("vae", "kolors download --what vae")}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae_name": (get_host().list_files("vae"),)}}

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load_vae"
    CATEGORY = "loaders"

    def load_vae(self, vae_name: str) -> tuple[Any]:
        from ..kolors.vae import load_vae

        host = get_host()
        return (load_vae(host.resolve_file("vae", vae_name), device=host.get_device()),)


class VAEDecode:
    """Turns latents into pictures."""

    DISPLAY_NAME = "VAE Decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "latent"

    def decode(self, vae: Any, samples: Mapping[str, Any]) -> tuple[torch.Tensor]:
        return (vae.decode(samples["samples"]),)


class VAEEncode:
    """Turns pictures into latents."""

    DISPLAY_NAME = "VAE Encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "latent"

    def encode(self, vae: Any, pixels: torch.Tensor) -> tuple[dict[str, Any]]:
        return ({"samples": vae.encode(pixels[..., :3])},)


class EmptyLatentImage:
    """Gives latents of zeros."""

    DISPLAY_NAME = "Empty Latent Image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 512, "min": 16, "max": MAX_RESOLUTION, "step": 8}
        return {
            "required": {
                "width": ("INT", size),
                "height": ("INT", size),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    CATEGORY = "latent"

    def generate(self, width: int, height: int, batch_size: int = 1) -> tuple[dict[str, Any]]:
        import torch

        return ({"samples": torch.zeros(batch_size, 4, height // 8, width // 8)},)


class LatentUpscale:
    """Resamples latents to a size in pixels."""

    DISPLAY_NAME = "Upscale Latent"
    METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "bislerp")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 512, "min": 0, "max": MAX_RESOLUTION, "step": 8}
        return {
            "required": {
                "samples": ("LATENT",),
                "upscale_method": (list(cls.METHODS),),
                "width": ("INT", size),
                "height": ("INT", size),
                "crop": (["disabled", "center"],),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "upscale"
    CATEGORY = "latent"

    def upscale(
        self, samples: Mapping[str, Any], upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[Mapping[str, Any]]:
        from .resampling import resample

        if width == 0 and height == 0:
            return (samples,)
        latents = samples["samples"]
        h, w = latents.shape[-2:]
        # A side of 0 follows from the other; no side becomes shorter than 64 pixels.
        if width == 0:
            height = max(64, height)
            width = round(w * height / h)
        elif height == 0:
            width = max(64, width)
            height = round(h * width / w)
        size = (max(64, width) // 8, max(64, height) // 8)
        return ({**samples, "samples": resample(latents, *size, upscale_method, crop)},)


class ImageScale:
    """Resamples pictures to a size in pixels."""

    DISPLAY_NAME = "Upscale Image"
    METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 512, "min": 0, "max": MAX_RESOLUTION, "step": 1}
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (list(cls.METHODS),),
                "width": ("INT", size),
                "height": ("INT", size),
                "crop": (["disabled", "center"],),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "image/upscaling"

    def upscale(
        self, image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[torch.Tensor]:
        from .resampling import resample

        if width == 0 and height == 0:
            return (image,)
        old_height, old_width = image.shape[1:3]
        width = width or max(1, round(old_width * height / old_height))
        height = height or max(1, round(old_height * width / old_width))
        return (resample(image.movedim(-1, 1), width, height, upscale_method, crop).movedim(1, -1),)


class LoadImage:
    """Loads a picture from the input folder."""

    DISPLAY_NAME = "Load Image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [name for name in list_input_files() if (mimetypes.guess_type(name)[0] or "").startswith("image/")]
        return {"required": {"image": (names, {"image_upload": True})}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    CATEGORY = "image"

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pictures (B, H, W, 3) in [0, 1], and masks (B, H, W), 1 where the picture is transparent.

        The frames of an animation are a batch. A picture without transparency gives the mask of zeros
        (1, 64, 64), as in ComfyUI.
        """
        import torch
        from PIL import Image, ImageOps, ImageSequence

        path = get_host().resolve_upload(image)
        pictures, masks = [], []
        try:
            with Image.open(path) as file:
                has_frames = file.format != "MPO"  # further pictures of an MPO are other views, not frames
                for frame in ImageSequence.Iterator(file):
                    pixels, mask = to_tensors(ImageOps.exif_transpose(frame))
                    if not pictures or pixels.shape == pictures[0].shape:
                        pictures.append(pixels)
                        masks.append(mask)
        except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken files
            raise ValueError(f"{path} is damaged or no picture ({error}). Save it again as PNG or JPEG.") from error
        count = len(pictures) if has_frames else 1
        return torch.stack(pictures[:count]), torch.stack(masks[:count])

    @classmethod
    def IS_CHANGED(cls, image: str) -> str:
        return hash_file(get_host().resolve_upload(image))

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return check_upload(image)


class SaveImage:
    """Saves pictures as PNG in the output folder, with the graph in their metadata."""

    DISPLAY_NAME = "Save Image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": dict(HIDDEN_METADATA),
        }

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"

    def save_images(
        self,
        images: torch.Tensor,
        filename_prefix: str = "ComfyUI",
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        metadata = get_metadata(prompt, extra_pnginfo)
        return save_pictures(images, filename_prefix, "output", metadata, compress_level=4)


class PreviewImage:
    """Saves pictures in the temp folder, for a look."""

    DISPLAY_NAME = "Preview Image"

    def __init__(self) -> None:
        # A new name per node, so that an old preview is never taken for a new one.
        import secrets

        self.suffix = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}, "hidden": dict(HIDDEN_METADATA)}

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"

    def save_images(
        self,
        images: torch.Tensor,
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        metadata = get_metadata(prompt, extra_pnginfo)
        return save_pictures(images, f"ComfyUI_temp_{self.suffix}", "temp", metadata, compress_level=1)


class SaveLatent:
    """Saves latents in the output folder."""

    DISPLAY_NAME = "Save Latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"samples": ("LATENT",), "filename_prefix": ("STRING", {"default": "latents/ComfyUI"})},
            "hidden": dict(HIDDEN_METADATA),
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "_for_testing"

    def save(
        self,
        samples: Mapping[str, Any],
        filename_prefix: str = "ComfyUI",
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        import torch
        from safetensors.torch import save_file

        host = get_host()
        place = host.get_save_path(filename_prefix, host.output_dir)
        name = place.get_name(0, ".latent")
        tensors = {
            "latent_tensor": samples["samples"].cpu().contiguous(),
            # Its presence says that the latents are not scaled.
            "latent_format_version_0": torch.tensor([]),
        }
        with complete_file(place.folder / name) as path:
            save_file(tensors, path, metadata={"prompt": "", **get_metadata(prompt, extra_pnginfo)})
        return {"ui": {"latents": [{"filename": name, "subfolder": place.subfolder, "type": "output"}]}}


class LoadLatent:
    """Loads latents from the input folder."""

    DISPLAY_NAME = "Load Latent"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ([name for name in list_input_files() if name.endswith(".latent")],)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"
    CATEGORY = "_for_testing"

    def load(self, latent: str) -> tuple[dict[str, Any]]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = get_host().resolve_upload(latent)
        try:
            tensors = load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no latent file ({error}). Save it again.") from error
        if "latent_tensor" not in tensors:
            raise ValueError(f"{path} holds no latents: it has {sorted(tensors)}, expected latent_tensor.")
        scale = 1.0 if "latent_format_version_0" in tensors else 1.0 / 0.18215  # files from before that mark
        return ({"samples": tensors["latent_tensor"].float() * scale},)

    @classmethod
    def IS_CHANGED(cls, latent: str) -> str:
        return hash_file(get_host().resolve_upload(latent))

    @classmethod
    def VALIDATE_INPUTS(cls, latent: str) -> bool | str:
        return check_upload(latent)


def to_tensors(picture: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a PIL picture as (H, W, 3) in [0, 1], and its mask (H, W), 1 where it is transparent."""
    import numpy as np
    import torch

    if picture.mode == "I":
        picture = picture.point(lambda value: value * (1 / 255))
    pixels = torch.from_numpy(np.array(picture.convert("RGB")).astype(np.float32) / 255.0)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if "A" not in picture.getbands():
        return pixels, torch.zeros(64, 64)
    alpha = np.array(picture.getchannel("A")).astype(np.float32) / 255.0
    return pixels, 1.0 - torch.from_numpy(alpha)


def save_pictures(
    images: torch.Tensor, prefix: str, kind: str, metadata: Mapping[str, str], compress_level: int
) -> dict[str, Any]:
    """Saves pictures (B, H, W, C) in [0, 1] as numbered PNG files, and returns what ComfyUI shows of them."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    host = get_host()
    folder = host.output_dir if kind == "output" else host.temp_dir
    place = host.get_save_path(prefix, folder, width=images.shape[2], height=images.shape[1])
    chunks = PngInfo()
    for key, text in metadata.items():
        chunks.add_text(key, text)
    shown = []
    for index, image in enumerate(images):
        pixels = np.clip(255.0 * image.cpu().numpy(), 0, 255).astype(np.uint8)
        name = place.get_name(index, ".png")
        with complete_file(place.folder / name) as path:
            Image.fromarray(pixels).save(path, format="PNG", pnginfo=chunks, compress_level=compress_level)
        shown.append({"filename": name, "subfolder": place.subfolder, "type": kind})
    return {"ui": {"images": shown}}


def get_metadata(prompt: Mapping[str, Any] | None, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the text chunks by which ComfyUI opens a saved file as a graph."""
    entries = {} if prompt is None else {"prompt": prompt}
    return {key: json.dumps(value) for key, value in {**entries, **(extra_pnginfo or {})}.items()}


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` when the block ends well, and vanishes when it does not."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def list_input_files() -> list[str]:
    """Returns the names of the files directly in the input folder, sorted; none where there is no folder."""
    folder = get_host().input_dir
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_upload(name: str) -> bool | str:
    """Returns True when a file widget names an existing file, else what is wrong with it."""
    try:
        path = get_host().resolve_upload(name)
    except ValueError as error:
        return str(error)
    if path.is_file():
        return True
    return f"Invalid file: {name}. Looked for {path}. Put the file there, or choose another input folder (--input-dir)."


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "VAELoader": VAELoader,
    "VAEDecode": VAEDecode,
    "VAEEncode": VAEEncode,
    "EmptyLatentImage": EmptyLatentImage,
    "LatentUpscale": LatentUpscale,
    "LoadImage": LoadImage,
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
    "ImageScale": ImageScale,
    "SaveLatent": SaveLatent,
    "LoadLatent": LoadLatent,
}


def with_stand_ins(nodes: NodeClasses) -> dict[str, type]:
    """Returns `nodes` with the stand-ins added under the names that it lacks."""
    return {**NODE_CLASS_MAPPINGS, **nodes}
