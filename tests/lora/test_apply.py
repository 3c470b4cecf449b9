"""Applying: pictures as diffusers' pipeline draws them, and bit for bit nothing else changed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from kolors_nodes.kolors.compact import CompactLayer
from kolors_nodes.kolors.offload import stream_weights
from kolors_nodes.kolors.options import SamplingOptions
from kolors_nodes.kolors.prompts import PromptEmbeds
from kolors_nodes.kolors.sampling import sample
from kolors_nodes.kolors.schedulers import build_scheduler
from kolors_nodes.kolors.unet import compact_
from kolors_nodes.lora.adapters import Difference, LowRank
from kolors_nodes.lora.apply import apply_loras
from kolors_nodes.lora.files import load_lora, save_lora
from kolors_nodes.lora.formats import Lora, LoraError
from kolors_nodes.lora.names import get_kolors_names, get_unet_names
from kolors_nodes.lora.options import TrainingOptions
from kolors_nodes.lora.trainee import build_trainee

from .conftest import is_matrix

# float32 both; diffusers adds the LoRA's output to the layer's, here the products are in the weight. Measured up to
# 2e-6 over these steps.
TOLERANCE = 1e-4
OPTIONS = SamplingOptions(num_inference_steps=4, guidance_scale=5.0, height=64, width=64, seed=7)
FILES = [("diffusers", "safetensors"), ("kohya", "safetensors"), ("diffsynth", "safetensors"), ("diffsynth", "ckpt")]


def relative_error(actual, expected) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def embeds():
    generator = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (1, 256, 32), "pooled_prompt_embeds": (1, 32)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return PromptEmbeds(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def draw_with_diffusers(unet, embeds):
    """diffusers' KolorsPipeline with files loaded by its own load_lora_weights."""
    from diffusers import KolorsPipeline

    def draw(paths_and_strengths) -> torch.Tensor:
        pipeline = KolorsPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=copy.deepcopy(unet),
            scheduler=build_scheduler(OPTIONS.scheduler),
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)
        for index, (path, _) in enumerate(paths_and_strengths):
            pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{index}")
        names = [f"lora{index}" for index in range(len(paths_and_strengths))]
        pipeline.set_adapters(names, [strength for _, strength in paths_and_strengths])
        return pipeline(
            **vars(embeds), height=64, width=64, num_inference_steps=4, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(7), output_type="latent",
        ).images  # fmt: skip

    return draw


@pytest.fixture(scope="module")
def saved(tmp_path_factory, names, make_lora):
    """Two LoRAs of different rank and alpha, as diffusers files; the first also on convolutions and embeddings."""
    folder = tmp_path_factory.mktemp("loras")
    loras = [
        make_lora(names, rank=4, alpha=6.0, chosen=lambda module: len(module.shape) > 1),
        make_lora(names, rank=8, alpha=2.0, seed=1),
    ]
    return [save_lora(lora, folder / f"{index}.safetensors", "diffusers") for index, lora in enumerate(loras)]


