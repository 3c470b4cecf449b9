"""The text encoder against diffusers' ChatGLMModel, which computes all 256 rows."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from kolors_nodes.kolors.checkpoint import CheckpointError
from kolors_nodes.kolors.text_encoder import (
    TextEncoderConfig,
    TokenBatch,
    build_text_encoder,
    find_tokenizer,
    load_text_encoder,
)

from .conftest import seed_weights_

PREFIX = [90, 91]
# float32 sums over up to 256 keys in another order; measured 2e-6 at most.
TOLERANCE = 1e-5


def make_config(**sizes: int) -> dict:
    return {
        "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 8,
        "multi_query_group_num": 2, "num_layers": 4, "padded_vocab_size": 100, "add_bias_linear": False,
        "add_qkv_bias": True, "multi_query_attention": True, "original_rope": True, "rmsnorm": True,
        "layernorm_epsilon": 1e-5, "seq_length": 512, **sizes,
    }  # fmt: skip


def make_pair(**sizes: int):
    """The oracle and our encoder with the same seeded weights."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = make_config(**sizes)
    oracle = seed_weights_(ChatGLMModel(ChatGLMConfig(**config)).eval())
    encoder = build_text_encoder(TextEncoderConfig.from_dict(config))
    weights = oracle.state_dict()
    del weights["output_layer.weight"]
    encoder.load_state_dict(weights)
    return oracle, encoder


@torch.no_grad()
def encode_padded(oracle, token_ids):
    """What diffusers' pipeline does: pads on the left to 256, hidden_states[-2] and the last row of [-1]."""
    pads = [256 - len(ids) for ids in token_ids]
    output = oracle(
        input_ids=torch.tensor([[0] * pad + ids for pad, ids in zip(pads, token_ids, strict=True)]),
        attention_mask=torch.tensor([[0] * pad + [1] * (256 - pad) for pad in pads]),
        position_ids=torch.tensor([[0] * pad + list(range(256 - pad)) for pad in pads]),
        output_hidden_states=True,
        use_cache=False,
        return_dict=True,
    )
    return output.hidden_states[-2].permute(1, 0, 2), output.hidden_states[-1][-1]


def draw_ids(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return PREFIX + torch.randint(1, 90, (num_tokens,), generator=generator).tolist()


def relative_error(actual, expected):
    """The largest over the prompts of a batch, each against its own size."""
    dims = tuple(range(1, actual.dim()))
    return ((actual - expected).abs().amax(dims) / expected.abs().amax(dims)).max().item()


@pytest.mark.parametrize("lengths", [(0,), (1,), (13,), (200,), (253,), (254,), (0, 1, 13, 200, 254), (254, 254)])
@torch.no_grad()
def test_equals_diffusers(lengths):
    oracle, encoder = make_pair()
    token_ids = [draw_ids(length, seed) for seed, length in enumerate(lengths)]
    expected_rows, expected_pooled = encode_padded(oracle, token_ids)
    rows, pooled = encoder.encode(TokenBatch.from_ids(token_ids, 0))
    assert rows.shape == (len(lengths), 256, 64)
    assert relative_error(rows, expected_rows) <= TOLERANCE
    assert relative_error(pooled, expected_pooled) <= TOLERANCE


@torch.no_grad()
def test_half_precision_stays_near_float32():
    """bfloat16 keeps 8 bits, so 2 % of the largest value; a bias of log(pads) rounded to it would cost more."""
    _, encoder = make_pair()
    batch = TokenBatch.from_ids([draw_ids(5), draw_ids(40)], 0)
    expected, _ = encoder.encode(batch)
    rows, _ = encoder.to(torch.bfloat16).encode(batch)
    assert rows.dtype == torch.bfloat16
    assert relative_error(rows.float(), expected) <= 0.02


@torch.no_grad()
def test_is_at_least_five_times_faster_than_the_padded_form():
    """At hidden size 1024, 6 blocks and 13 tokens, on one core in the same run; measured 8 to 9 times."""
    oracle, encoder = make_pair(
        hidden_size=1024, num_layers=6, num_attention_heads=8, kv_channels=128, ffn_hidden_size=2816
    )
    token_ids = [draw_ids(11)]
    batch = TokenBatch.from_ids(token_ids, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(5):
            # CPU time of this process, so that a busy machine does not decide the result.
            start = time.process_time()
            encode_padded(oracle, token_ids)
            between = time.process_time()
            encoder.encode(batch)
            ratios.append((between - start) / (time.process_time() - between))
    finally:
        torch.set_num_threads(threads)
    assert sorted(ratios)[2] >= 5


def test_full_size_names_and_shapes(reference):
    config = json.loads((reference / "chatglm3" / "config.json").read_text(encoding="utf-8"))
    encoder = build_text_encoder(TextEncoderConfig.from_dict(config), device="meta")
    expected = json.loads((reference / "chatglm3" / "state_dict_shapes.json").read_text(encoding="utf-8"))
    del expected["output_layer.weight"]
    assert {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()} == expected
    assert TextEncoderConfig.from_dict(config) == TextEncoderConfig()


@pytest.fixture
def saved(tmp_path):
    """A tiny text encoder in the diffusers layout, and its weights."""
    _, encoder = make_pair()
    (tmp_path / "config.json").write_text(json.dumps(make_config()), encoding="utf-8")
    weights = {name: tensor.half() for name, tensor in encoder.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path, weights


def assert_loads(folder, weights):
    encoder = load_text_encoder(folder, precision="fp16")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor.half(), weights[name]), name


def test_loads_safetensors(saved):
    assert_loads(*saved)


def test_loads_pickled_shards_with_head_and_prefix(saved):
    """THUDM/chatglm3-6b-base: the prefix ``transformer.`` and the language-model head."""
    folder, weights = saved
    (folder / "model.safetensors").unlink()
    named = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    named["transformer.output_layer.weight"] = torch.zeros(100, 64)
    names = sorted(named)
    for number, part in enumerate((names[:20], names[20:]), start=1):
        torch.save({name: named[name] for name in part}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    assert_loads(folder, weights)


@pytest.mark.parametrize("with_index", [False, True])
def test_a_missing_shard_is_named(saved, with_index):
    folder, weights = saved
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    if with_index:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="00002-of-00002|1 of 2"):
        load_text_encoder(folder, precision="fp16")


def test_another_size_is_told(saved):
    folder, _ = saved
    (folder / "config.json").write_text(json.dumps(make_config(hidden_size=32)), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"has the shape .* expected"):
        load_text_encoder(folder, precision="fp16")


def test_another_architecture_is_told(saved):
    folder, _ = saved
    (folder / "config.json").write_text(json.dumps(make_config(add_bias_linear=True)), encoding="utf-8")
    with pytest.raises(ValueError, match="add_bias_linear=True, Kolors' ChatGLM3 has False"):
        load_text_encoder(folder, precision="fp16")


def test_something_else_is_told(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no ChatGLM3"):
        load_text_encoder(tmp_path / "other.safetensors", precision="fp16")


def test_finds_the_tokenizer_in_each_layout(tmp_path):
    with pytest.raises(CheckpointError, match="No tokenizer in"):
        find_tokenizer(tmp_path)
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "tokenizer.model").touch()
        assert find_tokenizer(tmp_path) == tmp_path / part / "tokenizer.model"
