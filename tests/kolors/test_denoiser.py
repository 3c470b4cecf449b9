"""The UNet block by block against diffusers' own forward pass, on the same modules."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kolors_nodes.kolors import denoiser as denoiser_module
from kolors_nodes.kolors.compact import Float8Linear
from kolors_nodes.kolors.denoiser import Denoiser, PlainDenoiser, build_denoiser, collapse_rows, get_logits
from kolors_nodes.kolors.options import SamplingOptions, SpeedOptions
from kolors_nodes.kolors.sampling import Conditioning, get_conditioning, sample

# float32, the same sums in another order; the random UNet spreads the last digits to below this.
TOLERANCE = 5e-6
TIMESTEPS = torch.tensor([900.0, 400.0, 100.0])


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def make_conditioning(tiny_unet, make_embeds):
    """Texts whose pads are equal rows, of other lengths in each."""

    def make(pads=(250, 242), guided=True, size=(64, 64)):
        embeds = make_embeds(1)
        for rows, count in zip((embeds.negative_prompt_embeds, embeds.prompt_embeds), pads, strict=True):
            rows[:, :count] = rows[:, :1]
        return get_conditioning(embeds, tiny_unet, height=size[0], width=size[1], guided=guided)

    return make


def predict_plainly(unet, latents, timestep, conditioning):
    """diffusers' forward pass, as its pipeline calls it."""
    return unet(
        torch.cat([latents] * (conditioning.prompt_embeds.shape[0] // latents.shape[0])),
        timestep,
        encoder_hidden_states=conditioning.prompt_embeds,
        added_cond_kwargs={"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": conditioning.time_ids},
    ).sample


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (7, 9)])
@pytest.mark.parametrize("pads", [(250, 242), (0, 242), (254, 0), (0, 0)])
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_equals_diffusers(tiny_unet, make_conditioning, monkeypatch, size, pads, packs):
    if not packs:
        monkeypatch.setattr(denoiser_module, "MAX_PACKED_CELLS", 0)
    conditioning = make_conditioning(pads, size=(8 * size[0], 8 * size[1]))
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    denoiser = build_denoiser(tiny_unet, conditioning, TIMESTEPS, size=size)
    assert isinstance(denoiser, Denoiser)
    for index, timestep in enumerate(TIMESTEPS):
        expected = predict_plainly(tiny_unet, latents, timestep, conditioning)
        assert relative_error(denoiser(latents, index), expected) <= TOLERANCE


@torch.no_grad()
def test_without_guidance_and_without_negatives(tiny_unet, make_conditioning):
    both, latents = make_conditioning(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    alone = Conditioning(**{name: getattr(both, name)[1:] for name in both.__dataclass_fields__})
    expected = predict_plainly(tiny_unet, latents, TIMESTEPS[1], alone)
    assert relative_error(build_denoiser(tiny_unet, alone, TIMESTEPS, size=(8, 8))(latents, 1), expected) <= TOLERANCE
    for cls in (Denoiser, PlainDenoiser):
        denoiser = cls(tiny_unet, both, TIMESTEPS, **({"size": (8, 8)} if cls is Denoiser else {}))
        denoiser(latents, 0)
        denoiser.drop_negatives_()
        assert relative_error(denoiser(latents, 1), expected) <= TOLERANCE


@torch.no_grad()
def test_steps_are_embedded_in_groups(tiny_unet, make_conditioning, monkeypatch):
    monkeypatch.setattr(denoiser_module, "STEPS_AT_ONCE", 2)
    conditioning, latents = make_conditioning(), torch.ones(1, 4, 8, 8)
    denoiser = build_denoiser(tiny_unet, conditioning, TIMESTEPS, size=(8, 8))
    for index in (0, 1, 2, 0):
        expected = predict_plainly(tiny_unet, latents, TIMESTEPS[index], conditioning)
        assert relative_error(denoiser(latents, index), expected) <= TOLERANCE


def test_equal_rows_are_taken_together():
    rows = torch.tensor([[1.0, 1, 1, 2, 3, 3], [1, 2, 3, 4, 4, 4]])[..., None]
    taken, bias = collapse_rows(rows)
    assert taken[..., 0].tolist() == [[1, 2, 3, 1], [1, 2, 3, 4]]
    assert bias.exp()[:, 0, 0].tolist() == [[pytest.approx(3), 1, pytest.approx(2), 0], [1, 1, 1, pytest.approx(3)]]


def test_rows_that_differ_all_stay():
    rows = torch.arange(6.0).view(1, 6, 1)
    taken, bias = collapse_rows(rows)
    assert taken is rows
    assert bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 242, 255, 256])
def test_logits_weigh_as_much_as_the_rows(dtype, count):
    """In each dtype's own grid. bfloat16 holds the remainder's logarithm to 2^-7, a share of 2^-8 of the whole."""
    logits = torch.tensor(get_logits(count, dtype)).to(dtype).double()
    tolerance = {torch.float32: 5e-7, torch.float16: 2e-5, torch.bfloat16: 1e-3}[dtype]
    assert logits.exp().sum().item() == pytest.approx(count, rel=tolerance)


@torch.no_grad()
def test_half_precision_weighs_pads_rightly(tiny_unet, make_conditioning):
    """bfloat16 on the CPU: as near to float32's result as diffusers' own pass with all 256 rows is."""
    half = copy.deepcopy(tiny_unet).to(torch.bfloat16)
    conditioning, latents = make_conditioning(), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    rounded = Conditioning(
        **{name: getattr(conditioning, name).bfloat16() for name in conditioning.__dataclass_fields__}
    )
    exact = predict_plainly(tiny_unet, latents, TIMESTEPS[1], conditioning)
    theirs = predict_plainly(half, latents.bfloat16(), TIMESTEPS[1], rounded).float()
    ours = build_denoiser(half, rounded, TIMESTEPS, size=(8, 8))(latents.bfloat16(), 1).float()
    assert relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


