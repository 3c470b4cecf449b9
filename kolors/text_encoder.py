"""ChatGLM3 as Kolors' text encoder, in plain torch.

Kolors pads every prompt on the left to 256 tokens and feeds the UNet all 256 rows. The pad rows share one
token id and position id 0, a real token sees no pad, and a pad row as a query sees every key: so all pad rows
are equal in every layer. One pad row whose attention logit is raised by log(number of pads) stands for all of
them, exactly. The encoder therefore computes 1 + n rows instead of 256 for a prompt of n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import (
    CheckpointError,
    OnProgress,
    check_fit,
    find_weight_files,
    iterate_tensors,
    load_weights_,
    read_headers,
    read_json,
    read_pages,
)
from .precision import TEXT_PRECISIONS, get_dtype
from .quantised import CHATGLM_QUANTISATIONS, QUANTISATIONS, Linear, Quantisation, QuantisedLinear, quantise
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Text:
    """An encoded prompt in compact form.

    Attributes:
        rows: (1 + n, D), the input of the last block: the pad row first, then n real tokens.
        pooled: (D,), the last token's output of the last block; both before the final norm.
    """

    rows: torch.Tensor
    pooled: torch.Tensor


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


class Arrangement:
    """Where the rows of a batch lie: the layers compute rows that mean something, one after the other, attention
    takes them prompt by prompt.

    Attributes:
        rotary: (S, head size / 4, 2) angles of the positions.
        bias: (B, 1, S, S) of attention.
        index: (R,) places of the rows in B times S, None where all mean something.
        last: (B,) places of each prompt's last token among the S.
    """

    def __init__(self, batch: TokenBatch, rotary: torch.Tensor):
        self.shape, self.rotary, self.last = batch.input_ids.shape, rotary, batch.num_tokens
        self.bias = get_attention_bias(batch.num_tokens, self.shape[1])
        self.index = None
        if (batch.num_tokens < self.shape[1] - 1).any():
            place = torch.arange(self.shape[1], device=batch.num_tokens.device)
            self.index = (place <= batch.num_tokens[:, None]).flatten().nonzero()[:, 0]

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Gives the rows (R, D) of states (B, S, D)."""
        flat = states.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        """Gives states (B, S, D) with zeros for filler."""
        if self.index is not None:
            rows = rows.new_zeros(self.shape.numel(), rows.shape[1]).index_copy(0, self.index, rows)
        return rows.unflatten(0, self.shape)


class SelfAttention(nn.Module):
    """Multi-query attention: all heads of a group share one key and one value head."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.head_size = config.kv_channels
        width = self.heads * self.head_size
        self.query_key_value = Linear(config.hidden_size, width + 2 * self.groups * self.head_size)
        self.dense = Linear(width, config.hidden_size, bias=False)

    def forward(self, rows: torch.Tensor, arrangement: Arrangement, last_only: bool) -> torch.Tensor:
        states = arrangement.unpack(self.query_key_value(rows)).unflatten(-1, (-1, self.head_size))
        query, key, value = states.split([self.heads, self.groups, self.groups], dim=2)  # (B, S, heads, head size)
        query, key = rotate(query, arrangement.rotary), rotate(key, arrangement.rotary)
        bias = arrangement.bias
        if last_only:
            prompts = torch.arange(len(query), device=query.device)
            query, bias = query[prompts, arrangement.last][:, None], bias[prompts, :, arrangement.last][:, :, None]
        # float32: the pad row's log(pads) would lose its digits in half precision, and 257 rows cost little.
        query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (key, value))
        context = F.scaled_dot_product_attention(query, key, value, bias)  # (B, heads, S or 1, head size)
        context = context.transpose(1, 2).flatten(2).to(rows.dtype)
        return self.dense(context[:, 0] if last_only else arrangement.pack(context))


class FeedForward(nn.Module):
    """SwiGLU. Source: Shazeer 2020, equation 5."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

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

    def forward(self, rows: torch.Tensor, arrangement: Arrangement, last_only: bool = False) -> torch.Tensor:
        """Computes all rows (R, D), or of the last one of each prompt alone (B, D)."""
        attended = self.self_attention(self.input_layernorm(rows), arrangement, last_only)
        if last_only:
            states = arrangement.unpack(rows)
            rows = states[torch.arange(len(states), device=rows.device), arrangement.last]
        rows = rows + attended
        return rows + self.mlp(self.post_attention_layernorm(rows))


