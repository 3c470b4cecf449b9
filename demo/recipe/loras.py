"""Makes the bundled LoRAs, a new shape and a style: `python -m kolors_nodes.demo.recipe.loras`."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from ...lora.files import save_lora
from ...lora.formats import PEFT_METADATA, Lora, parse_lora
from ...lora.names import KOHYA, get_unet_names
from .captions import COMBINATIONS, LANGUAGES, Combination, get_captions
from .evaluate import DemoModel, load_demo_model
from .shapes import BACKGROUNDS, COLOURS, draw_placement, paint, render_mask
from .unet import build_scheduler, encode_captions, get_time_ids
from .vae import to_tensor

logger = logging.getLogger(__name__)

LORA_FOLDER = Path(__file__).parents[1] / "loras"
TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "conv1", "conv2")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """How a LoRA is trained.

    Attributes:
        old_pictures: of what the model knows already; they fill half of each batch, so that it is kept. 0: none.
        whiteness: how much white is mixed into the shapes' colours of the new pictures, 0 to 1.
    """

    rank: int = 8
    alpha: float = 16.0
    steps: int = 600
    batch_size: int = 24
    learning_rate: float = 1.5e-3
    new_pictures: int = 144
    old_pictures: int = 144
    whiteness: float = 0.0
    max_loss_weight: float = 40.0
    seed: int = 5


# What each LoRA is taught with. "Heart" is a word that the UNet was never shown and the text encoder knows; the style
# needs no word.
CONCEPTS = {
    "heart": (tuple(Combination("heart", *names) for names in product(COLOURS, BACKGROUNDS)), LoraOptions()),
    "pastel": (COMBINATIONS, LoraOptions(steps=200, old_pictures=0, whiteness=0.5)),
}


@dataclass(frozen=True, kw_only=True)
class LoraData:
    """Encoded pictures, the new ones first, and captions.

    Attributes:
        latents: (N, 4, h, w).
        combination: (N,) index into the combinations.
        first_caption: (number of combinations + 1,) where each combination's captions start.
        rows: (K, S, D), as ``unet.TrainingData`` has them.
        mask: (K, S).
        pooled: (K, D).
    """

    latents: torch.Tensor
    combination: torch.Tensor
    first_caption: torch.Tensor
    rows: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def prepare_data(model: DemoModel, new: tuple[Combination, ...], options: LoraOptions) -> LoraData:
    """Renders and encodes pictures of the new combinations and of the old ones, with all their captions."""
    rng = np.random.default_rng(options.seed)
    combinations = [*new, *COMBINATIONS]
    chosen = [index % len(new) for index in range(options.new_pictures)]
    chosen += [len(new) + index % len(COMBINATIONS) for index in range(options.old_pictures)]
    latents = []
    for part in np.array_split(chosen, math.ceil(len(chosen) / 32)):
        pictures = []
        for index in part:
            combination, whiteness = combinations[index], options.whiteness if index < len(new) else 0.0
            mask = render_mask(combination.shape, draw_placement(rng))
            colour = tuple(value + whiteness * (255 - value) for value in COLOURS[combination.colour])
            pictures.append(paint(mask, colour, BACKGROUNDS[combination.background]))
        autoencoder = model.vae.autoencoder
        latents.append(autoencoder.encode(to_tensor(pictures)).latent_dist.mean * autoencoder.config.scaling_factor)
    captions = [
        [caption for language in LANGUAGES for caption in get_captions(combination, language)]
        for combination in combinations
    ]
    texts = [caption for each in captions for caption in each]
    rows, mask, pooled = encode_captions(model.text_encoder, model.tokenizer, texts)
    first_caption = torch.tensor([0, *map(len, captions)]).cumsum(0)
    return LoraData(
        latents=torch.cat(latents),
        combination=torch.tensor(chosen),
        first_caption=first_caption,
        rows=rows,
        mask=mask,
        pooled=pooled,
    )


def get_loss(
    unet: torch.nn.Module,
    data: LoraData,
    alphas_cumprod: torch.Tensor,
    options: LoraOptions,
    generator: torch.Generator,
) -> torch.Tensor:
    """Noise prediction error of a batch, weighted as in the UNet's own training."""
    size, total = options.batch_size, len(alphas_cumprod)
    pick = torch.randint(options.new_pictures, (size // 2 if options.old_pictures else size,), generator=generator)
    if options.old_pictures:
        old = torch.randint(options.new_pictures, len(data.latents), (size - len(pick),), generator=generator)
        pick = torch.cat([pick, old])
    start, end = data.first_caption[data.combination[pick]], data.first_caption[data.combination[pick] + 1]
    caption = start + (torch.rand(size, generator=generator) * (end - start)).long()
    # Stratified within each half; else the new ones would get the low timesteps alone.
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])
    timesteps = ((order + torch.rand(size, generator=generator)) * total / size).long()
    noise = torch.randn(data.latents[pick].shape, generator=generator)
    alpha = alphas_cumprod[timesteps]
    noisy = alpha.sqrt()[:, None, None, None] * data.latents[pick] + (1 - alpha).sqrt()[:, None, None, None] * noise
    predicted = unet(
        noisy,
        timesteps,
        encoder_hidden_states=data.rows[caption],
        encoder_attention_mask=data.mask[caption],
        added_cond_kwargs={"text_embeds": data.pooled[caption], "time_ids": get_time_ids(size)},
    ).sample
    error = (predicted - noise).square().mean((1, 2, 3))
    return (error * (1 / alpha).clamp(max=options.max_loss_weight)).mean()


def train_lora(base: UNet2DConditionModel, data: LoraData, options: LoraOptions) -> Lora:
    """Trains with peft; the base is not changed.

    Convolutions are trained too: with attention alone, shapes stay ragged and colours hardly move.
    """
    import peft

    torch.manual_seed(options.seed)
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=list(TARGET_MODULES))
    unet = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    unet.set_attn_processor(AttnProcessor())  # faster backwards on a CPU
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=options.learning_rate, weight_decay=0.0)
    alphas_cumprod = build_scheduler().alphas_cumprod
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        loss = get_loss(unet, data, alphas_cumprod, options, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == options.steps:
            logger.info("step %d of %d: loss %.4f", step, options.steps, loss.item())
    tensors = {name: parameter.detach().half() for name, parameter in trained.items()}
    metadata = {PEFT_METADATA: json.dumps({"lora_alpha": options.alpha})}
    return parse_lora(tensors, get_unet_names(base), metadata=metadata)


def main(arguments: list[str] | None = None) -> int:
    """Trains the LoRAs and writes them."""
    parser = argparse.ArgumentParser(prog="python -m kolors_nodes.demo.recipe.loras", description=__doc__)
    parser.add_argument("--out", type=Path, default=LORA_FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--only", choices=CONCEPTS, help="train this one only")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = load_demo_model()
    for name in [chosen.only] if chosen.only else CONCEPTS:
        combinations, options = CONCEPTS[name]
        lora = train_lora(model.unet, prepare_data(model, combinations, options), options)
        metadata = {
            "base_model": "kolors-shapes",
            "concept": name,
            "steps": str(options.steps),
            "learning_rate": f"{options.learning_rate:g}",
            "seed": str(options.seed),
        }
        logger.info("wrote %s", save_lora(lora, chosen.out / f"{name}.safetensors", KOHYA, metadata=metadata))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
