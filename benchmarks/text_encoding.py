"""Text encoding against diffusers' ChatGLMModel, which computes all 256 rows of a padded prompt."""

from __future__ import annotations

from typing import Any

import torch
from arithmetic import count_flops
from pairs import Case, Outputs, Pair
from trial_models import fill_

from kolors_nodes.kolors.text_encoder import TextEncoder, TextEncoderConfig, TokenBatch, build_text_encoder

# ChatGLM3's proportions at a quarter of its width, and blocks of its true width.
QUARTER: dict[str, Any] = {"hidden_size": 1024, "ffn_hidden_size": 3424, "kv_channels": 64, "num_attention_heads": 16}
FULL_WIDTH: dict[str, Any] = {}
VOCABULARY = 1024
# float32 sums over up to 256 keys in another order; measured about 2e-6.
TOLERANCE = 1e-5


def get_cases(*, quick: bool) -> list[Case]:
    """Lists the rows: a short prompt, a long one, and one that leaves no pads to save."""
    sizes = [(1024, QUARTER, 8 if quick else 28)]
    if not quick:
        sizes.append((4096, FULL_WIDTH, 2))
    return [
        Case(
            name=f"text {width} wide {num_tokens} tokens",
            build=lambda sizes=sizes, layers=layers, tokens=num_tokens: build_pair(sizes, layers, tokens),
            pairs=3 if quick else 7,
        )
        for width, sizes, layers in sizes
        for num_tokens in (13, 128, 254)
    ]


def build_pair(sizes: dict[str, Any], layers: int, num_tokens: int) -> Pair:
    """Pairs our encoder with diffusers' on the same random weights and one prompt."""
    peer = build_peer({**sizes, "num_layers": layers, "padded_vocab_size": VOCABULARY})
    ours = build_ours(peer, {**sizes, "num_layers": layers, "padded_vocab_size": VOCABULARY})
    ids = torch.randint(3, VOCABULARY, (num_tokens,), generator=torch.Generator().manual_seed(3)).tolist()
    blocks = sum(parameter.nbytes for parameter in ours.encoder.parameters())

    def run_ours() -> Outputs:
        with torch.no_grad():
            return ours.encode(TokenBatch.from_ids([ids], 0))

    return Pair(
        ours=run_ours,
        peer=lambda: encode_padded(peer, ids),
        peer_name="diffusers ChatGLMModel",
        tolerance=TOLERANCE,
        ours_flops=count_flops(run_ours),
        peer_flops=count_flops(lambda: encode_padded(peer, ids)),
        moved_bytes=blocks,
        note=f"{layers} blocks, {blocks / 2**20:.0f} MiB, float32",
    )


def build_peer(sizes: dict[str, Any]):
    """Makes diffusers' encoder with random weights."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    settings = {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "rmsnorm": True}
    settings |= {"original_rope": True, "add_bias_linear": False, "seq_length": 512, "layernorm_epsilon": 1e-5}
    widths = {"hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32}
    return fill_(ChatGLMModel(ChatGLMConfig(**settings, **{**widths, **sizes})).float())


def build_ours(peer, sizes: dict[str, Any]) -> TextEncoder:
    """Makes our encoder around the peer's own weights."""
    encoder = build_text_encoder(TextEncoderConfig(**sizes), device="meta")
    weights = {name: weight for name, weight in peer.state_dict().items() if name != "output_layer.weight"}
    encoder.load_state_dict(weights, assign=True)
    return encoder.requires_grad_(False)


@torch.no_grad()
def encode_padded(encoder, ids: list[int]) -> Outputs:
    """Encodes one prompt as diffusers' pipeline does, padded on the left to 256 tokens."""
    pads = 256 - len(ids)
    states = encoder(
        input_ids=torch.tensor([[0] * pads + ids]),
        attention_mask=torch.tensor([[0] * pads + [1] * len(ids)]),
        position_ids=torch.tensor([[0] * pads + list(range(len(ids)))]),
        output_hidden_states=True,
    ).hidden_states
    return states[-2].permute(1, 0, 2).clone(), states[-1][-1].clone()
