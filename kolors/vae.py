"""SDXL's VAE, which Kolors uses: diffusers' AutoencoderKL on ComfyUI's pictures and latents."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from .bands import decode_in_bands, encode_in_bands
from .checkpoint import CheckpointError, find_weight_files, iterate_tensors, load_weights_, read_config
from .identify import check_part
from .options import SCALING_FACTOR, VAE_SCALE_FACTOR
from .vae_layers import streamline_

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Source: vae/config.json of Kwai-Kolors/Kolors, where it differs from the defaults of diffusers.
SDXL_VAE_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": SCALING_FACTOR,
    }
)


# Numbers that a pass holds at its peak beside the weights, per pixel and channel of the full size's layers: 768 / 128
# in decoding, counted on the meta device, and a quarter more for what kernels need.
NUMBERS_PER_CHANNEL = 7.5

logger = logging.getLogger(__name__)


def lay_out(inputs: torch.Tensor) -> torch.Tensor:
    """Gives the inputs in the one layout of a device: channels last on CPUs, whose convolutions are faster so.

    A copy always: of one picture several strides say the same, and layers choose their kernels by them.
    """
    layout = torch.channels_last if inputs.device.type == "cpu" else torch.contiguous_format
    return inputs.clone(memory_format=layout)


class PlainAutoencoder(nn.Module):
    """diffusers' autoencoder from tensor to tensor: pictures (B, 3, H, W) in [-1, 1], latents (B, 4, h, w).

    Pictures pass one at a time and in one memory layout, so that a batch needs the memory of one and the same picture
    gives the same bits in every batch and under every host.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Gives the means of the latents, without the scaling factor."""
        encode = self.autoencoder.encode
        return torch.cat([encode(lay_out(picture)).latent_dist.mode() for picture in pictures.split(1)])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Gives the pictures of latents without the scaling factor."""
        decode = self.autoencoder.decode
        return torch.cat([decode(lay_out(latent), return_dict=False)[0] for latent in latents.split(1)])