class HostEmbedding(nn.Module):
    """An embedding table that stays where it is, whatever device the rest of the model goes to.

    Args:
        weight: (vocabulary, D), on the CPU.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.table = weight.detach()  # neither parameter nor buffer: hosts neither move it nor count it

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids.to(self.table.device), self.table).to(input_ids.device)


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
        """The dtype of the hidden states. Weights may be stored in another."""
        return self.encoder["final_layernorm"].weight.dtype

    @property
    def device(self) -> torch.device:
        """The device the blocks live on."""
        return self.encoder["final_layernorm"].weight.device

    def forward(self, batch: TokenBatch, last_only: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the blocks on the compact rows.

        Args:
            batch: B prompts on the encoder's device.
            last_only: of the last block compute the last token of each prompt alone.

        Returns:
            The input of the last block (B, S, D), and its output: (B, S, D), or (B, D) of the last tokens. Filler
            rows hold no meaning.
        """
        rows = batch.input_ids.shape[1]
        positions = (torch.arange(rows, device=batch.input_ids.device) - 1).clamp(min=0)  # the pad row is at 0 too
        arrangement = Arrangement(batch, self.rotary_pos_emb(positions, self.dtype))
        hidden_states = arrangement.pack(self.embedding["word_embeddings"](batch.input_ids).to(self.dtype))  # (R, D)
        *blocks, last_block = self.encoder["layers"]
        for block in blocks:
            hidden_states = block(hidden_states, arrangement)
        last = last_block(hidden_states, arrangement, last_only)
        return arrangement.unpack(hidden_states), last if last_only else arrangement.unpack(last)

    def encode(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts for the UNet.

        Returns:
            ``prompt_embeds`` (B, 256, D), the input of the last block, and ``pooled_prompt_embeds`` (B, D),
            the last token's output of the last block, both before the final norm and in the encoder's dtype.
        """
        batch = batch.to(self.device)
        penultimate, pooled = self(batch, last_only=True)
        return expand_padding(penultimate, batch.num_tokens), pooled

    def encode_texts(self, batch: TokenBatch) -> list[Text]:
        """Encodes B prompts into compact form, each with memory of its own."""
        batch = batch.to(self.device)
        penultimate, pooled = self(batch, last_only=True)
        counts = batch.num_tokens.tolist()
        return [Text(rows=penultimate[i, : 1 + n].clone(), pooled=pooled[i].clone()) for i, n in enumerate(counts)]


def build_text_encoder(
    config: TextEncoderConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
    quantisation: Quantisation | None = None,
) -> TextEncoder:
    """Makes a text encoder with fresh weights (``device="meta"``: with none at all).

    Args:
        config: its sizes.
        device: of the weights.
        dtype: of all weights that are not quantised.
        precision: instead of the dtype: store them as ``load_text_encoder`` does those of the published files.
        quantisation: store the linear layers of the blocks so.
    """
    quantisation = quantisation or QUANTISATIONS.get(precision)
    with torch.device(device):
        encoder = TextEncoder(config)
        for module in [*encoder.encoder["layers"].modules()] if quantisation else ():
            for name, layer in [*module.named_children()]:
                if isinstance(layer, Linear):
                    shape = layer.in_features, layer.out_features
                    setattr(module, name, QuantisedLinear(*shape, layer.bias is not None, quantisation))
    return encoder.to(dtype if precision is None else torch.float16).eval()


@dataclass(frozen=True, kw_only=True)
class TextEncoderFiles:
    """A text encoder on the disk, its names and shapes checked.

    Attributes:
        path: the file or folder that was asked for.
        files: its weights.
        config: its sizes.
        quantisation: of a file in ChatGLM's own quantised form.
    """

    path: Path
    files: tuple[Path, ...]
    config: TextEncoderConfig
    quantisation: Quantisation | None

    def iterate(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors, memory-mapped, under the names of our modules, without the language-model head."""
        for name, tensor in iterate_tensors(self.files):
            if (ours := _get_name(name)) is not None:
                yield ours, tensor


def find_text_encoder(path: str | Path) -> TextEncoderFiles:
    """Looks at a text encoder's files, of which only the headers are read.

    Args:
        path: a folder with config.json and weights, a folder of shards or one file of the full-size encoder. Names
            may carry the prefix ``transformer.`` of THUDM/chatglm3-6b. Files in ChatGLM's own 8- and 4-bit form are
            told by their tensors.

    Raises:
        CheckpointError: nothing there, a damaged file, or no ChatGLM3 of this size.
    """
    path = Path(path)
    config = TextEncoderConfig()
    # Shards that lie among other files have no configuration of their own.
    if path.is_dir() and ((path / "config.json").is_file() or not any(path.glob("*-of-*"))):
        config = TextEncoderConfig.from_dict(read_json(path / "config.json"))
    files = find_weight_files(path)
    headers = read_headers(files)
    shapes = {ours: info.shape for name, info in headers.items() if (ours := _get_name(name)) is not None}
    if "embedding.word_embeddings.weight" not in shapes:
        raise CheckpointError(f"{path} is no ChatGLM3: it has no embedding.word_embeddings.weight.")
    layer = "encoder.layers.0.self_attention.dense.weight"
    quantisation = None
    if f"{layer}_scale" in shapes:
        # One value or two to a byte: the width decides.
        stored = shapes.get(layer, (0, 0))[-1]
        quantisation = CHATGLM_QUANTISATIONS[8 if stored == config.num_attention_heads * config.kv_channels else 4]
    expected = build_text_encoder(config, device="meta", quantisation=quantisation).state_dict()
    check_fit({name: tuple(tensor.shape) for name, tensor in expected.items()}, shapes, source=path)
    return TextEncoderFiles(path=path, files=tuple(files), config=config, quantisation=quantisation)


def _get_name(name: str) -> str | None:
    """Gives our name of a tensor, None for what is not read."""
    name = name.removeprefix("transformer.")
    return None if name.startswith("output_layer.") else name


def load_text_encoder(
    path: str | Path,
    *,
    precision: str,
    device: torch.device | str = "cpu",
    embedding_on_cpu: bool = False,
    on_progress: OnProgress | None = None,
) -> TextEncoder:
    """Loads a text encoder onto the CPU, tensor by tensor.

    Weights of half precision stay as they are in the file, mapped into memory, and are widened block by block where
    the encoder computes in float32. To be quantised, each tensor is read once and let go.

    Args:
        path: see ``find_text_encoder``. A file in ChatGLM's own 8- or 4-bit form stays in it.
        precision: one of ``TEXT_PRECISIONS``.
        device: where it will compute: decides what it computes in, and does the quantising.
        embedding_on_cpu: whether the embedding table (half a gigabyte) stays on the CPU when the rest moves.
        on_progress: see ``load_weights_``.

    Raises:
        CheckpointError: as ``find_text_encoder``.
        ValueError: no precision has this name.
    """
    found = find_text_encoder(path)
    dtype = get_compute_dtype(precision, device)
    quantisation = found.quantisation or QUANTISATIONS.get(precision)
    encoder = build_text_encoder(found.config, device="meta", precision=precision, quantisation=quantisation)
    tensors = _convert(encoder, found.iterate(), dtype, device)
    load_weights_(encoder, tensors, dtype=None, source=found.path, on_progress=on_progress)
    if embedding_on_cpu:
        encoder.embedding["word_embeddings"] = HostEmbedding(encoder.embedding["word_embeddings"].weight)
    return encoder


def get_compute_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Gives the dtype that a text encoder of a precision computes in; the quantised ones that of fp16.

    Raises:
        ValueError: no precision of text encoders has this name.
    """
    if precision not in TEXT_PRECISIONS:
        raise ValueError(f"No precision is called {precision!r}. Choose one of: {', '.join(TEXT_PRECISIONS)}.")
    return get_dtype("fp16" if precision in QUANTISATIONS else precision, device)


def _convert(
    encoder: TextEncoder,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives each tensor of a file as the encoder stores it."""
    modules = dict(encoder.named_modules())
    for name, tensor in tensors:
        owner, _, part = name.rpartition(".")
        module = modules[owner]
        if isinstance(module, QuantisedLinear) and part == "weight" and tensor.is_floating_point():
            for stored, value in quantise(read_pages(tensor).to(device), module.quantisation).items():
                yield f"{owner}.{stored}", value
        elif isinstance(module, QuantisedLinear) and part != "bias":
            yield name, tensor
        elif (
            isinstance(module, (Linear, nn.Embedding)) and part == "weight" and tensor.dtype.itemsize <= dtype.itemsize
        ):
            yield name, tensor
        else:
            yield name, read_pages(tensor).to(dtype)


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
