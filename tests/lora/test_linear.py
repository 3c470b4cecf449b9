"""The training layer against peft's, of which it is a faster form."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from kolors_nodes.lora.linear import LowRankLinear, replace_layers_


class Model(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.first = nn.Linear(12, 20, bias=bias)
        self.second = nn.Linear(20, 8, bias=bias)

    def forward(self, x):
        return self.second(self.first(x).relu())


def make_pair(bias: bool = True, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
    """Gives a model with peft's layers, and one with ours of the same weights."""
    torch.manual_seed(0)
    model = Model(bias).requires_grad_(False).to(dtype)
    config = LoraConfig(r=3, lora_alpha=6.0, target_modules=["first", "second"], lora_dropout=dropout)
    plain = inject_adapter_in_model(config, model)
    for name, parameter in plain.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    ours = copy.deepcopy(plain)
    replace_layers_(ours)
    return plain, ours


def compute(model, x, dtype=None):
    """Gives output, gradient of the input, and gradients of the adapters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y = model(x)
    y.float().square().sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    return y.detach(), x.grad, gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
def test_output_and_gradients_are_those_of_peft(bias, shape):
    plain, ours = make_pair(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (y, dx, gradients), (expected_y, expected_dx, expected) = compute(ours, x), compute(plain, x)
    # float32: the same sums in another order
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-4)
    assert list(gradients) == list(expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_as_close_as_peft_s(base):
    """Both against float64; bfloat16 has 8 bits, so each is off by about a percent."""
    plain, ours = make_pair(dtype=base)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    reference = compute(exact, x.detach().double().requires_grad_())
    errors = []
    for model in (ours, plain):
        y, dx, gradients = compute(model, x, torch.bfloat16)
        assert y.dtype == torch.bfloat16 and dx.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in gradients.values())
        errors.append([float((found - true).norm() / true.norm()) for found, true in zip(
            (y, dx, *gradients.values()), (reference[0], reference[1], *reference[2].values()), strict=True
        )])  # fmt: skip
    for error, of_peft in zip(*errors, strict=True):
        assert error < 1.5 * of_peft + 1e-3


def test_an_input_without_gradient_costs_none():
    _, ours = make_pair()
    y = ours.first(torch.randn(4, 12))
    y.sum().backward()
    assert ours.first.lora_A["default"].weight.grad is not None and ours.first.base_layer.weight.grad is None


def test_gradients_agree_with_differences():
    torch.manual_seed(0)
    layer = make_pair()[1].first.double()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_only_plain_layers_without_dropout_are_replaced():
    assert isinstance(make_pair()[1].first, LowRankLinear)
    assert not isinstance(make_pair(dropout=0.5)[1].first, LowRankLinear)
