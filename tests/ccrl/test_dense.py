"""The linear layer by oneDNN: PyTorch's own numbers but for rounding, its gradients and those of gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccrl.policies import dense as module
from ccrl.policies.dense import Dense, dense, make_dense


def drawn(inside, outside, rows=(6, 128), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, inside), (outside, inside), (outside,))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("inside", "outside"), [(64, 96), (96, 64), (2, 512), (512, 2)])
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
        x, weight, _ = drawn(48, 64)
        (first,) = torch.autograd.grad(layer(x, weight, None).square().sum(), [weight], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [weight])[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5 * float(found[1].abs().max()))


def test_only_large_products_of_float32_on_a_cpu_take_the_other_way(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "onednn_linear", lambda x, w, b: calls.append(x.shape) or F.linear(x, w, b))
    if not module.AVAILABLE:
        pytest.skip("this build of PyTorch has no oneDNN")
    with torch.no_grad():
        dense(*drawn(128, 64, (127,)))  # 127 * 128 * 64 < 2^20
        dense(*drawn(128, 64, (128,), torch.float64))
        dense(*drawn(2, 512, (1024,)))
        with torch.autocast("cpu"):
            assert dense(*drawn(128, 64, (128,))).dtype == torch.bfloat16
        assert not calls
        dense(*drawn(128, 64, (128,)))
        assert calls == [(128, 128)]


def test_a_layer_has_the_parameters_of_a_linear_one():
    layer, other = Dense(64, 64), nn.Linear(64, 64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(256, 64)
    torch.testing.assert_close(layer(x), other(x))


def test_linear_layers_become_dense_and_their_subclasses_stay():
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Own(4, 4)))
    names, before = list(net.state_dict()), list(net.parameters())
    assert make_dense(net) is net
    assert (type(net[0]), type(net[1][0])) == (Dense, Own)
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), before))


def test_function_transforms_are_refused():
    """Under them the opaque product would be differentiated wrongly in a compiled graph."""
    if not module.AVAILABLE:
        pytest.skip("this build of PyTorch has no oneDNN")
    x, weight, bias = (t.detach() for t in drawn(48, 64))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda w: dense(x, w, bias).sum())(weight)
