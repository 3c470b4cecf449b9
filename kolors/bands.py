"""An autoencoder's pass in bands of rows: the result of the whole pass, with a fraction of its memory on the device.

Between two layers a picture lies in main memory; each layer takes it to the device band by band, with the rows that
its kernel sees beyond. Norms take their statistics over all bands first. So nothing is approximated, which decoding
tiles apart from each other would do: every norm would see a tile instead of the picture, and colours would shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Numbers in a band of a layer's input: 32 MB in float16.
BAND_SIZE = 2**24


def decode_in_bands(autoencoder: AutoencoderKL, latent: torch.Tensor, band_size: int = BAND_SIZE) -> torch.Tensor:
    """Decodes one latent (1, 4, h, w), without the scaling factor, to a picture (1, 3, H, W) on the CPU.

    Args:
        autoencoder: on the device that computes.
        latent: on it too, in the autoencoder's dtype.
        band_size: about how many numbers a layer takes at once.
    """
    bands, decoder = Bands(autoencoder.device, band_size), autoencoder.decoder
    if autoencoder.post_quant_conv is not None:
        latent = autoencoder.post_quant_conv(latent)
    # The middle has an eighth of the sides, and attention in it: it passes whole.
    hidden = decoder.mid_block(decoder.conv_in(latent)).cpu()
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = bands.run_resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = bands.upsample(upsampler.conv, hidden)
    return bands.convolve(decoder.conv_out, hidden, bands.build_norm(decoder.conv_norm_out, hidden))


def encode_in_bands(autoencoder: AutoencoderKL, picture: torch.Tensor, band_size: int = BAND_SIZE) -> torch.Tensor:
    """Encodes one picture (1, 3, H, W) to the mean of its latent (1, 4, h, w); as ``decode_in_bands``."""
    bands, encoder = Bands(autoencoder.device, band_size), autoencoder.encoder
    hidden = bands.convolve(encoder.conv_in, picture.cpu())
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = bands.run_resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = bands.downsample(downsampler.conv, hidden)
    hidden = encoder.mid_block(hidden.to(autoencoder.device))
    hidden = encoder.conv_out(F.silu(encoder.conv_norm_out(hidden)))
    if autoencoder.quant_conv is not None:
        hidden = autoencoder.quant_conv(hidden)
    return hidden.chunk(2, dim=1)[0].cpu()


class Bands:
    """Runs layers on pictures (1, C, H, W) on the CPU, in bands of rows on a device.

    Args:
        device: where layers and bands meet.
        size: about how many numbers a band has.
    """

    def __init__(self, device: torch.device, size: int):
        self._device, self._size = device, size

    def _split(self, rows: int, row_size: int) -> Iterator[tuple[int, int]]:
        step = max(1, self._size // row_size)
        return ((start, min(start + step, rows)) for start in range(0, rows, step))

    def convolve(
        self, conv: nn.Conv2d, hidden: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Runs a convolution with an odd kernel that keeps the size, after what ``prepare`` does to each number."""
        (_, channels, rows, columns), reach = hidden.shape, conv.kernel_size[0] // 2
        result = hidden.new_empty(1, conv.out_channels, rows, columns)
        for start, stop in self._split(rows, channels * columns):
            top, bottom = max(start - reach, 0), min(stop + reach, rows)
            band = hidden[:, :, top:bottom].to(self._device)
            band = prepare(band) if prepare else band
            # Beyond the picture there are zeros; beyond the band there is the picture.
            band = F.pad(band, (reach, reach, reach - (start - top), reach - (bottom - stop)))
            result[:, :, start:stop] = F.conv2d(band, conv.weight, conv.bias)
        return result

    def build_norm(self, norm: nn.GroupNorm, hidden: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gives group norm and SiLU for bands of a picture, with the statistics of the whole picture."""
        _, channels, rows, columns = hidden.shape
        mean = torch.zeros(norm.num_groups, dtype=torch.float64)
        square = torch.zeros_like(mean)
        for start, stop in self._split(rows, channels * columns):
            band = hidden[:, :, start:stop].to(self._device).float().reshape(norm.num_groups, -1)
            share = (stop - start) / rows
            mean += band.mean(1).double().cpu() * share
            square += band.square().mean(1).double().cpu() * share
        factor = ((square - mean.square()).clamp_min(0) + norm.eps).rsqrt()
        repeat = channels // norm.num_groups
        weight = norm.weight.float() * factor.float().to(self._device).repeat_interleave(repeat)
        bias = norm.bias.float() - weight * mean.float().to(self._device).repeat_interleave(repeat)
        weight, bias = weight.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
        return lambda band: F.silu(torch.addcmul(bias, band.float(), weight).to(band.dtype))

    def run_resnet(self, resnet: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Runs diffusers' ``ResnetBlock2D`` as autoencoders have it: without a time embedding."""
        inner = self.convolve(resnet.conv1, hidden, self.build_norm(resnet.norm1, hidden))
        inner = self.convolve(resnet.conv2, inner, self.build_norm(resnet.norm2, inner))
        if resnet.conv_shortcut is not None:
            hidden = self.convolve(resnet.conv_shortcut, hidden)
        return inner.add_(hidden).div_(resnet.output_scale_factor)

    def upsample(self, conv: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
        """Doubles the sides by copying neighbours, then runs a 3x3 convolution."""
        _, channels, rows, columns = hidden.shape
        result = hidden.new_empty(1, conv.out_channels, 2 * rows, 2 * columns)
        for start, stop in self._split(rows, 4 * channels * columns):
            top, bottom = max(start - 1, 0), min(stop + 1, rows)
            band = F.interpolate(hidden[:, :, top:bottom].to(self._device), scale_factor=2.0, mode="nearest")
            # Of the row above and the row below, which are two each now, the kernel sees one.
            band = F.pad(band, (1, 1, 1 - 2 * (start - top), 1 - 2 * (bottom - stop)))
            result[:, :, 2 * start : 2 * stop] = F.conv2d(band, conv.weight, conv.bias)
        return result

    def downsample(self, conv: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
        """Halves the sides with a 3x3 convolution that sees zeros to the right and below, as the encoder has it."""
        _, channels, rows, columns = hidden.shape
        result = hidden.new_empty(1, conv.out_channels, rows // 2, columns // 2)
        for start, stop in self._split(rows // 2, 2 * channels * columns):
            bottom = min(2 * stop + 1, rows)
            band = hidden[:, :, 2 * start : bottom].to(self._device)
            band = F.pad(band, (0, 1, 0, 2 * stop + 1 - bottom))
            result[:, :, start:stop] = F.conv2d(band, conv.weight, conv.bias, stride=2)
        return result
