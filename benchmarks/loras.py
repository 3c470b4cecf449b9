"""LoRAs against diffusers: merging one from its file, and sampling with one."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from arithmetic import count_flops
from loading import SMALL_UNET
from pairs import Case, Outputs, Pair
from sampling import GUIDANCE_SCALE, TOLERANCE, count_run_flops, get_our_run, get_peer_run
from trial_models import build_random_unet, make_embeds

from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet
from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.apply import apply_loras
from kolors_nodes.lora.files import read_tensors, save_lora
from kolors_nodes.lora.formats import Lora, parse_lora
from kolors_nodes.lora.names import UNetNames, get_unet_names

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

RANK, STEPS, SIDE = 16, 4, 256


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows, on a UNet of a fifth of Kolors' channels and full depth, and on all attention at full size."""
    cases = [
        Case(name="lora merge", build=build_merge_pair, pairs=3 if quick else 9),
        Case(name="lora sampling", build=build_sampling_pair, pairs=2 if quick else 7),
        Case(name="lora merge full size", build=build_full_size_pair, pairs=3),
    ]
    return cases[:1] if quick else cases


@cache
def get_unet() -> UNet2DConditionModel:
    """Makes the UNet, once for both rows."""
    return build_random_unet(SMALL_UNET)


@cache
def get_folder() -> tempfile.TemporaryDirectory:
    """Makes the folder for the file, which goes with the process."""
    return tempfile.TemporaryDirectory()


def make_lora(names: UNetNames) -> Lora:
    """Makes a random LoRA of rank 16 on all 560 attention layers."""
    generator = torch.Generator().manual_seed(4)
    adapters = {}
    for module in names.modules:
        if module.is_attention:
            out_size, in_size = module.shape
            down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, in_size), (out_size, RANK)))
            scale = (RANK * in_size) ** -0.5
            adapters[f"{module.diffusers}.weight"] = LowRank(down=down * scale, up=up, alpha=RANK / 4)
    return Lora(names=names, adapters=adapters)


@cache
def write_lora() -> Path:
    """Writes a random LoRA in a format that diffusers reads."""
    return save_lora(make_lora(get_unet_names(get_unet())), Path(get_folder().name) / "lora.safetensors", "kohya")


def read_lora() -> Lora:
    """Reads the file anew."""
    path = write_lora()
    tensors, metadata = read_tensors(path)
    return parse_lora(tensors, get_unet_names(get_unet()), metadata=metadata, source=str(path))


def load_with_diffusers(unet: UNet2DConditionModel) -> None:
    """Puts the file's layers beside the UNet's own, as load_lora_weights does."""
    from diffusers import KolorsPipeline

    path = write_lora()
    state, alphas = KolorsPipeline.lora_state_dict(path.parent, weight_name=path.name, unet_config=unet.config)
    KolorsPipeline.load_lora_into_unet(state, alphas, unet)


def build_merge_pair() -> Pair:
    """Pairs reading and merging with load_lora_weights and fuse_lora of diffusers."""
    base, peer_unet = get_unet(), copy.deepcopy(get_unet())
    layers = [name.removesuffix(".weight") for name in read_lora().adapters]

    def run_ours() -> Outputs:
        patched = apply_loras(base, [(read_lora(), 1.0)])
        return [patched.get_parameter(f"{layer}.weight") for layer in layers]

    def run_peer() -> Outputs:
        load_with_diffusers(peer_unet)
        peer_unet.fuse_lora()
        return [peer_unet.get_parameter(f"{layer}.base_layer.weight").clone() for layer in layers]

    def take_off() -> None:
        if hasattr(peer_unet, "peft_config"):
            peer_unet.unfuse_lora()
            peer_unet.unload_lora()

    run_ours()
    return Pair(
        ours=run_ours,
        peer=run_peer,
        peer_name="diffusers load_lora_weights, fuse_lora",
        tolerance=1e-5,  # one sum of float32 numbers; taking off leaves rounding in the peer's weights
        moved_bytes=2 * sum(base.get_parameter(f"{layer}.weight").nbytes for layer in layers),
        before=take_off,
        note=f"rank {RANK}, {len(layers)} layers, from the file",
    )


def build_full_size_pair() -> Pair:
    """Pairs merging into the full-size model's attention in half precision with a plain loop over the layers."""
    unet = build_unet(KOLORS_UNET_CONFIG, device="meta")
    lora = make_lora(get_unet_names(unet))
    # Memory that is never touched is never given: only the attention layers' weights become real.
    unet = unet.half().to_empty(device="cpu").requires_grad_(False)
    weights = {name: unet.get_parameter(name).fill_(0.01) for name in lora.adapters}

    def run_ours() -> Outputs:
        patched = apply_loras(unet, [(lora, 1.0)])
        return [patched.get_parameter(name) for name in weights]

    def run_peer() -> Outputs:
        return [merge_plainly(weight, lora.adapters[name]) for name, weight in weights.items()]

    return Pair(
        ours=run_ours,
        peer=run_peer,
        peer_name="a plain loop: weight + scale * up @ down",
        tolerance=1e-3,  # half precision: the last of 11 bits
        ours_flops=count_flops(run_ours),
        peer_flops=count_flops(run_peer),
        moved_bytes=2 * sum(weight.nbytes for weight in weights.values()),
        note=f"rank {RANK}, {len(weights)} layers, float16",
    )


def merge_plainly(weight: torch.Tensor, adapter: LowRank) -> torch.Tensor:
    """Adds a low-rank change in float32."""
    return (weight.float() + adapter.alpha / RANK * (adapter.up @ adapter.down)).to(weight.dtype)


def build_sampling_pair() -> Pair:
    """Pairs sampling on merged weights with diffusers' pipeline after load_lora_weights."""
    unet, peer_unet, embeds = get_unet(), copy.deepcopy(get_unet()), make_embeds(4096, 24)
    load_with_diffusers(peer_unet)
    patched = apply_loras(unet, [(read_lora(), 1.0)])
    ours, peer = get_our_run(patched, embeds, side=SIDE), get_peer_run(peer_unet, embeds, side=SIDE)
    return Pair(
        ours=lambda: ours(STEPS, lambda: None),
        peer=lambda: peer(STEPS, lambda: None),
        peer_name="diffusers KolorsPipeline, load_lora_weights",
        tolerance=TOLERANCE,
        ours_flops=count_run_flops(ours, STEPS),
        peer_flops=count_run_flops(peer, STEPS),
        note=f"rank {RANK}, {SIDE} x {SIDE}, {STEPS} steps, cfg {GUIDANCE_SCALE:g}",
    )
