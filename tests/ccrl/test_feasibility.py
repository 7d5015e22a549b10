"""Shipments never exceed the stock on hand, by hand-computed cases and on random ones."""

from __future__ import annotations

import pytest
import torch

from ccrl.inventory.feasibility import proportional, retention, softmax


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("stock", "hold", "expected"),
    [(2.0, True, (1.5, 0.5)), (8.0, True, (3.0, 1.0)), (8.0, False, (6.0, 2.0)), (0.0, True, (0.0, 0.0))],
)
def test_proportional(stock: float, hold: bool, expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(proportional(t(3, 1), torch.tensor(stock).double(), hold=hold), t(*expected))


def test_softmax_keeps_the_share_of_a_constant_logit() -> None:
    shipped = softmax(t(0, 1), torch.tensor(10.0).double())
    torch.testing.assert_close(shipped, t(1.5536240, 4.2231880), rtol=1e-6, atol=0)
    assert float(10.0 - shipped.sum()) == pytest.approx(4.2231880, rel=1e-6)
    torch.testing.assert_close(softmax(t(0, 1), torch.tensor(10.0).double(), hold=False).sum().item(), 10.0)


def test_retention_is_proportional_with_the_nodes_own_request() -> None:
    torch.testing.assert_close(
        retention(t(3, 1), torch.tensor(4.0).double(), torch.tensor(2.0).double()), t(0.75, 0.25)
    )
    torch.testing.assert_close(retention(t(3, 1), torch.tensor(4.0).double(), torch.tensor(9.0).double()), t(3, 1))


def test_nothing_asked_for_is_nothing_shipped_with_a_finite_gradient() -> None:
    wanted = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    stock = torch.tensor(3.0).double()
    for shipped in (
        proportional(wanted, stock),
        proportional(wanted, stock, hold=False),
        retention(wanted, stock * 0, stock),
    ):
        assert shipped.tolist() == [0.0, 0.0]
        (grad,) = torch.autograd.grad(shipped.sum(), wanted)
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_layer_ships_more_than_there_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    stock = (torch.rand(4000, dtype=dtype) * 50).where(torch.rand(4000) > 0.1, 0.0)
    wanted = torch.rand(4000, 7, dtype=dtype) ** 8 * 100
    logits = torch.randn(4000, 7, dtype=dtype) * 20
    for shipped in (
        proportional(wanted, stock), proportional(wanted, stock, hold=False), retention(wanted, wanted[:, 0], stock),
        softmax(logits, stock), softmax(logits, stock, hold=False),
    ):  # fmt: skip
        assert bool((shipped >= 0).all())
        assert bool((shipped.sum(-1) <= stock * (1 + 8 * eps)).all())


def test_gradients() -> None:
    torch.manual_seed(1)
    wanted = (torch.rand(5, 3, dtype=torch.float64) + 0.1).requires_grad_()
    keep = torch.rand(5, dtype=torch.float64).requires_grad_()
    stock = torch.tensor([0.3, 1.0, 9.0, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(proportional, (wanted, stock))
    assert torch.autograd.gradcheck(retention, (wanted, keep, stock))
    assert torch.autograd.gradcheck(softmax, (wanted, stock))