class Interrupted(Exception):
    pass


@torch.no_grad()
def test_hooks_on_blocks_act(tiny_unet, make_conditioning):
    """The host's check for interruption hangs before the children of every ModuleList."""
    unet, calls = copy.deepcopy(tiny_unet), []
    blocks = [block for part in unet.modules() if isinstance(part, nn.ModuleList) for block in part]
    hooks = [block.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__)) for block in blocks]
    denoiser = build_denoiser(unet, make_conditioning(), TIMESTEPS, size=(8, 8))
    assert isinstance(denoiser, Denoiser)
    denoiser(torch.ones(1, 4, 8, 8), 0)
    assert {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "DownBlock2D"} <= set(calls)
    for hook in hooks:
        hook.remove()

    def stop(*_):
        raise Interrupted

    unet.up_blocks[0].attentions[0].register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        denoiser(torch.ones(1, 4, 8, 8), 1)


@torch.no_grad()
def test_compact_and_hooked_layers_run_their_own_way(tiny_unet, make_conditioning):
    unet = copy.deepcopy(tiny_unet)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.to_q = Float8Linear(block.attn1.to_q)
    block.attn2.to_k = Float8Linear(block.attn2.to_k)
    block.attn2.to_out[0].register_forward_hook(lambda module, args, output: 2 * output)
    conditioning, latents = make_conditioning(), torch.ones(1, 4, 8, 8)
    denoiser = build_denoiser(unet, conditioning, TIMESTEPS, size=(8, 8))
    assert isinstance(denoiser, Denoiser)
    expected = predict_plainly(unet, latents, TIMESTEPS[0], conditioning)
    assert relative_error(denoiser(latents, 0), expected) <= TOLERANCE


def hang_forward(unet):
    block = unet.down_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        hang_forward,
        lambda unet: unet.enable_freeu(0.9, 0.2, 1.1, 1.2),
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.register_to_config(center_input_sample=True),
        lambda unet: unet.mid_block.register_forward_hook(lambda module, args, output: 2 * output),
    ],
)
@torch.no_grad()
def test_changed_unets_run_their_own_forward_pass(tiny_unet, make_conditioning, change):
    unet = copy.deepcopy(tiny_unet)
    change(unet)
    conditioning, latents = make_conditioning(), torch.ones(1, 4, 8, 8)
    denoiser = build_denoiser(unet, conditioning, TIMESTEPS, size=(8, 8))
    assert isinstance(denoiser, PlainDenoiser)
    expected = predict_plainly(unet, latents, TIMESTEPS[0], conditioning)
    assert relative_error(denoiser(latents, 0), expected) <= TOLERANCE


OPTIONS = SamplingOptions(num_inference_steps=6, height=64, width=64)


def count_blocks(unet, embeds, speed):
    """Counts the rows that the first and the middle residual block compute, over a run."""
    rows = {"shallow": 0, "deep": 0}
    run = denoiser_module.run_residual
    shallow, deep = unet.down_blocks[0].resnets[0].norm1.weight, unet.mid_block.resnets[0].norm1.weight

    def count(hidden, shift, block):
        for name, weight in (("shallow", shallow), ("deep", deep)):
            rows[name] += shift.shape[0] if block.norm1.weight is weight else 0
        return run(hidden, shift, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser_module, "run_residual", count)
        latents = sample(unet, embeds, OPTIONS, speed=speed)
    return rows, latents


def test_what_speed_options_leave_out(tiny_unet, make_embeds):
    embeds = make_embeds(1)
    rows, exact = count_blocks(tiny_unet, embeds, SpeedOptions())
    assert rows == {"shallow": 12, "deep": 12}
    rows, reused = count_blocks(tiny_unet, embeds, SpeedOptions(feature_reuse=3))
    assert rows == {"shallow": 12, "deep": 4}
    rows, less_guided = count_blocks(tiny_unet, embeds, SpeedOptions(guidance_until=0.5))
    assert rows == {"shallow": 9, "deep": 9}
    rows, both = count_blocks(tiny_unet, embeds, SpeedOptions(feature_reuse=2, guidance_until=0.4))
    assert rows == {"shallow": 9, "deep": 2 * 2 + 2}  # 0 and 2 guided, 3 as the rows are others, 4 as its turn comes
    assert torch.equal(sample(tiny_unet, embeds, OPTIONS), exact)
    assert not torch.equal(reused, exact)
    assert torch.isfinite(both).all()
    assert not torch.equal(less_guided, exact)


def test_guidance_over_no_step_is_no_guidance(tiny_unet, make_embeds):
    embeds = make_embeds(1)
    alone = sample(tiny_unet, embeds, replace(OPTIONS, guidance_scale=1.0))
    never = sample(tiny_unet, embeds, OPTIONS, speed=SpeedOptions(guidance_until=0.0))
    assert relative_error(never, alone) <= 5e-5  # six steps spread one step's rounding further


@pytest.mark.parametrize(
    ("options", "message"),
    [({"feature_reuse": 0}, "expected 1 to 20 steps"), ({"guidance_until": 1.5}, "expected 0 to 1")],
)
def test_bad_speed_options(options, message):
    with pytest.raises(ValueError, match=message):
        SpeedOptions(**options)
