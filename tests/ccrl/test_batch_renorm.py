"""Batch renormalisation against numbers computed by hand, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccrl.policies.batch_renorm import BatchRenorm, RenormEnsemble, RenormMLP

F64 = torch.float64


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64).unsqueeze(-1)


def norm(rate: float = 0.01, warm_up: int = 2) -> BatchRenorm:
    return BatchRenorm(1, rate=rate, warm_up=warm_up).double()


def test_three_batches_the_first_two_plain() -> None:
    layer = norm()
    # batch (0, 2, 4, 6): m = 3, v = 5: (0 - 3) / sqrt(5.001) = -1.341507; M = .01 * 3, V = 1 + .01 * (5 - 1)
    first = layer(column(0, 2, 4, 6), training=True).flatten().tolist()
    assert first[:2] == pytest.approx([-1.341507, -0.447169], abs=1e-6)
    assert (float(layer.mean), float(layer.var)) == pytest.approx((0.03, 1.04))
    second = layer(column(1, 1, 5, 9), training=True).flatten().tolist()
    assert second == pytest.approx([-0.904493, -0.904493, 0.301498, 1.507488], abs=1e-6)
    assert (float(layer.mean), float(layer.var)) == pytest.approx((0.0697, 1.1396))
    # batch (10, 12, 14, 20): m = 14, v = 14: r = sqrt(14.001 / 1.1406) = 3.50 -> 3, d = 13.05 -> 5
    third = layer(column(10, 12, 14, 20), training=True).flatten().tolist()
    assert third == pytest.approx([1.792980, 3.396490, 5.0, 9.810531], abs=1e-6)
    assert (float(layer.mean), float(layer.var)) == pytest.approx((0.209003, 1.268204), abs=1e-6)
    assert layer(column(0, 5)).flatten().tolist() == pytest.approx([-0.185518, 4.252655], abs=1e-6)


def test_unclipped_it_is_the_normalisation_by_running_statistics() -> None:
    layer = norm(0.5)
    layer(column(0, 2, 4, 6), training=True)
    layer(column(1, 1, 5, 9), training=True)
    assert (float(layer.mean), float(layer.var)) == pytest.approx((2.75, 7.0))
    running = layer(column(2, 3, 4, 8)).flatten().tolist()
    trained = layer(column(2, 3, 4, 8), training=True).flatten().tolist()
    assert trained == pytest.approx([-0.283453, 0.094484, 0.472422, 1.984172], abs=1e-6)
    assert trained == pytest.approx(running)


def test_gradient_flows_through_the_batch_and_not_through_the_correction() -> None:
    layer = norm(warm_up=0)
    layer.mean.fill_(3.0)
    layer.var.fill_(5.0)
    x = column(2, 3, 4, 8).requires_grad_()
    y = layer(x, training=True)
    (grad,) = torch.autograd.grad(y[0] - y[3], x)
    # with r and d not stopped, or m and sd stopped, it would be (.447169, 0, 0, -.447169)
    assert grad.flatten().tolist() == pytest.approx([0.156296, -0.161596, -0.032319, 0.037620], abs=1e-6)


def test_a_constant_column_has_a_finite_gradient() -> None:
    layer = norm(warm_up=0)
    x = column(1, 1, 1).requires_grad_()
    layer(x, training=True).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_one_joint_pass_mixes_the_statistics() -> None:
    """h = X v, q = w BN(h) over both halves; the target is the second half's, stopped."""
    v = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    layer = norm(warm_up=10)
    layer.weight.data.fill_(1.5)  # w is the layer's scale
    first = torch.tensor([[0, 1], [1, -1], [2, 0]], dtype=F64)
    second = torch.tensor([[3, 0], [2, 2], [-1, 4]], dtype=F64)
    reward = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    q, following = layer((torch.cat([first, second]) @ v).unsqueeze(-1), training=True).squeeze(-1).chunk(2)
    loss = 0.5 * (q - (reward + 0.9 * following.detach())).square().mean()
    assert float(loss.detach()) == pytest.approx(5.850654, abs=1e-6)
    grad = torch.autograd.grad(loss, (v, layer.weight))
    assert grad[0].tolist() == pytest.approx([-1.011981, 2.031928], abs=1e-6)
    assert float(grad[1]) == pytest.approx(3.027045, abs=1e-6)
    # what it is not: the second half without gradients through the statistics, and two passes of their own
    joint = torch.cat([first @ v, (second @ v).detach()]).unsqueeze(-1)
    q, following = layer(joint, training=True).squeeze(-1).chunk(2)
    (half,) = torch.autograd.grad(0.5 * (q - (reward + 0.9 * following.detach())).square().mean(), v)
    assert half.tolist() == pytest.approx([2.189719, -0.468316], abs=1e-6)
    q, following = (layer((x @ v).unsqueeze(-1), training=True).squeeze(-1).detach() for x in (first, second))
    assert float(0.5 * (q - (reward + 0.9 * following)).square().mean()) == pytest.approx(6.401814, abs=1e-6)


def test_members_have_statistics_of_their_own_and_acting_moves_none() -> None:
    net = RenormEnsemble(2, 3, (4,), "relu", 0)
    x = torch.randn(5, 3)
    before = {k: b.clone() for k, b in net.named_buffers()}
    net(x)
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())
    net(x, training=True)
    assert not torch.equal(net.norms[1].mean[0], net.norms[1].mean[1])
    assert int(net.norms[0].count) == 1
    with pytest.raises(ValueError, match="expected all members"):
        net(x, 1)
    mlp = RenormMLP([3, 4, 2], "relu", 0)
    assert mlp(x).shape == (5, 2)
    assert len(mlp.norms) == 2, "also before the first layer"
