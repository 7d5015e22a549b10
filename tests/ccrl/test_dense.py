"""The linear layer by oneDNN: PyTorch's own numbers but for rounding, its gradients and those of gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccrl.policies import dense as module
from ccrl.policies.dense import Dense, dense


def drawn(inside, outside, rows=(3, 128), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, inside), (outside, inside), (outside,))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("inside", "outside"), [(32, 48), (2, 32), (32, 2)])
def test_values_and_gradients_are_those_of_linear(inside, outside):
    """Also where a factor is narrow: the first and the last layer of a small network."""
    own, other = drawn(inside, outside), drawn(inside, outside)
    got, expected = dense(*own), F.linear(*other)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(got.sin().sum(), own), torch.autograd.grad(expected.sin().sum(), other)
    ):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(dense(*own), got, rtol=0, atol=0)


def test_gradients_of_gradients():
    """y = x W', f = sum y^2: the gradient by W is 2 y' x, and that of its squared norm is PyTorch's."""
    found = []
    for layer in (dense, F.linear):
        x, weight, _ = drawn(16, 16)
        (first,) = torch.autograd.grad(layer(x, weight, None).square().sum(), [weight], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [weight])[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1.0)


def test_only_large_products_of_float32_on_a_cpu_take_the_other_way(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_onednn", lambda x, w, b: calls.append(x.shape) or F.linear(x, w, b))
    if not module._AVAILABLE:
        pytest.skip("this build of PyTorch has no oneDNN")
    with torch.no_grad():
        dense(*drawn(16, 16, (127,)))
        dense(*drawn(16, 16, (128,), torch.float64))
        dense(*drawn(2, 16, (128,)))
        assert not calls
        dense(*drawn(16, 16, (128,)))
        assert calls == [(128, 16)]


def test_a_layer_has_the_parameters_of_a_linear_one():
    layer, other = Dense(16, 16), nn.Linear(16, 16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(256, 16)
    torch.testing.assert_close(layer(x), other(x))


def test_function_transforms_are_refused():
    """Under them the opaque product would be differentiated wrongly in a compiled graph."""
    if not module._AVAILABLE:
        pytest.skip("this build of PyTorch has no oneDNN")
    x, weight, bias = (t.detach() for t in drawn(16, 16))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda w: dense(x, w, bias).sum())(weight)