class VAE:
    """Turns pictures into latents and back, as ComfyUI's VAE object does.

    Pictures are (B, H, W, 3) float32 in [0, 1] on the CPU, latents (B, 4, h, w) without the scaling factor. What
    does not fit the free memory at once passes in bands, with the same result.

    Args:
        autoencoder: the network, in float32.
        device: where it runs.
        dtype: what decodes. SDXL's original VAE overflows in float16: such a picture is decoded again in float32, and
            so is every later one. Encoding is float32 always.
    """

    def __init__(
        self, autoencoder: AutoencoderKL, device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32
    ):
        self.autoencoder = autoencoder.to(device)
        self._dtype = dtype
        self._networks = {torch.float32: PlainAutoencoder(autoencoder)}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes latents (B, 4, h, w) to pictures (B, H, W, 3).

        Raises:
            ValueError: the latents are not (B, 4, h, w).
        """
        channels = self.autoencoder.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"The latent has the shape {tuple(latents.shape)}, this VAE takes (batch, {channels}, h, w)."
            )
        pictures = [self._decode(latent).float() for latent in latents.split(1)]
        return ((torch.cat(pictures) + 1) / 2).clamp(0, 1).movedim(1, -1)

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        dtype = self._dtype
        if dtype not in self._networks:
            self._networks[dtype] = PlainAutoencoder(copy.deepcopy(self.autoencoder)).to(dtype)
        pixels = VAE_SCALE_FACTOR**2 * latent.shape[2:].numel()
        picture = self._run(self._networks[dtype].decode, decode_in_bands, latent, dtype, pixels)
        if dtype == torch.float32 or picture.isfinite().all():
            return picture
        logger.info("This VAE overflows in %s: decoding in float32. SDXL's fp16-fix VAE does not.", dtype)
        self._dtype = torch.float32
        del self._networks[dtype]
        return self._decode(latent)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encodes pictures (B, H, W, 3 or more) to the means of their latents (B, 4, h, w).

        Sides are cropped, centred, to a multiple of 8 pixels; channels behind the third are left out.
        """
        height, width = (side // VAE_SCALE_FACTOR * VAE_SCALE_FACTOR for side in pictures.shape[1:3])
        top, left = (pictures.shape[1] - height) // 2, (pictures.shape[2] - width) // 2
        pictures = pictures[:, top : top + height, left : left + width, :3].movedim(-1, 1) * 2 - 1
        run = self._networks[torch.float32].encode
        return torch.cat(
            [self._run(run, encode_in_bands, one, torch.float32, height * width) for one in pictures.split(1)]
        )

    def _run(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        run_in_bands: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor],
        inputs: torch.Tensor,
        dtype: torch.dtype,
        pixels: int,
    ) -> torch.Tensor:
        """Runs the network on one picture, in bands if there is no room for it at once; the result is on the CPU."""
        autoencoder = self._networks[dtype].autoencoder
        device = autoencoder.device
        inputs = inputs.to(device, dtype)
        needed = NUMBERS_PER_CHANNEL * autoencoder.config.block_out_channels[0] * pixels * dtype.itemsize
        if needed < get_free_memory(device):
            try:
                return run(inputs).cpu()
            except torch.cuda.OutOfMemoryError:
                logger.info("The estimate for the VAE was too low: out of memory on %s.", device)
        logger.info("The VAE takes a picture of %d pixels in bands: %d MB are not free.", pixels, needed // 10**6)
        return run_in_bands(autoencoder, inputs)


def get_free_memory(device: torch.device) -> int:
    """Gives the bytes that can be had on a device without moving anything away."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def build_autoencoder(
    config: Mapping[str, Any] = SDXL_VAE_CONFIG, *, device: torch.device | str = "cpu"
) -> AutoencoderKL:
    """Makes an autoencoder with fresh weights (``device="meta"``: with none at all)."""
    from diffusers import AutoencoderKL

    with torch.device(device):
        return streamline_(AutoencoderKL.from_config(dict(config)))


def load_vae(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> VAE:
    """Loads a VAE from a diffusers folder or from one file in the original (LDM) or in diffusers' naming.

    Args:
        path: the folder or the file.
        device: where it runs.
        dtype: what decodes; None: float16 on CUDA, float32 elsewhere.

    Raises:
        CheckpointError: nothing there, a damaged file, or no VAE of SDXL's kind.
    """
    path, device = Path(path), torch.device(device)
    if not path.exists():
        raise CheckpointError(f"VAE not found: {path}.")
    config = read_config(path, SDXL_VAE_CONFIG, "_class_name")
    check_part(path, "vae")
    tensors = dict(iterate_tensors(find_weight_files(path)))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    return VAE(_load_autoencoder(config, tensors, source=path), device, dtype=dtype)


def _load_autoencoder(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, source: Path) -> AutoencoderKL:
    autoencoder = build_autoencoder(config, device="meta")
    tensors = {name.removeprefix("first_stage_model.").removeprefix("vae."): value for name, value in tensors.items()}
    if "decoder.mid.block_1.conv1.weight" in tensors:
        tensors = from_ldm_names(tensors, autoencoder)
    return load_weights_(autoencoder, tensors.items(), dtype=torch.float32, source=source)


def get_ldm_names(autoencoder: AutoencoderKL) -> dict[str, str]:
    """Gives the original (LDM) name of every tensor of an autoencoder: LDM name → diffusers name.

    The decoder's blocks are counted from the other end there, and attention has its own words.
    """
    levels = len(autoencoder.config.block_out_channels)
    parts = {"conv_norm_out": "norm_out", "mid_block.attentions.0": "mid.attn_1"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    parts |= {f"mid.attn_1.{old}": f"mid.attn_1.{new}" for old, new in attention.items()}
    parts |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)}
    for level in range(levels):
        opposite = levels - 1 - level
        parts |= {
            f"down_blocks.{level}.resnets": f"down.{level}.block",
            f"down_blocks.{level}.downsamplers.0": f"down.{level}.downsample",
            f"up_blocks.{level}.resnets": f"up.{opposite}.block",
            f"up_blocks.{level}.upsamplers.0": f"up.{opposite}.upsample",
        }
    parts["conv_shortcut"] = "nin_shortcut"
    names = {}
    for name in autoencoder.state_dict():
        ldm_name = name
        for diffusers_part, ldm_part in parts.items():
            ldm_name = f".{ldm_name}.".replace(f".{diffusers_part}.", f".{ldm_part}.").strip(".")
        names[ldm_name] = name
    return names


def from_ldm_names(tensors: Mapping[str, torch.Tensor], autoencoder: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Renames LDM tensors to diffusers' names; 1x1 convolutions of the attention become linear weights.

    Tensors with unknown names are left out: full checkpoints carry losses and other parts beside the VAE.
    """
    shapes = {name: tensor.shape for name, tensor in autoencoder.state_dict().items()}
    names = get_ldm_names(autoencoder)
    renamed = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    return {
        name: tensor.reshape(shapes[name]) if tensor.shape[2:] == (1, 1) and len(shapes[name]) == 2 else tensor
        for name, tensor in renamed.items()
    }
