"""Names of single files against diffusers' own converter. DiffSynth's and the full-size map are tested with LoRAs."""

from __future__ import annotations

import pytest
import torch

from kolors_nodes.kolors.unet import KOLORS_UNET_CONFIG, build_unet
from kolors_nodes.kolors.unet_names import iterate_module_names, rename_tensors

from .conftest import TINY_UNET


@pytest.fixture(scope="module")
def sgm_file(tiny_unet):
    """The tiny UNet as ComfyUI saves it in a whole checkpoint, beside parts that are none of the UNet's."""
    names = {name: sgm for name, sgm, _ in iterate_module_names(tiny_unet)}
    tensors = {"first_stage_model.decoder.conv_in.weight": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}
    for name, tensor in tiny_unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        tensors[f"model.diffusion_model.{names[module]}.{kind}"] = tensor
    return tensors


def test_sgm_names_become_diffusers_(sgm_file, tiny_unet):
    expected = tiny_unet.state_dict()
    renamed = dict(rename_tensors(sgm_file.items(), build_unet(TINY_UNET, device="meta")))
    assert list(renamed) == list(expected)
    assert all(renamed[name] is sgm_file_tensor for name, sgm_file_tensor in zip(
        expected, list(sgm_file.values())[2:], strict=True
    ))  # fmt: skip


def test_agrees_with_diffusers_converter(sgm_file, tiny_unet):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    converted = convert_ldm_unet_checkpoint(dict(sgm_file), config=dict(tiny_unet.config))
    renamed = dict(rename_tensors(sgm_file.items(), tiny_unet))
    del renamed["encoder_hid_proj.weight"], renamed["encoder_hid_proj.bias"]  # SDXL has none
    assert set(converted) == set(renamed)
    assert all(converted[name] is renamed[name] for name in renamed)


@pytest.mark.parametrize("prefix", ["", "unet.", "model.diffusion_model."])
def test_diffusers_names_stay_and_prefixes_go(prefix, tiny_unet):
    tensors = {prefix + name: tensor for name, tensor in tiny_unet.state_dict().items()}
    assert list(dict(rename_tensors(tensors.items(), tiny_unet))) == list(tiny_unet.state_dict())


def test_unknown_names_pass_for_the_loader_to_name_them(tiny_unet):
    tensors = {"model.diffusion_model.extra.weight": torch.zeros(1)}
    assert list(dict(rename_tensors(tensors.items(), tiny_unet))) == list(tensors)


def test_every_name_of_the_full_size_has_one_in_sgm():
    names = list(iterate_module_names(build_unet(KOLORS_UNET_CONFIG, device="meta")))
    assert len({sgm for _, sgm, _ in names}) == len(names)
