"""ChatGLM3 as Kolors' text encoder, in plain torch.

Kolors pads every prompt on the left to 256 tokens and feeds the UNet all 256 rows. The pad rows share one
token id and position id 0, a real token sees no pad, and a pad row as a query sees every key: so all pad rows
are equal in every layer. One pad row whose attention logit is raised by log(number of pads) stands for all of
them, exactly. The encoder therefore computes 1 + n rows instead of 256 for a prompt of n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import CheckpointError, find_weight_files, iterate_tensors, load_weights_, read_json
from .tokenizer import MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of a ChatGLM3 text encoder; field names and defaults are those of Kolors' published config.json."""

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 2
    num_layers: int = 28
    layernorm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.multi_query_group_num:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which multi_query_group_num "
                f"{self.multi_query_group_num} does not divide."
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> TextEncoderConfig:
        """Takes the sizes out of a config.json.

        Raises:
            ValueError: the configuration describes another architecture than Kolors' ChatGLM3.
        """
        expected = {
            "add_bias_linear": False, "add_qkv_bias": True, "multi_query_attention": True, "original_rope": True,
            "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "post_layer_norm": True,
        }  # fmt: skip
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise ValueError(f"config.json says {key}={config[key]}, Kolors' ChatGLM3 has {value}.")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})


@dataclass(frozen=True)
class TokenBatch:
    """Prompts in compact form.

    Attributes:
        input_ids: (B, S) int64: one pad token, then the real tokens, then filler up to the longest prompt.
        num_tokens: (B,) int64: real tokens of each prompt, 2 to 256.
    """

    input_ids: torch.Tensor
    num_tokens: torch.Tensor

    @classmethod
    def from_ids(cls, token_ids: Sequence[Sequence[int]], pad_token_id: int) -> TokenBatch:
        """Packs the ids of B prompts (``Tokenizer.encode``); S is 1 + the longest prompt."""
        longest = max(len(ids) for ids in token_ids)
        rows = [[pad_token_id, *ids] + [pad_token_id] * (longest - len(ids)) for ids in token_ids]
        return cls(torch.tensor(rows), torch.tensor([len(ids) for ids in token_ids]))

    def to(self, device: torch.device | str) -> TokenBatch:
        """Gives the same batch on another device."""
        return TokenBatch(self.input_ids.to(device), self.num_tokens.to(device))


def get_attention_bias(num_tokens: torch.Tensor, rows: int) -> torch.Tensor:
    """Builds the attention bias of the compact form.

    Row 0 is the pad row: it sees itself as many times as there are pads, and every real token. A real token
    sees the real tokens up to itself and no pad.

    Args:
        num_tokens: (B,) int64, real tokens of each prompt.
        rows: S.

    Returns:
        (B, 1, S, S) float32, added to the attention logits: 0, log(pads) or -inf.
    """
    index = torch.arange(rows, device=num_tokens.device)
    causal = (index[None, :] <= index[:, None]) & (index[None, :] >= 1)  # (S, S)
    is_real = (index >= 1) & (index <= num_tokens[:, None])  # (B, S)
    bias = torch.zeros(num_tokens.shape[0], rows, rows, device=num_tokens.device)
    bias[:, 1:].masked_fill_(~causal[1:], -math.inf)
    bias[:, 0].masked_fill_(~is_real, -math.inf)
    # With no pad at all the pad row stands for nothing and is dropped later; 1 keeps its logit finite.
    bias[:, 0, 0] = torch.log((MAX_TOKENS - num_tokens).clamp(min=1).float())
    return bias[:, None]


