"""The little dataset to train on is what its script makes, and keeps its promises."""

from __future__ import annotations

import numpy as np
from PIL import Image

from kolors_nodes.demo.recipe.captions import COMBINATIONS
from kolors_nodes.demo.recipe.lora_dataset import (
    DATASET_FOLDER,
    NEW_SHAPE,
    SHOWN_COLOURS,
    UNSHOWN_COLOURS,
    choose_captions,
    choose_new_prompts,
    list_regularization_prompts,
    write_dataset,
)


def test_the_script_makes_what_is_committed(tmp_path):
    write_dataset(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in DATASET_FOLDER.iterdir())
    assert (tmp_path / "metadata.csv").read_bytes() == (DATASET_FOLDER / "metadata.csv").read_bytes()
    for name in names[:-1]:  # pixels: other releases of Pillow may pack them otherwise
        assert np.array_equal(Image.open(tmp_path / name), Image.open(DATASET_FOLDER / name))


def test_the_shape_is_new_and_two_colours_are_kept_back():
    assert NEW_SHAPE not in {combination.shape for combination in COMBINATIONS}
    assert {named.colour for _, named in choose_captions()} == set(SHOWN_COLOURS)
    assert len(UNSHOWN_COLOURS) == 2


def test_prompts_of_the_judge_are_different_and_in_two_languages():
    for colours in (SHOWN_COLOURS, UNSHOWN_COLOURS):
        prompts = [prompt for prompt, _ in choose_new_prompts(colours)]
        assert len(set(prompts)) == 24
        assert sum(prompt.isascii() for prompt in prompts) == 12
    assert not any("cross" in prompt or "十字" in prompt for prompt in list_regularization_prompts())
