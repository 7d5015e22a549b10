"""Large products of compiled graphs are oneDNN's: which ones, in which orientation, and with PyTorch's numbers."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ccrl.onednn import AVAILABLE, graph_options

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this build of PyTorch has no oneDNN")


def rewritten(function, *inputs):
    """The graph of ``function`` after the pass, and how many of its products are oneDNN's and PyTorch's."""
    from ccrl.onednn_graph import OneDNNProducts

    graph = make_fx(function, tracing_mode="fake")(*inputs)
    OneDNNProducts()(graph.graph)
    graph.recompile()
    names = [str(node.target) for node in graph.graph.nodes]
    return graph, names.count("ccrl.dense.default"), sum("mm" in name for name in names)


def drawn(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def twin_gradients(x, weight, bias, last):
    """Two critics of one hidden layer: their weights' gradients and the inputs', as SAC's losses have them."""

    def loss(x, weight, bias):
        hidden = torch.baddbmm(bias, x.expand(2, *x.shape), weight).tanh()
        return (hidden * last).sum(-1).square().mean()

    return torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, bias)


def test_an_ensemble_and_its_gradients():
    """Forward, by the input and by the weight: three products of each of two members, none of them left in a batch."""
    inputs = drawn((256, 24), (2, 24, 256), (2, 1, 256), (2, 1, 256))
    graph, ours, theirs = rewritten(twin_gradients, *inputs)
    assert (ours, theirs) == (6, 0)
    for found, expected in zip(graph(*inputs), twin_gradients(*inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_and_its_gradients():
    def gradients(x, weight, bias):
        return torch.func.grad(lambda *p: nn.functional.linear(*p).tanh().sum(), argnums=(0, 1, 2))(x, weight, bias)

    inputs = drawn((256, 24), (256, 24), (256,))
    graph, ours, theirs = rewritten(gradients, *inputs)
    assert (ours, theirs) == (3, 0)
    for found, expected in zip(graph(*inputs), gradients(*inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [
        ((100, 64), (64, 64), torch.float32),  # small
        ((256, 256), (256, 4), torch.float32),  # very narrow
        ((256, 256), (256, 256), torch.float64),
        ((9, 256, 256), (9, 256, 256), torch.float32),  # a large batch
    ],
)
def test_others_are_left_alone(a, b, dtype):
    _, ours, theirs = rewritten(torch.matmul, *drawn(a, b, dtype=dtype))
    assert (ours, theirs) == (0, 1)


def test_compiled_code_has_the_numbers_of_the_rewritten_graph():
    """The lowering: a transposed first factor is copied, a transposed second one is not, a bias is added."""

    def both(x, weight, bias):
        return torch.addmm(bias, x, weight.t()), x.t() @ x

    inputs = drawn((128, 96), (128, 96), (128,))
    graph, ours, _ = rewritten(both, *inputs)
    assert ours == 2
    compiled = torch.compile(both, dynamic=False, options=graph_options(torch.device("cpu")))
    for found, expected in zip(compiled(*inputs), graph(*inputs)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