def expand_padding(hidden_states: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Spreads the compact rows over the 256 rows that the UNet reads: pads on the left, real tokens behind.

    Args:
        hidden_states: (B, S, D) compact rows.
        num_tokens: (B,) int64.

    Returns:
        (B, 256, D), a new tensor.
    """
    position = torch.arange(MAX_TOKENS, device=num_tokens.device)
    row = (position - (MAX_TOKENS - num_tokens[:, None]) + 1).clamp(min=0)  # (B, 256)
    return hidden_states.gather(1, row[..., None].expand(-1, -1, hidden_states.shape[-1]))


class RMSNorm(nn.Module):
    """Root-mean-square norm; the square is taken in float32. Source: Zhang and Sennrich 2019, equation 4."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        return (self.weight * (hidden_states * torch.rsqrt(variance + self.eps))).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Angles of the rotary embedding, over half of each head (``original_rope``)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        # Part of every published checkpoint, though the angles are better computed anew in float32.
        self.register_buffer("inv_freq", self._get_inv_freq(torch.device("cpu")))

    def _get_inv_freq(self, device: torch.device) -> torch.Tensor:
        return 10000.0 ** (-torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gives cosine and sine for positions (S,): (S, dim/2, 2) in ``dtype``."""
        angles = positions.float()[:, None] * self._get_inv_freq(positions.device)
        return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring channel pairs of the first half of each head; the second half passes unchanged.

    Args:
        x: (B, S, heads, head size).
        rotary: (S, head size / 4, 2).

    Source: Su et al. 2021, equation 34, with interleaved pairs.
    """
    turned, passed = x.chunk(2, dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, heads, head size / 4)
    cos, sin = rotary[:, None].unbind(-1)  # (S, 1, head size / 4)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, passed], dim=-1)


class SelfAttention(nn.Module):
    """Multi-query attention: all heads of a group share one key and one value head."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.head_size = config.kv_channels
        width = self.heads * self.head_size
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * self.groups * self.head_size)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_size))
        query, key, value = rows.split([self.heads, self.groups, self.groups], dim=2)  # (B, S, heads, head size)
        query, key = rotate(query, rotary), rotate(key, rotary)
        # float32: the pad row's log(pads) would lose its digits in half precision, and 257 rows cost little.
        query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (key, value))
        context = F.scaled_dot_product_attention(query, key, value, bias)  # (B, heads, S, head size)
        return self.dense(context.transpose(1, 2).flatten(2).to(hidden_states.dtype))


class FeedForward(nn.Module):
    """SwiGLU. Source: Shazeer 2020, equation 5."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, value = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * value)


class Block(nn.Module):
    """One transformer block: norm, attention, norm, feed-forward, each with a residual."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = FeedForward(config)

    def forward(self, hidden_states: torch.Tensor, rotary: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attention(self.input_layernorm(hidden_states), rotary, bias)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TextEncoder(nn.Module):
    """ChatGLM3 without its language-model head. Module names are those of the published checkpoints.

    Source: agrees with diffusers' ``ChatGLMModel`` called with a left-padded batch of 256 tokens.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        # Kolors reads the rows before the final norm; it is kept because checkpoints carry it.
        final_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.encoder = nn.ModuleDict({"layers": blocks, "final_layernorm": final_norm})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.encoder["final_layernorm"].weight.dtype

    @property
    def device(self) -> torch.device:
        """The device the blocks live on."""
        return self.encoder["final_layernorm"].weight.device

    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the blocks on the compact rows.

        Args:
            batch: B prompts on the encoder's device.

        Returns:
            The input and the output of the last block, each (B, S, D); filler rows hold no meaning.
        """
        hidden_states = self.embedding["word_embeddings"](batch.input_ids)  # (B, S, D)
        rows = hidden_states.shape[1]
        positions = (torch.arange(rows, device=hidden_states.device) - 1).clamp(min=0)  # the pad row is at 0 too
        rotary = self.rotary_pos_emb(positions, hidden_states.dtype)
        bias = get_attention_bias(batch.num_tokens, rows)
        *blocks, last_block = self.encoder["layers"]
        for block in blocks:
            hidden_states = block(hidden_states, rotary, bias)
        return hidden_states, last_block(hidden_states, rotary, bias)

    def encode(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts for the UNet.

        Returns:
            ``prompt_embeds`` (B, 256, D), the input of the last block, and ``pooled_prompt_embeds`` (B, D),
            the last token's output of the last block, both before the final norm and in the encoder's dtype.
        """
        batch = batch.to(self.device)
        penultimate, last = self(batch)
        pooled = last[torch.arange(last.shape[0], device=last.device), batch.num_tokens]
        return expand_padding(penultimate, batch.num_tokens), pooled


def build_text_encoder(
    config: TextEncoderConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Makes a text encoder with fresh weights (``device="meta"``: with none at all)."""
    with torch.device(device):
        encoder = TextEncoder(config)
    return encoder.to(dtype).eval()


def load_text_encoder(path: str | Path, *, dtype: torch.dtype) -> TextEncoder:
    """Loads a text encoder, memory-mapped, onto the CPU.

    Args:
        path: a folder with config.json and weights, or one file of the full-size encoder. Names may carry the
            prefix ``transformer.`` of THUDM/chatglm3-6b; the language-model head is not read.
        dtype: of all weights.

    Raises:
        CheckpointError: nothing there, a damaged file, or no ChatGLM3 of this size.
    """
    path = Path(path)
    config, files = TextEncoderConfig(), [path]
    if path.is_dir():
        config, files = TextEncoderConfig.from_dict(read_json(path / "config.json")), find_weight_files(path)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in iterate_tensors(files)}
    if any(name.endswith("weight_scale") for name in tensors):
        raise CheckpointError(f"{path} is quantised, which is not read yet. Use the fp16 file.")
    if "embedding.word_embeddings.weight" not in tensors:
        raise CheckpointError(f"{path} is no ChatGLM3: it has no embedding.word_embeddings.weight.")
    encoder = build_text_encoder(config, device="meta")
    unused = frozenset({"output_layer.weight"})
    return load_weights_(encoder, tensors.items(), dtype=dtype, source=path, ignored=unused)


def find_tokenizer(folder: str | Path) -> Path:
    """Finds ``tokenizer.model`` in a model's folder: in ``tokenizer``, ``text_encoder`` or the folder itself.

    Raises:
        CheckpointError: it is in none of them.
    """
    folder = Path(folder)
    candidates = [folder / part / "tokenizer.model" for part in ("tokenizer", "text_encoder", "")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"No tokenizer in {folder}: expected {candidates[0].relative_to(folder)} or "
        f"{candidates[1].relative_to(folder)}. It is part of Kwai-Kolors/Kolors (about 1 MB)."
    )
