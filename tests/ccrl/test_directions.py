"""Steps of a quadratic model by hand: conjugate gradients, the trust region, the line search, decaying ascent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ccrl.estimators.directions import Ascent, line_search, natural_step, trust_region_step
from ccrl.updaters import GradientEstimate

F64 = torch.float64
FISHER = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]], dtype=F64)
G = torch.tensor([1.0, -2.0, 0.5], dtype=F64)


def fisher(v: Tensor) -> Tensor:
    return FISHER @ v


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_natural_step_solves_the_damped_system(damping: float) -> None:
    expected = torch.linalg.solve(FISHER + damping * torch.eye(3, dtype=F64), G)
    got = natural_step(fisher, G, damping=damping, iterations=3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_conjugate_gradients_end_early() -> None:
    calls: list[Tensor] = []

    def counted(v: Tensor) -> Tensor:
        calls.append(v)
        return FISHER @ v

    # the first step along g has length |g|^2 / g^T F g = 5.25 / 4.35, g^T F g = 2 + 4 + .75 - 2 - .4
    got = natural_step(counted, G, damping=0.0, iterations=1)
    torch.testing.assert_close(got, G * 5.25 / 4.35)
    assert len(calls) == 1
    natural_step(counted, G, damping=0.0, iterations=50, tolerance=0.99)
    assert len(calls) == 2, "a residual below the tolerance ends it"
    assert natural_step(counted, torch.zeros(3, dtype=F64), damping=0.0, iterations=5).eq(0).all()
    assert len(calls) == 2, "no gradient, no step"


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_trust_region_step_has_the_allowed_model_kl(damping: float) -> None:
    step = trust_region_step(fisher, G, damping=damping, max_kl=0.01)
    assert float(0.5 * step @ (FISHER @ step + damping * step)) == pytest.approx(0.01)
    torch.testing.assert_close(step / step.norm(), G / G.norm())
    assert trust_region_step(fisher, torch.zeros(3, dtype=F64), damping=damping, max_kl=0.01).eq(0).all()


def test_line_search_takes_the_longest_step_that_improves_within_the_kl() -> None:
    theta, step = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)

    def search(gain: float, kl: float, **options: float) -> tuple[float, float]:
        """Improvement ``gain x - x^2``, KL ``kl x^2``."""

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            return (gain * x - x * x).squeeze(), (kl * x * x).squeeze()

        found, share = line_search(theta, step, evaluate, max_kl=0.3, **options)  # type: ignore[arg-type]
        return float(found), share

    assert search(2.0, 0.1) == (1.0, 1.0)
    assert search(2.0, 1.0) == (0.5, 0.5), "the KL of the whole step is 1"
    assert search(2.0, 0.3) == (1.0, 1.0), "a KL that is just allowed"
    assert search(0.8, 0.1) == (0.5, 0.5), "the whole step makes it worse"
    assert search(1.0, 0.1) == (0.5, 0.5), "no change is no improvement"
    assert search(-1.0, 0.1) == (0.0, 0.0)
    assert search(2.0, 4.0, shrink=0.25) == (0.25, 0.25)
    assert search(2.0, 0.3 * 4.0**3, backtracks=4) == (0.125, 0.125)
    assert search(2.0, 0.3 * 4.0**3, backtracks=3) == (0.0, 0.0)


def test_ascent_decays_from_the_first_rate() -> None:
    class Iteration:
        k = torch.zeros((), dtype=F64)

    lr, theta, ctx = torch.tensor(0.5, dtype=F64), torch.zeros(2), Iteration()
    plain, decaying = Ascent(lr.clone()), Ascent(lr.clone(), decay=4.0)
    gradient = lambda tag: GradientEstimate(torch.tensor([1.0, -2.0], dtype=F64))  # noqa: E731
    for k, rate in enumerate((0.5, 0.4, 1 / 3)):  # 0.5 * 4 / (4 + k)
        ctx.k.fill_(k)
        got = decaying.step(theta, gradient, {}, ctx)  # type: ignore[arg-type]
        assert got.tolist() == pytest.approx([rate, -2 * rate])
        assert got.dtype == theta.dtype
        assert float(decaying.lr) == pytest.approx(rate)
        assert plain.step(theta, gradient, {}, ctx).tolist() == [0.5, -1.0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay > 0"):
        Ascent(lr, decay=0.0)
