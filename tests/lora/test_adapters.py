"""Every kind of adapter against peft's own layers, on linear layers and convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kolors_nodes.lora.apply import apply_loras, merge
from kolors_nodes.lora.formats import LoraError, parse_lora

# peft's layers compute the same products in another order, float32: a few units in the last place.
TOLERANCE = 1e-5
CONV = "down_blocks.1.resnets.0.conv1"
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
POINT = "down_blocks.2.resnets.0.conv_shortcut"


def relative_error(actual, expected) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_config(kind: str):
    import peft

    targets = [LINEAR, CONV, POINT]
    match kind:
        case "LoRA":
            return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        case "DoRA":
            return peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True)
        case "LoHa":
            return peft.LoHaConfig(r=4, alpha=6, target_modules=targets)
        case "LoHa, Tucker":
            return peft.LoHaConfig(r=4, alpha=6, target_modules=targets, use_effective_conv2d=True)
        case "LoKr":
            return peft.LoKrConfig(r=2, alpha=3, target_modules=targets)
        case "LoKr, both":
            return peft.LoKrConfig(r=1, alpha=3, target_modules=targets, decompose_both=True, decompose_factor=8)
        case "LoKr, Tucker":
            return peft.LoKrConfig(r=2, alpha=3, target_modules=targets, use_effective_conv2d=True)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoHa, Tucker", "LoKr", "LoKr, both", "LoKr, Tucker"])
def test_a_whole_unet_as_peft_computes_it(unet, names, kind):
    """peft's own layers in the UNet, their tensors as peft saves them; alpha is told as in peft's header."""
    import copy
    import json

    import peft

    config = make_config(kind)
    reference = peft.inject_adapter_in_model(config, copy.deepcopy(unet))
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, parameter in reference.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            # Around a magnitude that is there already, DoRA's, else around zero. Changes as large as the weights,
            # as the difference of two outputs is what is compared.
            kept = parameter.data if "magnitude" in name else 0
            parameter.data.copy_(kept + torch.randn(parameter.shape, generator=generator) * 0.7)
            tensors[name] = parameter.data.clone()
    alpha = getattr(config, "lora_alpha", None) or config.alpha
    lora = parse_lora(tensors, names, metadata={"lora_adapter_metadata": json.dumps({"lora_alpha": alpha})})
    assert len(lora.adapters) == 3
    patched = apply_loras(unet, [(lora, 1.0)])
    for name in (LINEAR, CONV, POINT):
        layer = reference.get_submodule(name)
        weight = patched.get_submodule(name).weight
        shape = (1, weight.shape[1], 5, 5) if weight.dim() == 4 else (3, weight.shape[1])
        sample = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = layer(sample) - layer.base_layer(sample)
            actual = patched.get_submodule(name)(sample) - layer.base_layer(sample)
        assert relative_error(actual, expected) <= TOLERANCE
    assert kind.split(",")[0] in " ".join(lora.kinds)


def test_locon_is_three_convolutions_in_a_row(names):
    """LyCORIS' form with lora_mid: 1 x 1, then 3 x 3, then 1 x 1."""
    module = names.by_diffusers[CONV]
    generator = torch.Generator().manual_seed(0)
    down, mid, up = nn.Conv2d(32, 4, 1, bias=False), nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 32, 1, bias=False)
    for layer in (down, mid, up):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    tensors = {f"{module.kohya}.lora_{name}.weight": layer.weight.data
               for name, layer in (("down", down), ("mid", mid), ("up", up))}  # fmt: skip
    lora = parse_lora(tensors | {f"{module.kohya}.alpha": torch.tensor(2.0)}, names)
    (adapter,) = lora.adapters.values()
    sample = torch.randn(1, 32, 6, 6, generator=generator)
    with torch.no_grad():
        expected = up(mid(down(sample))) * (2 / 4)
        actual = nn.functional.conv2d(sample, adapter.get_delta(module.shape))
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.parametrize("rows", [True, False], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", [LINEAR, CONV])
def test_dora_of_lycoris_gives_rows_or_columns_a_length(unet, names, name, rows):
    """Its dora_scale runs over outputs or inputs; afterwards these are the lengths, whatever the change was."""
    module, weight = names.by_diffusers[name], unet.get_submodule(name).weight
    kernel = module.shape[2:]
    generator = torch.Generator().manual_seed(0)
    size = module.shape[0 if rows else 1]
    lengths = torch.rand(size, generator=generator) + 0.5
    shape = (size, 1) if rows else (1, size)
    lora = parse_lora({
        f"{module.kohya}.lora_down.weight": torch.randn(2, module.shape[1], *kernel, generator=generator),
        f"{module.kohya}.lora_up.weight": torch.randn(module.shape[0], 2, *(1 for _ in kernel), generator=generator),
        f"{module.kohya}.dora_scale": lengths.reshape(*shape, *(1 for _ in kernel)),
    }, names)  # fmt: skip
    (adapter,) = lora.adapters.values()
    assert adapter.kind.endswith("with DoRA")
    merged = merge(weight, [(adapter, 1.0)])
    flat = (merged if rows else merged.transpose(0, 1)).flatten(1)
    torch.testing.assert_close(flat.norm(dim=1), lengths)
    half = merge(weight, [(adapter, 0.5)])  # half the strength is half the way
    torch.testing.assert_close(half - weight, (merged - weight) / 2, rtol=1e-4, atol=1e-6)


def test_a_row_of_zeros_stays_finite_under_dora(names):
    module = names.by_diffusers[LINEAR]
    out_size, in_size = module.shape
    lora = parse_lora({
        f"{module.kohya}.lora_down.weight": torch.zeros(2, in_size),
        f"{module.kohya}.lora_up.weight": torch.zeros(out_size, 2),
        f"{module.kohya}.dora_scale": torch.ones(out_size, 1),
    }, names)  # fmt: skip
    (adapter,) = lora.adapters.values()
    assert merge(torch.zeros(out_size, in_size), [(adapter, 1.0)]).isfinite().all()


def test_differences_of_weights_and_biases(unet, names):
    """ComfyUI's trainer and LyCORIS store norms and biases whole."""
    weight = torch.full(unet.conv_norm_out.weight.shape, 0.5)
    lora = parse_lora({
        "diffusion_model.out.0.diff": weight,
        "diffusion_model.out.0.diff_b": weight * 2,
        "lora_unet_input_blocks_0_0.diff_b": weight[:32],
    }, names)  # fmt: skip
    patched = apply_loras(unet, [(lora, 2.0)])
    assert torch.equal(patched.conv_norm_out.weight, unet.conv_norm_out.weight + 1)
    assert torch.equal(patched.conv_norm_out.bias, unet.conv_norm_out.bias + 2)
    assert torch.equal(patched.conv_in.bias, unet.conv_in.bias + 1)
    assert patched.conv_in.weight is unet.conv_in.weight


def test_a_convolution_as_comfyui_trains_it(names):
    """Its trainer saves the factors of convolutions as matrices."""
    module = names.by_diffusers[CONV]
    out_size, in_size, *kernel = module.shape
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, in_size * 9, generator=generator), torch.randn(out_size, 2, generator=generator)
    prefix = f"diffusion_model.{module.sgm}"
    lora = parse_lora({
        f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up, f"{prefix}.alpha": torch.tensor(1.0),
    }, names)  # fmt: skip
    (adapter,) = lora.adapters.values()
    assert adapter.down.shape == (2, in_size, *kernel)
    torch.testing.assert_close(adapter.get_delta(module.shape), (up @ down).reshape(module.shape) / 2)


@pytest.mark.parametrize(
    "parts",
    [
        {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4)},
        {"hada_w1_a": (64, 4), "hada_w1_b": (3, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)},
        {"lokr_w1": (8, 8)},
        {"lokr_w1": (8, 8), "lokr_w2_a": (8, 2), "lokr_w2_b": (3, 8)},
        {"lokr_w1": (8, 8), "lokr_w2": (8, 9)},
        {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "hada_w1_a": (64, 4)},
        {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "dora_scale": (63, 1)},
        {"lora_down.weight": (4,), "lora_up.weight": (64, 4)},
        {"diff": (64, 63)},
    ],
    ids=lambda parts: " ".join(parts),
)
def test_parts_that_do_not_fit(names, parts):
    prefix = names.by_diffusers[LINEAR].kohya
    with pytest.raises(LoraError, match=LINEAR):
        parse_lora({f"{prefix}.{part}": torch.ones(shape) for part, shape in parts.items()}, names)
