"""Stand-ins for core nodes: the same numbers, files and metadata as ComfyUI's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from kolors_nodes.headless import HeadlessHost, Runner
from kolors_nodes.headless.host import use_host
from kolors_nodes.headless.resampling import resample
from kolors_nodes.headless.stand_ins import (
    NODE_CLASS_MAPPINGS,
    EmptyLatentImage,
    ImageScale,
    LatentUpscale,
    LoadImage,
    LoadLatent,
    PreviewImage,
    SaveImage,
    SaveLatent,
    VAEDecode,
    VAEEncode,
    VAELoader,
)


@pytest.fixture
def host(tmp_path):
    host = HeadlessHost(
        models_dir=tmp_path / "models", input_dir=tmp_path / "input", output_dir=tmp_path / "out", device="cpu"
    )
    host.input_dir.mkdir()
    with use_host(host):
        yield host


# Names, order, ranges and defaults that saved workflows rely on, from ComfyUI 0.3.64.
SURFACE = {
    "VAELoader": (["vae_name"], ("VAE",)),
    "VAEDecode": (["samples", "vae"], ("IMAGE",)),
    "VAEEncode": (["pixels", "vae"], ("LATENT",)),
    "EmptyLatentImage": (["width", "height", "batch_size"], ("LATENT",)),
    "LatentUpscale": (["samples", "upscale_method", "width", "height", "crop"], ("LATENT",)),
    "LoadImage": (["image"], ("IMAGE", "MASK")),
    "SaveImage": (["images", "filename_prefix"], ()),
    "PreviewImage": (["images"], ()),
    "ImageScale": (["image", "upscale_method", "width", "height", "crop"], ("IMAGE",)),
    "SaveLatent": (["samples", "filename_prefix"], ()),
    "LoadLatent": (["latent"], ("LATENT",)),
}


def test_the_surface_is_that_of_comfyui(host):
    found = {
        name: (list(kind.INPUT_TYPES()["required"]), kind.RETURN_TYPES) for name, kind in NODE_CLASS_MAPPINGS.items()
    }
    assert found == SURFACE
    assert LatentUpscale.INPUT_TYPES()["required"]["width"] == (
        "INT", {"default": 512, "min": 0, "max": 16384, "step": 8}
    )  # fmt: skip
    assert EmptyLatentImage.INPUT_TYPES()["required"]["width"][1]["min"] == 16


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic"])
@pytest.mark.parametrize("size", [(24, 16), (5, 7)])
def test_resampling_is_torchs(method, size):
    samples = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    width, height = size
    expected = torch.nn.functional.interpolate(samples, size=(height, width), mode=method)
    assert torch.equal(resample(samples, width, height, method, "disabled"), expected)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((8, 8), slice(0, 8), slice(2, 14)), ((16, 4), slice(2, 6), slice(0, 16)), ((16, 8), slice(0, 8), slice(0, 16))],
)
def test_crop_center_cuts_the_longer_side_evenly(size, rows, columns):
    # Source 16 x 8 cells: to a square it keeps the middle 8 columns, to 4:1 the middle 4 rows.
    samples = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    if size == (8, 8):
        columns = slice(4, 12)
    expected = torch.nn.functional.interpolate(samples[..., rows, columns], size=size[::-1], mode="bilinear")
    assert torch.equal(resample(samples, *size, "bilinear", "center"), expected)


def test_bislerp_equals_comfyuis():
    # First 12 values of comfy.utils.bislerp(x, 4, 3) of ComfyUI 0.3.64 for this x; float32 rounding across CPUs.
    x = torch.linspace(-1, 1, 24).reshape(2, 2, 2, 3).sin() * 3 + torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1)
    expected = [
        -2.0244128704071045, -1.9311805963516235, -1.8117526769638062, -1.7058545351028442,
        -1.7798084020614624, -1.6712583303451538, -1.534226417541504, -1.414260983467102,
        -1.5209364891052246, -1.3966370820999146, -1.2414017915725708, -1.1067981719970703,
    ]  # fmt: skip
    found = resample(x, 4, 3, "bislerp", "disabled")
    assert found.shape == (2, 2, 3, 4)
    torch.testing.assert_close(found.flatten()[:12], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_bislerp_keeps_a_constant_and_survives_zeros():
    constant = torch.full((1, 4, 3, 3), 0.7)
    torch.testing.assert_close(resample(constant, 6, 5, "bislerp", "disabled"), torch.full((1, 4, 5, 6), 0.7))
    assert torch.equal(resample(torch.zeros(1, 4, 3, 3), 6, 5, "bislerp", "disabled"), torch.zeros(1, 4, 5, 6))


def test_lanczos_is_pillows():
    picture = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    pixels = (picture[0].movedim(0, -1).numpy() * 255).astype(np.uint8)
    expected = np.array(Image.fromarray(pixels).resize((20, 8), Image.Resampling.LANCZOS)) / 255
    found = resample(picture, 20, 8, "lanczos", "disabled")[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 of the same 8-bit values


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(256, 128, (16, 32)), (0, 128, (16, 24)), (256, 0, (21, 32)), (8, 8, (8, 8))],
)
def test_latent_upscale_takes_pixels_and_keeps_the_rest_of_the_latent(width, height, expected):
    latent = {"samples": torch.zeros(1, 4, 8, 12), "batch_index": [3]}
    (result,) = LatentUpscale().upscale(latent, "bilinear", width, height, "disabled")
    assert tuple(result["samples"].shape[-2:]) == expected
    assert result["batch_index"] == [3]
    assert latent["samples"].shape[-1] == 12
    assert LatentUpscale().upscale(latent, "bilinear", 0, 0, "disabled") == (latent,)


def test_image_scale_takes_channels_last():
    image = torch.rand(1, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    assert ImageScale().upscale(image, "area", 0, 16, "disabled")[0].shape == (1, 16, 24, 3)
    assert ImageScale().upscale(image, "area", 6, 0, "disabled")[0].shape == (1, 4, 6, 3)
    assert ImageScale().upscale(image, "area", 0, 0, "disabled")[0] is image


def test_empty_latents():
    (latent,) = EmptyLatentImage().generate(64, 40, 3)
    assert torch.equal(latent["samples"], torch.zeros(3, 4, 5, 8))


class DoublingVAE:
    """Stands for a VAE: eight times the size, and back."""

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)

    def encode(self, pictures):
        assert pictures.shape[-1] == 3
        return pictures.movedim(-1, 1)[..., ::8, ::8]


def test_vae_nodes_hand_on_raw_latents():
    latents = torch.rand(2, 4, 3, 5)
    (pictures,) = VAEDecode().decode(DoublingVAE(), {"samples": latents})
    assert pictures.shape == (2, 24, 40, 3)
    with_alpha = torch.cat([pictures, torch.ones(2, 24, 40, 1)], -1)
    (encoded,) = VAEEncode().encode(DoublingVAE(), with_alpha)
    assert torch.equal(encoded["samples"], latents[:, :3])


def test_the_vae_loader_lists_the_vae_folder(host):
    (host.models_dir / "vae").mkdir(parents=True)
    (host.models_dir / "vae" / "sdxl.vae.safetensors").write_bytes(b"")
    assert VAELoader.INPUT_TYPES()["required"]["vae_name"] == (["sdxl.vae.safetensors"],)


def test_saved_pictures_carry_prompt_and_workflow(host):
    pictures = torch.tensor([0.0, 0.5, 1.0]).expand(2, 8, 4, 3)
    prompt, workflow = {"1": {"class_type": "X", "inputs": {"text": "红色"}}}, {"nodes": [], "note": "é"}
    shown = SaveImage().save_images(pictures, "sub/pic", prompt=prompt, extra_pnginfo={"workflow": workflow})
    assert shown == {
        "ui": {
            "images": [
                {"filename": "pic_00001_.png", "subfolder": "sub", "type": "output"},
                {"filename": "pic_00002_.png", "subfolder": "sub", "type": "output"},
            ]
        }
    }
    with Image.open(host.output_dir / "sub" / "pic_00001_.png") as saved:
        assert (saved.size, saved.mode) == ((4, 8), "RGB")
        assert saved.getpixel((0, 0)) == (0, 127, 255)  # truncated, as ComfyUI does
        assert json.loads(saved.text["prompt"]) == prompt
        assert json.loads(saved.text["workflow"]) == workflow
        assert saved.text["prompt"] == json.dumps(prompt)
    assert sorted(path.name for path in (host.output_dir / "sub").iterdir()) == ["pic_00001_.png", "pic_00002_.png"]


def test_a_picture_that_cannot_be_written_leaves_no_file(host, monkeypatch):
    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        SaveImage().save_images(torch.zeros(1, 4, 4, 3))
    assert list(host.output_dir.iterdir()) == []


def test_previews_go_to_the_temp_folder(host):
    shown = PreviewImage().save_images(torch.zeros(1, 4, 4, 3))["ui"]["images"][0]
    assert shown["type"] == "temp"
    assert shown["filename"].startswith("ComfyUI_temp_")
    assert (host.temp_dir / shown["filename"]).is_file()


def test_a_prefix_never_leads_out_of_the_output_folder(stubs, tmp_path):
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../outside"}},
    }

    class EmptyImage:
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "make"

        @classmethod
        def INPUT_TYPES(cls):
            return {}

        def make(self):
            return (torch.zeros(1, 4, 4, 3),)

    result = Runner({"EmptyImage": EmptyImage}, output_dir=tmp_path / "out").run(prompt)
    assert result.error["exception_type"] == "ValueError"
    assert "filename_prefix" in result.error["exception_message"]
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_loaded_upright_with_their_mask(host):
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[..., 3] = 51  # opaque to a fifth
    Image.fromarray(pixels).save(host.input_dir / "alpha.png")
    picture, mask = LoadImage().load_image("alpha.png")
    assert (picture.shape, mask.shape) == ((1, 4, 6, 3), (1, 4, 6))
    assert torch.equal(picture[0, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(mask, torch.full((1, 4, 6), 0.8))

    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to show
    Image.new("RGB", (6, 4)).save(host.input_dir / "turned.jpg", exif=exif)
    picture, mask = LoadImage().load_image("turned.jpg")
    assert picture.shape == (1, 6, 4, 3)
    assert torch.equal(mask, torch.zeros(1, 64, 64))


def test_frames_of_an_animation_are_a_batch(host):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(host.input_dir / "moving.png", save_all=True, append_images=frames[1:])
    picture, mask = LoadImage().load_image("moving.png")
    assert (picture.shape, mask.shape) == ((2, 4, 4, 3), (2, 64, 64))


def test_load_image_looks_at_the_content(host):
    Image.new("RGB", (4, 4), "red").save(host.input_dir / "a.png")
    before = LoadImage.IS_CHANGED("a.png")
    Image.new("RGB", (4, 4), "red").save(host.input_dir / "a.png")
    assert LoadImage.IS_CHANGED("a.png") == before
    Image.new("RGB", (4, 4), "blue").save(host.input_dir / "a.png")
    assert LoadImage.IS_CHANGED("a.png") != before
    assert LoadImage.INPUT_TYPES()["required"]["image"][0] == ["a.png"]


def test_a_missing_picture_is_told_with_where_it_was_looked_for(host):
    message = LoadImage.VALIDATE_INPUTS("absent.png")
    assert str(host.input_dir / "absent.png") in message
    assert "outside its folder" in LoadImage.VALIDATE_INPUTS("../absent.png")


def test_a_damaged_picture_is_told_with_its_path(host):
    Image.effect_noise((64, 64), 50).save(host.input_dir / "whole.png")
    (host.input_dir / "cut.png").write_bytes((host.input_dir / "whole.png").read_bytes()[:900])
    (host.input_dir / "no.png").write_text("no picture")
    for name in ("cut.png", "no.png"):
        with pytest.raises(ValueError, match=f"{name} is damaged or no picture"):
            LoadImage().load_image(name)


def test_latents_are_saved_and_loaded_in_comfyuis_format(host):
    latents = torch.randn(1, 4, 4, 4)
    shown = SaveLatent().save({"samples": latents}, "latents/x", prompt={"1": {}})["ui"]["latents"][0]
    path = host.output_dir / shown["subfolder"] / shown["filename"]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"latent_tensor", "latent_format_version_0"}
        assert file.metadata() == {"prompt": '{"1": {}}'}
    path.rename(host.input_dir / "x.latent")
    assert LoadLatent.INPUT_TYPES()["required"]["latent"] == (["x.latent"],)
    assert torch.equal(LoadLatent().load("x.latent")[0]["samples"], latents)
    save_file({"latent_tensor": latents}, host.input_dir / "old.latent")
    assert torch.equal(LoadLatent().load("old.latent")[0]["samples"], latents * (1 / 0.18215))


def test_damaged_latents_are_told_with_their_path(host):
    (host.input_dir / "x.latent").write_bytes(b"\x10\0\0\0\0\0\0\0cut")
    with pytest.raises(ValueError, match=r"x\.latent is damaged"):
        LoadLatent().load("x.latent")
    save_file({"other": torch.zeros(1)}, host.input_dir / "y.latent")
    with pytest.raises(ValueError, match="expected latent_tensor"):
        LoadLatent().load("y.latent")
