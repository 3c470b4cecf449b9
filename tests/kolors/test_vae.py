"""The VAE from a diffusers folder and from one file in either naming."""

from __future__ import annotations

import copy
import json
import logging
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kolors_nodes.kolors import vae as vae_module
from kolors_nodes.kolors.bands import decode_in_bands, encode_in_bands
from kolors_nodes.kolors.checkpoint import CheckpointError
from kolors_nodes.kolors.vae import SDXL_VAE_CONFIG, VAE, PlainAutoencoder, get_ldm_names, load_vae

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
    # One picture at a time here, both at once there, and other kernels for doubling: sums in another order.
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
    with pytest.raises(
        CheckpointError, match="Expected as the VAE: a VAE of SDXL's kind, sdxl.vae.safetensors of madebyollin"
    ):
        load_vae(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="VAE not found"):
        load_vae(tmp_path / "nowhere.safetensors")


@torch.no_grad()
def test_a_batch_gives_the_bits_of_single_pictures(folder):
    """In any memory layout: ComfyUI hands on pictures whose channels lie side by side."""
    vae = load_vae(folder)
    pictures = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(pictures)
    assert torch.equal(latents, torch.cat([vae.encode(picture[None]) for picture in pictures]))
    network = PlainAutoencoder(vae.autoencoder)
    assert torch.equal(latents, network.encode(pictures.movedim(-1, 1) * 2 - 1))
    assert torch.equal(vae.decode(latents), torch.cat([vae.decode(latent[None]) for latent in latents]))
    assert torch.equal(vae.decode(latents), vae.decode(latents.to(memory_format=torch.channels_last)))


def test_a_vae_that_overflows_in_half_precision_is_decoded_in_float32(autoencoder, caplog):
    """As SDXL's original one: its activations leave float16's range, which ends at 65504."""
    autoencoder = copy.deepcopy(autoencoder)
    autoencoder.decoder.conv_in.weight.data *= 1e6
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = VAE(copy.deepcopy(autoencoder)).decode(latents)
    vae = VAE(autoencoder, dtype=torch.float16)
    with caplog.at_level(logging.INFO):
        assert torch.equal(vae.decode(latents), expected)
        assert torch.equal(vae.decode(latents), expected)
    assert expected.std() > 0.01
    assert caplog.text.count("overflows in torch.float16: decoding in float32") == 1


def test_a_vae_that_does_not_overflow_is_decoded_in_half_precision(autoencoder, caplog):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = VAE(copy.deepcopy(autoencoder)).decode(latents)
    with caplog.at_level(logging.INFO):
        pictures = VAE(copy.deepcopy(autoencoder), dtype=torch.float16).decode(latents)
    assert not caplog.text and pictures.dtype == torch.float32
    assert 0 < (pictures - expected).abs().max() < 0.02  # eleven bits of mantissa through some thirty layers


@pytest.fixture
def short_of_memory(monkeypatch):
    monkeypatch.setattr(vae_module, "get_free_memory", lambda device: 0)


# Measured: 3e-6 of latents up to 5 and 4e-7 of pictures; float32, norms' statistics are summed in another order.
BAND_TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 128), (72, 40)])
@pytest.mark.parametrize("band_size", [1, 5_000, 100_000_000])
@torch.no_grad()
def test_bands_give_the_whole_picture(autoencoder, height, width, band_size):
    """From one row at a time to all at once, against diffusers' pass."""
    picture = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = autoencoder.encode(picture).latent_dist.mode()
    torch.testing.assert_close(encode_in_bands(autoencoder, picture, band_size), latent, **BAND_TOLERANCE)
    expected = autoencoder.decode(latent).sample
    torch.testing.assert_close(decode_in_bands(autoencoder, latent, band_size), expected, **BAND_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bands_where_memory_is_short(autoencoder, short_of_memory, monkeypatch, caplog, dtype):
    latents = torch.randn(2, 4, 12, 24, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.INFO):
        pictures = VAE(copy.deepcopy(autoencoder), dtype=dtype).decode(latents)
        encoded = VAE(copy.deepcopy(autoencoder)).encode(pictures)
    assert caplog.text.count("in bands") == 4
    monkeypatch.setattr(vae_module, "get_free_memory", lambda device: 1 << 40)
    # In half precision both sides round after every layer, not in the same places.
    tolerance = BAND_TOLERANCE if dtype == torch.float32 else {"rtol": 0, "atol": 0.01}
    torch.testing.assert_close(VAE(copy.deepcopy(autoencoder), dtype=dtype).decode(latents), pictures, **tolerance)
    torch.testing.assert_close(VAE(copy.deepcopy(autoencoder)).encode(pictures), encoded, **BAND_TOLERANCE)


def test_the_memory_that_a_pass_takes():
    """Counted on full-size layers without data: what the estimate says, and what it was derived from."""
    autoencoder = vae_module.build_autoencoder(device="meta")
    with torch.no_grad(), Live() as live:
        autoencoder.decode(torch.empty(1, 4, 64, 64, device="meta"))
    numbers = live.peak / 4 / 512**2 / 128
    assert numbers < vae_module.NUMBERS_PER_CHANNEL < 1.5 * numbers


def test_a_card_that_runs_out_all_the_same_takes_bands(autoencoder, monkeypatch):
    """What other programs take changes under the estimate."""
    vae = VAE(copy.deepcopy(autoencoder))
    latents = torch.randn(1, 4, 12, 24, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)

    def run_out(*_, **__):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(vae.autoencoder, "decode", run_out)
    torch.testing.assert_close(vae.decode(latents), expected, **BAND_TOLERANCE)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result
