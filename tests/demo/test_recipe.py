"""The recipe: pictures, captions and splits are what they claim, and each training step learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kolors_nodes.demo.recipe import unet as unet_recipe
from kolors_nodes.demo.recipe import vae as vae_recipe
from kolors_nodes.demo.recipe.captions import (
    COMBINATIONS,
    HELD_OUT,
    LANGUAGES,
    SEEN,
    draw_caption,
    get_captions,
)
from kolors_nodes.demo.recipe.evaluate import choose_prompts, get_overlap
from kolors_nodes.demo.recipe.shapes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Placement,
    draw_placement,
    get_outline,
    render,
)
from kolors_nodes.demo.recipe.tokenizer import get_corpus


def test_split_keeps_every_pair_in_training():
    assert len(COMBINATIONS) == len(SEEN) + len(HELD_OUT) == 72
    assert len(HELD_OUT) == 12
    assert {(c.shape, c.colour) for c in SEEN} == {(s, c) for s in SHAPES for c in COLOURS}
    assert {(c.shape, c.background) for c in SEEN} == {(s, b) for s in SHAPES for b in BACKGROUNDS}
    assert {(c.colour, c.background) for c in SEEN} == {(c, b) for c in COLOURS for b in BACKGROUNDS}


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_captions_are_in_no_corpus(language):
    corpus = set(get_corpus())
    held_out = [caption for combination in HELD_OUT for caption in get_captions(combination, language)]
    assert held_out and not corpus.intersection(held_out)


def test_captions_are_reproducible():
    first, second = ([draw_caption(SEEN[5], np.random.default_rng(3)) for _ in range(4)] for _ in range(2))
    assert first == second


def test_prompts_differ_and_cover_the_combinations():
    chosen = choose_prompts(HELD_OUT, "zh", 24, np.random.default_rng(0))
    assert len({prompt for prompt, _ in chosen}) == 24
    assert {combination for _, combination in chosen} == set(HELD_OUT)


def test_render_paints_the_named_colours():
    picture = render("circle", "red", "grey", Placement())
    assert picture.shape == (128, 128, 3)
    assert tuple(picture[64, 64]) == COLOURS["red"]
    assert tuple(picture[2, 2]) == BACKGROUNDS["grey"]


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="no shape 'cube'"):
        get_outline("cube")


@pytest.mark.parametrize("combination", [SEEN[0], SEEN[25], SEEN[40], SEEN[-1]])
def test_overlap_of_a_perfect_picture(combination):
    rng = np.random.default_rng(5)
    picture = render(combination.shape, combination.colour, combination.background, draw_placement(rng))
    # Whole-pixel positions and 2-pixel diameters leave half a pixel of doubt around the outline.
    assert get_overlap(picture, combination) > 0.96


def test_overlap_falls_with_another_shape_or_colour():
    star = next(c for c in SEEN if (c.shape, c.background) == ("star", "white"))
    as_square = replace(star, shape="square")
    assert get_overlap(render(star.shape, star.colour, star.background, Placement()), as_square) < 0.7
    empty = np.full((128, 128, 3), 255.0)
    assert get_overlap(empty, star) == 0


def test_copy_path_returns_noise_at_the_start():
    torch.manual_seed(0)
    unet = unet_recipe.build_unet()
    noise = torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        predicted = unet(
            noise,
            1000,
            torch.randn(4, 5, unet_recipe.HIDDEN_SIZE),
            added_cond_kwargs={
                "text_embeds": torch.randn(4, unet_recipe.HIDDEN_SIZE),
                "time_ids": unet_recipe.get_time_ids(4),
            },
        ).sample
    # Exact up to the group norm, which takes each picture's own deviation for 1.
    assert (predicted - noise).square().mean() < 0.02


def test_folded_time_ids():
    torch.manual_seed(0)
    unet = unet_recipe.build_unet()
    inputs = (torch.randn(1, 4, 16, 16), 500, torch.randn(1, 5, unet_recipe.HIDDEN_SIZE))
    pooled, native = torch.randn(1, unet_recipe.HIDDEN_SIZE), unet_recipe.get_time_ids(1)

    def predict(time_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return unet(*inputs, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample

    before, other = predict(native), predict(native * 2)
    assert not torch.allclose(before, other, atol=1e-3)
    unet_recipe.fold_time_ids_(unet)
    # Equal but for float32 rounding of one sum.
    torch.testing.assert_close(predict(native), before, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predict(native * 2), before, atol=1e-5, rtol=1e-4)


def test_folded_statistics():
    torch.manual_seed(0)
    vae = vae_recipe.build_vae().eval()
    pictures = vae_recipe.to_tensor([render("star", "red", "white", Placement())])
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        vae_recipe.fold_statistics_(vae, np.random.default_rng(1), count=16)
        latents = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latents).sample
    # The fold cancels out; float32 rounding is what is left of it.
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    assert (latents * vae.config.scaling_factor).abs().max() < 20


def test_unet_training_lowers_the_loss():
    torch.manual_seed(0)
    options = unet_recipe.UNetOptions(batch_size=8, compile=False)
    count = len(SEEN) * 2
    data = unet_recipe.TrainingData(
        latents=torch.randn(4, 1, 1, 1).repeat(1, 4, 16, 16),
        combination=torch.arange(4),
        rows=torch.randn(count + 2, 5, unet_recipe.HIDDEN_SIZE),
        mask=torch.ones(count + 2, 5),
        pooled=torch.randn(count + 2, unet_recipe.HIDDEN_SIZE),
        captions_per_combination=2,
    )
    unet = unet_recipe.build_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    alphas_cumprod = unet_recipe.build_scheduler().alphas_cumprod
    losses = []
    for _ in range(12):
        # The same batch again and again, so that noise between batches cannot hide what is learned.
        loss = unet_recipe.get_loss(unet, data, alphas_cumprod, options, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
