"""The VAE from a diffusers folder and from one file in either naming."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from kolors_nodes.kolors import vae as vae_module
from kolors_nodes.kolors.checkpoint import CheckpointError
from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, VAE, get_ldm_names, load_vae

from .conftest import seed_weights_

TINY_VAE = {**SDXL_VAE_CONFIG, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def autoencoder():
    from diffusers import AutoencoderKL

    return seed_weights_(AutoencoderKL.from_config(dict(TINY_VAE)).eval())


@pytest.fixture
def folder(tmp_path, autoencoder):
    (tmp_path / "config.json").write_text(json.dumps(TINY_VAE))
    save_file(autoencoder.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path


@torch.no_grad()
def test_decodes_and_encodes_as_diffusers(folder, autoencoder):
    vae = load_vae(folder)
    latents = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    pictures = vae.decode(latents)
    assert pictures.shape == (2, 24, 40, 3)
    expected = (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    # One picture at a time here, both at once there: sums in another order.
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    expected = autoencoder.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(vae.encode(pictures), expected, rtol=1e-4, atol=1e-5)


def test_encode_crops_to_cells_and_drops_alpha(folder):
    vae = load_vae(folder)
    pictures = torch.rand(1, 30, 45, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.encode(pictures), vae.encode(pictures[:, 3:27, 2:42, :3]))


def test_reads_the_original_naming(tmp_path, folder, autoencoder, monkeypatch):
    """One LDM file, with a checkpoint's prefix, convolutions for the attention and parts that are not the VAE's."""
    monkeypatch.setattr(vae_module, "SDXL_VAE_CONFIG", TINY_VAE)
    weights = autoencoder.state_dict()
    ldm = {}
    for ldm_name, name in get_ldm_names(autoencoder).items():
        tensor = weights[name]
        is_attention = "mid.attn_1" in ldm_name and tensor.dim() == 2
        ldm[f"first_stage_model.{ldm_name}"] = (tensor[:, :, None, None] if is_attention else tensor).contiguous()
    ldm["first_stage_model.loss.logvar"] = torch.zeros(1)
    save_file(ldm, tmp_path / "ldm.safetensors")
    loaded = load_vae(tmp_path / "ldm.safetensors").autoencoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_ldm_names_are_those_of_diffusers_own_converter():
    """Full size, names and shapes only: diffusers' converter turns each of our LDM names into our name."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    with torch.device("meta"):
        full = AutoencoderKL.from_config(dict(SDXL_VAE_CONFIG))
    shapes = full.state_dict()
    names = get_ldm_names(full)
    assert sorted(names.values()) == sorted(shapes)
    tagged = {}
    for number, (ldm_name, name) in enumerate(sorted(names.items())):
        trailing = (1, 1) if "mid.attn_1" in ldm_name and shapes[name].dim() == 2 else ()
        tagged[ldm_name] = torch.full((1, 1, *trailing), float(number))
    converted = convert_ldm_vae_checkpoint(dict(tagged), dict(full.config))
    assert {name: float(tensor.flatten()[0]) for name, tensor in converted.items()} == {
        names[ldm_name]: float(tensor.flatten()[0]) for ldm_name, tensor in tagged.items()
    }


def test_wrong_latents(autoencoder):
    with pytest.raises(ValueError, match=r"this VAE takes \(batch, 4"):
        VAE(autoencoder).decode(torch.zeros(1, 16, 8, 8))


def test_not_a_vae(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="Expected as the VAE: a VAE of SDXL's kind, sdxl.vae.safetensors of madebyollin"):
        load_vae(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="VAE not found"):
        load_vae(tmp_path / "nowhere.safetensors")
