"""Products through oneDNN against torch's own, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kolors_nodes.kolors import products
from kolors_nodes.kolors.products import SMALL_PRODUCT, FasterProducts, linear

# Sums of up to 512 products of numbers near one, added in another order: 512 x 6e-8 of the largest, at most.
TOLERANCE = 3e-5


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.fixture
def spy(monkeypatch):
    """Counts the products that go through oneDNN."""
    calls = []
    call = products.call_onednn
    monkeypatch.setattr(products, "call_onednn", lambda *args: calls.append(args) or call(*args))
    if not products.has_onednn():
        pytest.skip("torch has no oneDNN for this CPU, so linear() is torch's own here")
    calls.clear()
    return calls


@pytest.mark.parametrize("lead", [(32,), (2, 64), (3, 4, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_linear_is_torchs(spy, lead, with_bias, is_transposed):
    rows, weight, bias = draw(*lead, 512), draw(256, 512, seed=1), draw(256, seed=2) if with_bias else None
    if is_transposed:
        rows, weight = rows.mT.contiguous().mT, weight.mT.contiguous().mT
    assert_close(linear(rows, weight, bias), F.linear(rows, weight, bias))
    assert len(spy) == 1


@pytest.mark.parametrize("trained", ["rows", "weight", "both"])
def test_gradients_are_torchs(spy, trained):
    def get_gradients(function):
        rows = draw(2, 64, 512).requires_grad_(trained != "weight")
        weight, bias = draw(256, 512, seed=1), draw(256, seed=2)
        if trained != "rows":
            weight.requires_grad_()
            bias.requires_grad_()
        (function(rows, weight, bias) * draw(2, 64, 256, seed=3)).sum().backward()
        return [tensor.grad for tensor in (rows, weight, bias) if tensor.requires_grad]

    for actual, expected in zip(get_gradients(linear), get_gradients(F.linear), strict=True):
        assert_close(actual, expected)
    assert len(spy) == {"rows": 2, "weight": 2, "both": 3}[trained]


def test_small_and_half_products_stay_with_torch(spy):
    linear(draw(2, 32), draw(32, 32))
    linear(draw(128, 512).bfloat16(), draw(512, 512).bfloat16())
    assert 2 * 32 * 32 < SMALL_PRODUCT < 128 * 512 * 512
    assert spy == []


def test_mode_reaches_layers(spy):
    layer, rows = torch.nn.Linear(512, 512), draw(2, 64, 512)
    expected = layer(rows)
    assert spy == []
    with FasterProducts():
        assert_close(layer(rows), expected)
    assert len(spy) == 1


def test_without_onednn_it_is_torch(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    rows, weight = draw(128, 512), draw(512, 512)
    assert torch.equal(linear(rows, weight), F.linear(rows, weight))


def test_an_operator_that_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "call_onednn", lambda rows, weight, bias: torch.zeros(2, 3, 5))
    assert products.has_onednn.__wrapped__() is False
