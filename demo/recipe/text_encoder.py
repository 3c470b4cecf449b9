"""The text encoder: a small ChatGLM3, trained to tell what a caption names, then frozen."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ...kolors.text_encoder import TextEncoder, TextEncoderConfig, TokenBatch, build_text_encoder
from ...kolors.tokenizer import Tokenizer
from .captions import (
    EMPTY_CAPTIONS,
    EXTRA_COLOURS,
    EXTRA_SHAPES,
    HELD_OUT,
    LANGUAGES,
    SEEN,
    Combination,
    draw_caption,
    get_captions,
)
from .shapes import BACKGROUNDS, COLOURS, SHAPES
from .tokenizer import get_extra_combinations

logger = logging.getLogger(__name__)

HIDDEN_SIZE = 96
UNNAMED = "(not named)"
CLASSES = {
    "shape": (*SHAPES, *EXTRA_SHAPES, UNNAMED),
    "colour": (*COLOURS, *EXTRA_COLOURS, UNNAMED),
    "background": (*BACKGROUNDS, UNNAMED),
}


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions:
    """How the text encoder is trained."""

    steps: int = 450
    batch_size: int = 128
    learning_rate: float = 2e-3
    token_loss_weight: float = 0.5
    norm_loss_weight: float = 0.05
    seed: int = 2


def get_config(vocab_size: int) -> TextEncoderConfig:
    """Kolors' text encoder scaled down: 4 blocks of 6 heads; the vocabulary is padded to a multiple of 64."""
    return TextEncoderConfig(
        padded_vocab_size=math.ceil(vocab_size / 64) * 64,
        hidden_size=HIDDEN_SIZE,
        ffn_hidden_size=256,
        kv_channels=16,
        num_attention_heads=6,
        multi_query_group_num=2,
        num_layers=4,
    )


class CaptionReader(nn.Module):
    """The encoder with one classification head per attribute on the pooled vector, for training only."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in CLASSES.items()})

    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the input and output of the last block (B, S, D) and the pooled vector (B, D)."""
        penultimate, last = self.encoder(batch)
        pooled = last[torch.arange(len(last)), batch.num_tokens]
        return penultimate, last, pooled


def init_(encoder: TextEncoder) -> None:
    """Sets every parameter: normal with deviation 0.06, norms 1, biases 0."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3 if "embedding" in name else 0.06)
        else:
            nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)


def draw_labelled_caption(rng: np.random.Generator, extra: list[Combination]) -> tuple[str, dict[str, str]]:
    """Draws a caption of a seen combination or, one time in four, of a word the UNet is not shown."""
    kind = rng.random()
    pool = extra if kind < 0.25 else SEEN
    combination = pool[rng.integers(len(pool))]
    names = asdict(combination)
    if kind > 0.96:
        caption = "" if rng.random() < 0.5 else EMPTY_CAPTIONS[rng.integers(len(EMPTY_CAPTIONS))]
        return caption, dict.fromkeys(names, UNNAMED)
    if kind > 0.90:
        return draw_caption(combination, rng, leave_background_open=True), names | {"background": UNNAMED}
    return draw_caption(combination, rng), names


def get_loss(
    reader: CaptionReader, batch: TokenBatch, labels: dict[str, torch.Tensor], options: TextEncoderOptions
) -> tuple[torch.Tensor, float]:
    """Attribute cross entropy, next-token loss, and a pull of every row to root mean square 1.

    The last one keeps rows and pooled vector in the range in which a UNet's linear layers learn well.

    Returns:
        The loss, and the share of captions whose attributes are all read right.
    """
    penultimate, last, pooled = reader(batch)
    logits = {name: head(pooled) for name, head in reader.heads.items()}
    loss = sum(F.cross_entropy(logits[name], labels[name]) for name in logits)
    right = torch.stack([logits[name].argmax(1) == labels[name] for name in logits]).all(0)

    index = torch.arange(batch.input_ids.shape[1])
    real = (index >= 1) & (index <= batch.num_tokens[:, None])  # (B, S)
    predicts = real[:, :-1] & real[:, 1:]
    rows = reader.encoder.encoder["final_layernorm"](last[:, :-1][predicts])
    token_logits = rows @ reader.encoder.embedding["word_embeddings"].weight.T
    loss = loss + options.token_loss_weight * F.cross_entropy(token_logits, batch.input_ids[:, 1:][predicts])
    real[:, 0] = True
    for hidden_states in (penultimate[real], pooled):
        rms = hidden_states.square().mean(-1).sqrt()
        loss = loss + options.norm_loss_weight * (rms - 1).square().mean()
    return loss, right.float().mean().item()


def train_text_encoder(tokenizer: Tokenizer, options: TextEncoderOptions) -> TextEncoder:
    """Trains the text encoder on captions alone; held-out combinations are never among them."""
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    encoder = build_text_encoder(get_config(tokenizer.vocab_size))
    init_(encoder)
    reader = CaptionReader(encoder)
    extra = get_extra_combinations()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=options.learning_rate, weight_decay=0.01)
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                options.learning_rate
                * min(1, (step + 1) / 50)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
            )
        drawn = [draw_labelled_caption(rng, extra) for _ in range(options.batch_size)]
        batch = TokenBatch.from_ids([tokenizer.encode(caption) for caption, _ in drawn], tokenizer.pad_token_id)
        labels = {
            name: torch.tensor([classes.index(names[name]) for _, names in drawn]) for name, classes in CLASSES.items()
        }
        loss, accuracy = get_loss(reader, batch, labels, options)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == options.steps - 1:
            logger.info(
                "text encoder step %d/%d loss %.3f read right %.3f, %.0f s",
                step,
                options.steps,
                loss.item(),
                accuracy,
                time.monotonic() - started,
            )
    for language in LANGUAGES:
        logger.info(
            "captions of held-out combinations read right (%s): %.3f",
            language,
            get_held_out_accuracy(reader, tokenizer, language),
        )
    return encoder


@torch.no_grad()
def get_held_out_accuracy(reader: CaptionReader, tokenizer: Tokenizer, language: str) -> float:
    """Returns the share of held-out captions in which shape, colour and background are all read right."""
    drawn = [
        (caption, asdict(combination)) for combination in HELD_OUT for caption in get_captions(combination, language)
    ]
    batch = TokenBatch.from_ids([tokenizer.encode(caption) for caption, _ in drawn], tokenizer.pad_token_id)
    pooled = reader(batch)[2]
    right = [
        reader.heads[name](pooled).argmax(1) == torch.tensor([classes.index(names[name]) for _, names in drawn])
        for name, classes in CLASSES.items()
    ]
    return torch.stack(right).all(0).float().mean().item()


def save_text_encoder(encoder: TextEncoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `config.json` with ChatGLM3's keys and `model.safetensors` in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "multi_query_attention": True,
        "original_rope": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 256,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config |= asdict(encoder.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
