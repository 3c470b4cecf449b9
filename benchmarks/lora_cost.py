"""What LoRAs cost: applying one to the full-size UNet, and sampling with one. `python benchmarks/lora_cost.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kolors_nodes.kolors.options import SamplingOptions
from kolors_nodes.kolors.prompts import PromptEmbeds
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet
from kolors_nodes.lora.adapters import LowRank
from kolors_nodes.lora.apply import apply_loras
from kolors_nodes.lora.formats import Lora
from kolors_nodes.lora.names import UNetNames, get_unet_names

RANK = 16
MID_SIZE = {**KOLORS_UNET_CONFIG, "block_out_channels": (64, 128, 256), "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (4, 8, 16), "encoder_hid_dim": 512, "cross_attention_dim": 256,
            "projection_class_embeddings_input_dim": 6 * 256 + 512}  # fmt: skip


def make_lora(names: UNetNames) -> Lora:
    """Makes a random LoRA of rank 16 on all attention layers."""
    adapters = {}
    for module in names.modules:
        if module.is_attention:
            out_size, in_size = module.shape
            adapters[f"{module.diffusers}.weight"] = LowRank(
                down=torch.randn(RANK, in_size) / 100, up=torch.randn(out_size, RANK) / 100, alpha=8.0
            )
    return Lora(names=names, adapters=adapters)


def measure(run: Callable[[], object]) -> float:
    """Gives the CPU seconds of one run, all threads together: other work on the machine does not count."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def measure_applying(dtype: torch.dtype, repeats: int) -> None:
    """Compares applying to all 560 attention layers with the bare products and one pass over the same weights."""
    unet = build_unet(KOLORS_UNET_CONFIG, device="meta")
    names = get_unet_names(unet)
    # Memory that is never touched is never given: only the attention layers' weights become real.
    unet = unet.to(dtype).to_empty(device="cpu")
    lora = make_lora(names)
    weights = [unet.get_parameter(name) for name in lora.adapters]
    for weight in weights:
        weight.fill_(0.01)
    pairs = [(adapter.up, adapter.down) for adapter in lora.adapters.values()]
    print(f"{len(weights)} layers, {sum(map(torch.numel, weights)) / 1e6:.0f} M weights, {dtype}, rank {RANK}")
    ratios = []
    for _ in range(repeats):
        products = measure(lambda: [up @ down for up, down in pairs])
        one_pass = measure(lambda: [weight.clone() for weight in weights])
        applying = measure(lambda: apply_loras(unet, [(lora, 1.0)]))
        ratios.append(applying / (2 * products + one_pass))
        print(f"  products {products:.2f} s, one pass {one_pass:.2f} s, applying {applying:.2f} s: "
              f"{ratios[-1]:.2f} of (2 x products + pass)")  # fmt: skip
    print(f"  median {statistics.median(ratios):.2f}")


def measure_sampling(repeats: int) -> None:
    """Compares sampling on a mid-size UNet with and without a LoRA, in turns."""
    base = build_unet(MID_SIZE)
    patched = apply_loras(base, [(make_lora(get_unet_names(base)), 1.0)])
    shapes = {"prompt_embeds": (1, 256, 512), "pooled_prompt_embeds": (1, 512)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    embeds = PromptEmbeds(**{name: torch.randn(shape) for name, shape in shapes.items()})
    options = SamplingOptions(num_inference_steps=4, height=256, width=256)
    sample(base, embeds, options)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(repeats):
        for name, unet in (("without", base), ("with", patched)):
            seconds[name].append(measure(lambda unet=unet: sample(unet, embeds, options)))
    without, with_lora = (statistics.median(seconds[name]) for name in ("without", "with"))
    print(f"sampling: {without:.3f} s without, {with_lora:.3f} s with a LoRA, ratio {with_lora / without:.3f}")


def main() -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the UNet's weights")
    options = parser.parse_args()
    measure_sampling(4 * options.repeats)
    measure_applying(getattr(torch, options.dtype), options.repeats)


if __name__ == "__main__":
    main()
