"""The denoising loop against diffusers' pipeline, and against a plain loop for image-to-image."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.options import SamplingOptions
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.schedulers import KOLORS_SCHEDULE, SCHEDULERS, build_scheduler

# Both sides are float32 and add the same numbers in the same order but for batching: the differences are a few
# units in the last place per step, which fifty steps of a random UNet spread to below this.
TOLERANCE = 5e-5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def make_pipeline(tiny_unet):
    """diffusers' KolorsPipeline around the tiny UNet; text encoder and VAE are not needed for latents."""
    from diffusers import KolorsPipeline

    def make(scheduler):
        pipeline = KolorsPipeline(vae=None, text_encoder=None, tokenizer=None, unet=tiny_unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


CASES = [
    (name, size, cfg, steps, batch_size)
    for name in SCHEDULERS
    for size, cfg, steps, batch_size in [
        ((64, 64), 5.0, 50, 4),
        ((64, 96), 5.0, 4, 1),
        ((96, 64), 1.0, 12, 2),
        ((64, 64), 0.0, 25, 1),
        ((64, 64), 5.0, 1, 1),
    ]
    if steps < 50 or name in list(SCHEDULERS)[:6:5]
]
# The pipeline sets eta to 0 where it is told none, which turns TCD's own noise off.
ETA = {"TCDScheduler": 0.3}


@pytest.mark.parametrize(("name", "size", "cfg", "steps", "batch_size"), CASES)
def test_text_to_image_equals_diffusers(tiny_unet, make_embeds, make_pipeline, name, size, cfg, steps, batch_size):
    embeds = make_embeds(batch_size)
    height, width = size
    expected = make_pipeline(build_scheduler(name))(
        prompt_embeds=embeds.prompt_embeds,
        pooled_prompt_embeds=embeds.pooled_prompt_embeds,
        negative_prompt_embeds=embeds.negative_prompt_embeds,
        negative_pooled_prompt_embeds=embeds.negative_pooled_prompt_embeds,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        eta=ETA.get(name, 0.0),
    ).images
    options = SamplingOptions(
        num_inference_steps=steps, guidance_scale=cfg, scheduler=name, height=height, width=width, seed=7
    )
    assert relative_error(sample(tiny_unet, embeds, options), expected) <= TOLERANCE


def sample_plainly(unet, embeds, latents, *, scheduler, steps, strength, cfg, seed):
    """Image-to-image as the existing ComfyUI pack does it, written out: noise at the first timestep that is run."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    start = (steps - int(steps * strength)) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    batch_size = embeds.prompt_embeds.shape[0]
    noise = torch.randn(latents.shape, generator=generator)
    latents = torch.cat([scheduler.add_noise(latents, noise, timesteps[:1])] * (batch_size // latents.shape[0]))
    height, width = latents.shape[2] * 8, latents.shape[3] * 8
    time_ids = torch.tensor([[height, width, 0, 0, height, width]] * batch_size).float()
    step_options = {"generator": generator}
    if type(scheduler).__name__ in ("UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler"):
        step_options = {}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)

        def predict(text, pooled, scaled=scaled, timestep=timestep):
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            return unet(scaled, timestep, text, added_cond_kwargs=conditions).sample

        noise_pred = predict(embeds.prompt_embeds, embeds.pooled_prompt_embeds)
        if cfg > 1:
            negative = predict(embeds.negative_prompt_embeds, embeds.negative_pooled_prompt_embeds)
            noise_pred = negative + cfg * (noise_pred - negative)
        latents = scheduler.step(noise_pred, timestep, latents, **step_options).prev_sample
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("strength", "cfg", "steps", "num_latents", "num_prompts"),
    [(0.6, 5.0, 10, 1, 1), (1.0, 5.0, 6, 4, 4), (0.3, 1.0, 20, 1, 3)],
)
@torch.no_grad()
def test_image_to_image_equals_a_plain_loop(
    tiny_unet, make_embeds, name, strength, cfg, steps, num_latents, num_prompts
):
    embeds = make_embeds(num_prompts)
    latents = torch.randn(num_latents, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = sample_plainly(
        tiny_unet, embeds, latents, scheduler=build_scheduler(name), steps=steps, strength=strength, cfg=cfg, seed=3
    )
    options = SamplingOptions(
        num_inference_steps=steps, guidance_scale=cfg, scheduler=name, strength=strength, seed=3, height=64, width=64
    )
    assert relative_error(sample(tiny_unet, embeds, options, latents=latents), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("EulerDiscreteScheduler", 826),
        ("EulerDiscreteScheduler_trailing", 1099),
        ("HeunDiscreteScheduler", 826),
        ("DDIMScheduler", 826),
        ("DDIMScheduler_trailing", 1099),
        ("LCMScheduler", 1099),
        ("TCDScheduler", 1099),
        ("DPMSolverMultistepScheduler_karras", 1099),
        ("EulerDiscreteScheduler_karras", 826),
        ("EulerAncestralDiscreteScheduler", 826),
        ("DPMSolverMultistepScheduler", 881),
        ("UniPCMultistepScheduler", 881),
        ("DEISMultistepScheduler", 881),
        ("DPMSolverMultistepScheduler_SDE_karras", 1099),
    ],
)
def test_first_timestep_at_four_steps(name, first):
    scheduler = build_scheduler(name)
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == first
    assert scheduler.config.num_train_timesteps == KOLORS_SCHEDULE["num_train_timesteps"] == 1100


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 100, 200])
def test_every_step_count_of_the_widget_runs(tiny_unet, make_embeds, name, steps):
    """Karras schedules hold equal timesteps at many steps, on which a look-up by value runs off the end."""
    options = SamplingOptions(num_inference_steps=steps, guidance_scale=1.0, scheduler=name, height=32, width=32)
    done = []
    latents = sample(tiny_unet, make_embeds(1), options, on_step=lambda *arguments: done.append(arguments[:2]))
    assert done == [(step, steps) for step in range(1, steps + 1)]
    assert torch.isfinite(latents).all()


def test_guidance_at_one_uses_no_negative(tiny_unet, make_embeds):
    embeds, other = make_embeds(1, seed=0), make_embeds(1, seed=1)
    from dataclasses import replace

    swapped = replace(
        embeds,
        negative_prompt_embeds=other.negative_prompt_embeds,
        negative_pooled_prompt_embeds=other.negative_pooled_prompt_embeds,
    )
    options = {"num_inference_steps": 3, "height": 64, "width": 64}
    unguided, guided = SamplingOptions(guidance_scale=1.0, **options), SamplingOptions(guidance_scale=2.0, **options)
    assert torch.equal(sample(tiny_unet, embeds, unguided), sample(tiny_unet, swapped, unguided))
    assert not torch.equal(sample(tiny_unet, embeds, guided), sample(tiny_unet, swapped, guided))


def test_one_prompt_serves_several_latents(tiny_unet, make_embeds):
    """Each latent gets noise of its own, and its own picture."""
    options = SamplingOptions(num_inference_steps=4, strength=0.5, height=64, width=64)
    latents = torch.zeros(3, 4, 8, 8)
    sampled = sample(tiny_unet, make_embeds(1), options, latents=latents)
    assert sampled.shape == (3, 4, 8, 8)
    assert not torch.equal(sampled[0], sampled[1])
    assert torch.equal(latents, torch.zeros(3, 4, 8, 8))


def test_several_prompts_share_one_latent_and_one_noise(tiny_unet, make_embeds):
    one = make_embeds(1)
    twice = type(one)(**{name: torch.cat([getattr(one, name)] * 2) for name in one.__dataclass_fields__})
    options = SamplingOptions(num_inference_steps=4, strength=0.5, height=64, width=64)
    sampled = sample(tiny_unet, twice, options, latents=torch.zeros(1, 4, 8, 8))
    # Not bit for bit: matrix products over another batch size may add in another order.
    assert relative_error(sampled[0], sampled[1]) <= TOLERANCE


def test_step_callback_stops_the_run(tiny_unet, make_embeds):
    class StopRun(Exception):
        pass

    seen = []

    def on_step(step, total, latents):
        seen.append((step, total, tuple(latents.shape)))
        if step == 2:
            raise StopRun

    with pytest.raises(StopRun):
        sample(tiny_unet, make_embeds(1), SamplingOptions(num_inference_steps=5, height=64, width=64), on_step=on_step)
    assert seen == [(1, 5, (1, 4, 8, 8)), (2, 5, (1, 4, 8, 8))]


def test_model_and_inputs_stay_as_they_were(tiny_unet, make_embeds):
    before = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    embeds = make_embeds(2)
    copies = [getattr(embeds, name).clone() for name in embeds.__dataclass_fields__]
    sample(tiny_unet, embeds, SamplingOptions(num_inference_steps=2, height=64, width=64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_unet.state_dict().items())
    for name, copy in zip(embeds.__dataclass_fields__, copies, strict=True):
        assert torch.equal(getattr(embeds, name), copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.01}, "= 0 steps"),
        ({"strength": 0.0}, "= 0 steps"),
        ({"strength": 1.5}, "expected 0 to 1"),
        ({"num_inference_steps": 0}, "expected 1 to 1100"),
        ({"scheduler": "Euler"}, "Choose one of: EulerDiscreteScheduler"),
        ({"height": 100}, "multiple of 8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)


def test_strength_below_one_without_latents(tiny_unet, make_embeds):
    with pytest.raises(ValueError, match="needs a latent"):
        sample(tiny_unet, make_embeds(1), SamplingOptions(strength=0.5, height=64, width=64))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 8, 8), r"Kolors takes \(batch, 4"),
        ((1, 4, 1, 8, 8), r"Kolors takes \(batch, 4"),
        ((0, 4, 8, 8), r"Kolors takes \(batch, 4"),
        ((1, 4, 2, 8), "at least 4x4"),
        ((2, 4, 8, 8), "2 latents came with 3 prompts"),
    ],
)
def test_latents_that_fit_nothing(tiny_unet, make_embeds, shape, message):
    with pytest.raises(ValueError, match=message):
        sample(tiny_unet, make_embeds(3), SamplingOptions(height=64, width=64), latents=torch.zeros(shape))


def test_odd_latent_sizes_run(tiny_unet, make_embeds):
    options = SamplingOptions(num_inference_steps=2, height=64, width=64)
    assert sample(tiny_unet, make_embeds(1), options, latents=torch.zeros(1, 4, 7, 9)).shape == (1, 4, 7, 9)


def test_text_of_another_width(tiny_unet):
    from kolors_nodes.kolors.prompts import PromptEmbeds

    wide, pooled = torch.zeros(1, 256, 64), torch.zeros(1, 64)
    embeds = PromptEmbeds(
        prompt_embeds=wide,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=wide,
        negative_pooled_prompt_embeds=pooled,
    )
    with pytest.raises(ValueError, match="64 wide, this UNet reads 32"):
        sample(tiny_unet, embeds, SamplingOptions(height=64, width=64))