@pytest.mark.parametrize("strength", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_one_lora_equals_diffusers(unet, names, embeds, saved, draw_with_diffusers, strength):
    patched = apply_loras(unet, [(load_lora(saved[0], names), strength)])
    actual = sample(patched, embeds, OPTIONS)
    assert relative_error(actual, draw_with_diffusers([(saved[0], strength)])) <= TOLERANCE
    base = sample(unet, embeds, OPTIONS)
    assert torch.equal(actual, base) == (strength == 0)


def test_two_loras_equal_diffusers(unet, names, embeds, saved, draw_with_diffusers):
    strengths = (0.75, -0.5)
    loras = [(load_lora(path, names), strength) for path, strength in zip(saved, strengths, strict=True)]
    actual = sample(apply_loras(unet, loras), embeds, OPTIONS)
    expected = draw_with_diffusers(list(zip(saved, strengths, strict=True)))
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_files_that_diffusers_reads_give_it_the_same_pictures(
    unet, names, make_lora, embeds, tmp_path, draw_with_diffusers, file_format
):
    """Alpha arrives too. On attention alone: diffusers' kohya converter does not know every layer."""
    lora = make_lora(names, rank=4, alpha=6.0)
    path = save_lora(lora, tmp_path / "lora.safetensors", file_format)
    actual = sample(apply_loras(unet, [(lora, 1.0)]), embeds, OPTIONS)
    assert relative_error(actual, draw_with_diffusers([(path, 1.0)])) <= TOLERANCE


def test_dora_files_of_ours_in_diffusers(unet, names, make_lora, embeds, tmp_path, draw_with_diffusers):
    plain = make_lora(names, rank=4, alpha=6.0)
    generator = torch.Generator().manual_seed(5)
    lora = Lora(names=names, adapters={
        name: LowRank(down=adapter.down, up=adapter.up, alpha=6.0,
                      magnitude=torch.rand(adapter.up.shape[0], 1, generator=generator) + 0.3)
        for name, adapter in plain.adapters.items()
    })  # fmt: skip
    path = save_lora(lora, tmp_path / "dora.safetensors", "diffusers")
    actual = sample(apply_loras(unet, [(lora, 1.0)]), embeds, OPTIONS)
    assert relative_error(actual, draw_with_diffusers([(path, 1.0)])) <= TOLERANCE


def test_every_format_gives_the_same_bits(unet, names, make_lora, embeds, tmp_path):
    lora = make_lora(names, rank=4, alpha=6.0, chosen=lambda module: len(module.shape) > 1)
    expected = sample(apply_loras(unet, [(lora, 0.7)]), embeds, OPTIONS)
    for file_format, suffix in FILES:
        path = save_lora(lora, tmp_path / f"{file_format}.{suffix}", file_format)
        assert torch.equal(sample(apply_loras(unet, [(load_lora(path, names), 0.7)]), embeds, OPTIONS), expected)


def get_bits(unet) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_base_keeps_every_bit_and_every_object(unet, names, make_lora, dtype):
    base = copy.deepcopy(unet).to(dtype)
    before, objects = get_bits(base), dict(base.named_parameters())
    first, second = make_lora(names, seed=1), make_lora(names, seed=2)
    branches = [apply_loras(base, [(first, 1.0)]), apply_loras(base, [(second, -2.0)])]
    assert dict(base.named_parameters()).keys() == objects.keys()
    assert all(parameter is objects[name] for name, parameter in base.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    for name, parameter in branches[0].named_parameters():
        other = branches[1].get_parameter(name)
        if name in first.adapters:
            assert parameter.dtype == dtype
            assert not torch.equal(parameter, other)
            assert not torch.equal(parameter, objects[name])
        else:
            assert parameter is other is objects[name]


def test_nothing_to_apply_is_the_base_itself(unet, names, make_lora):
    lora = make_lora(names)
    assert apply_loras(unet, []) is unet
    assert apply_loras(unet, [(lora, 0.0), (lora, 0)]) is unet


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_low_precision_is_rounded_once(unet, names, make_lora, dtype):
    """Two small changes, each below half a step of the number format, add up before they are rounded."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    base = copy.deepcopy(unet)
    weight = base.get_parameter(name).data.to(dtype)
    base.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(weight, requires_grad=False)
    loras = [(make_lora(names, seed=seed, std=0.05), strength) for seed, strength in ((1, 0.3), (2, 0.4))]
    merged = apply_loras(base, loras).get_parameter(name)
    exact = weight.double()
    for lora, strength in loras:
        adapter = lora.adapters[name]
        exact += strength * (adapter.up.double() @ adapter.down.double())
    assert merged.dtype == dtype
    # The best that the format can do, but for float32 sums that fall on the other side of a rounding boundary.
    wrong = (merged.float() != exact.to(dtype).float()).float().mean()
    assert wrong <= 0.001
    assert (merged.float() != weight.float()).any()


def test_quantised_weights_are_refused(unet, names, make_lora):
    base = copy.deepcopy(unet)
    layer = base.mid_block.attentions[0].proj_in
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    lora = make_lora(names, chosen=lambda module: module.diffusers == "mid_block.attentions.0.proj_in")
    with pytest.raises(LoraError, match=r"proj_in.weight is quantised \(torch.int8\).*Load the UNet as fp16"):
        apply_loras(base, [(lora, 1.0)])


@pytest.fixture(params=["fp8", "nf4"])
def compact(request, unet):
    """A UNet with compact weights, and the same in float32 throughout."""
    compact = compact_(copy.deepcopy(unet), request.param, torch.float32)
    plain = copy.deepcopy(unet)
    for name, module in compact.named_modules():
        if isinstance(module, CompactLayer):
            plain.get_submodule(name).weight.data = module.dequantise()
    return compact, plain


def test_loras_on_compact_weights_are_those_on_their_values(compact, names, make_lora, embeds):
    """Of different rank, on linear layers and convolutions, one with a negative strength."""
    base, plain = compact
    assert get_unet_names(base) == names
    loras = [
        (make_lora(names, rank=4, alpha=6.0, chosen=is_matrix), 0.7),
        (make_lora(names, rank=8, alpha=2.0, seed=1), -0.5),
    ]
    actual = sample(apply_loras(base, loras), embeds, OPTIONS)
    # Beside the weight here, in it there: the sums have another order, as with diffusers above.
    assert relative_error(actual, sample(apply_loras(plain, loras), embeds, OPTIONS)) <= TOLERANCE
    assert relative_error(actual, sample(base, embeds, OPTIONS)) > 100 * TOLERANCE


def test_other_adapters_on_compact_weights(compact, names, make_lora, embeds):
    """A difference of a weight and of a bias, and DoRA: such a layer gets a weight in the dtype that computes."""
    base, plain = compact
    generator = torch.Generator().manual_seed(3)
    block = "mid_block.attentions.0.transformer_blocks.0"
    adapters = dict(make_lora(names, rank=4).adapters)
    dora = f"{block}.attn2.to_q.weight"
    adapters[dora] = replace(adapters[dora], magnitude=torch.rand(64, 1, generator=generator) + 0.3)
    for name in (f"{block}.ff.net.2.weight", f"{block}.ff.net.2.bias", "mid_block.resnets.0.conv1.weight"):
        diff = torch.randn(plain.get_parameter(name).shape, generator=generator) * 0.1
        adapters[name] = Difference(diff=diff)
    loras = [(Lora(names=names, adapters=adapters), 0.8)]
    patched = apply_loras(base, loras)
    assert type(patched.get_submodule(f"{block}.ff.net.2")) is torch.nn.Linear
    assert type(patched.get_submodule("mid_block.resnets.0.conv1")) is torch.nn.Conv2d
    expected = sample(apply_loras(plain, loras), embeds, OPTIONS)
    assert relative_error(sample(patched, embeds, OPTIONS), expected) <= TOLERANCE


def test_a_compact_base_keeps_every_bit_and_shares_it(compact, names, make_lora, embeds):
    base, _ = compact
    before, objects = get_bits(base), dict(base.named_parameters())
    first = sample(base, embeds, OPTIONS)
    lora = make_lora(names, chosen=is_matrix)
    patched = apply_loras(base, [(lora, 1.0)])
    sample(patched, embeds, OPTIONS)
    assert all(parameter is objects[name] for name, parameter in base.named_parameters())
    after = base.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), bits.view(torch.uint8)) for name, bits in before.items())
    assert torch.equal(sample(base, embeds, OPTIONS), first)
    own = {name for name, parameter in patched.named_parameters() if parameter is not objects.get(name)}
    branches = {name for name in own if name.endswith((".down", ".up"))}
    plain = {
        name for name in own - branches if not isinstance(base.get_submodule(name.rpartition(".")[0]), CompactLayer)
    }
    assert branches and own == branches | plain
    assert torch.equal(sample(apply_loras(patched, [(lora, 0.0)]), embeds, OPTIONS), sample(patched, embeds, OPTIONS))


@pytest.mark.usefixtures("offloading")
def test_loras_on_a_unet_that_is_offloaded(compact, names, make_lora, embeds):
    """The hooks of an offloaded base reach no copy, and the copy can be offloaded itself."""
    pytest.importorskip("diffusers.hooks.group_offloading", reason="offloading needs diffusers 0.33 or newer")
    base, _ = compact
    loras = [(make_lora(names, chosen=is_matrix), 1.0)]
    expected = sample(apply_loras(base, loras), embeds, OPTIONS)
    with stream_weights(base, "cpu"):
        sample(base, embeds, OPTIONS)
    patched = apply_loras(base, loras)
    with stream_weights(patched, "cpu"):
        # An offloaded UNet runs diffusers' own forward pass: the same sums in another order, over four steps.
        torch.testing.assert_close(sample(patched, embeds, OPTIONS), expected, rtol=1e-4, atol=2e-3)


def test_compact_unets_train(compact, names, make_lora):
    """On the weights that they stand for, LoRAs included, in the precision that the training asks for."""
    base, plain = compact
    lora = make_lora(names, chosen=is_matrix)
    options = TrainingOptions(precision="32")
    trainee, parameters = build_trainee(apply_loras(base, [(lora, 1.0)]), options, torch.device("cpu"))
    assert parameters and not any(isinstance(module, CompactLayer) for module in trainee.modules())
    expected, _ = build_trainee(apply_loras(plain, [(lora, 1.0)]), options, torch.device("cpu"))
    expected = expected.state_dict()
    for name, tensor in trainee.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)  # float32, in another order


def test_a_lora_of_another_model(unet, make_lora):
    with pytest.raises(LoraError, match="for another model"):
        apply_loras(unet, [(make_lora(get_kolors_names(), rank=1), 1.0)])
    missing = make_lora(get_kolors_names(), rank=1, chosen=lambda module: "blocks.9.attn1.to_q" in module.diffusers)
    with pytest.raises(LoraError, match="which this UNet lacks"):
        apply_loras(unet, [(missing, 1.0)])


def test_a_strength_that_is_no_number(unet, names, make_lora):
    with pytest.raises(LoraError, match="nan"):
        apply_loras(unet, [(make_lora(names), float("nan"))])


def test_a_patched_unet_moves_and_comes_back(unet, names, make_lora):
    """Hosts move the module that samples to a device and back; what is shared with the base stays shared."""
    patched = apply_loras(unet, [(make_lora(names), 1.0)])
    before = get_bits(unet)
    patched.to("cpu")
    assert patched.conv_in.weight is unet.conv_in.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
