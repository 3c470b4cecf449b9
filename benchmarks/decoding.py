"""Decoding latents to pictures against diffusers' AutoencoderKL."""

from __future__ import annotations

from functools import cache

import torch
from arithmetic import count_flops
from pairs import Case, Outputs, Pair
from trial_models import fill_

from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, VAE, build_autoencoder

# float32 on both sides; tiles or another memory layout change the order of sums.
TOLERANCE = 1e-4


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows, SDXL's VAE at full size with random weights."""
    sides = (128,) if quick else (256, 512, 1024)
    return [
        Case(name=f"decode {side}", build=lambda side=side: build_pair(side), pairs=2 if side == 1024 else 3)
        for side in sides
    ]


@cache
def build_peer():
    """Makes SDXL's VAE with random weights."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(dict(SDXL_VAE_CONFIG))
    return fill_(autoencoder.to_empty(device="cpu"))


def build_pair(side: int) -> Pair:
    """Pairs our VAE with diffusers' class on the same weights, for one picture of side x side pixels."""
    peer = build_peer()
    autoencoder = build_autoencoder(device="meta").eval()
    autoencoder.load_state_dict(peer.state_dict(), assign=True)
    vae = VAE(autoencoder)
    latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(5))

    @torch.no_grad()
    def run_peer() -> Outputs:
        picture = peer.decode(latents, return_dict=False)[0]
        return [(picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)]

    def run_ours() -> Outputs:
        return [vae.decode(latents)]

    return Pair(
        ours=run_ours,
        peer=run_peer,
        peer_name="diffusers AutoencoderKL",
        tolerance=TOLERANCE,
        ours_flops=count_flops(run_ours),
        peer_flops=count_flops(run_peer),
        note="float32",
    )
