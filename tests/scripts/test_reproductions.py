"""What the papers' small experiments compute, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.bnpo import log_density, optimal_normaliser
from scripts.reproductions import polar
from scripts.reproductions import r2vpo as reproduction
from scripts.reproductions.bnpo import size, variance
from scripts.reproductions.gbpo import uniform_bandit
from scripts.reproductions.r2vpo import bandit


def test_the_variance_formula_and_its_minimum() -> None:
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        a, b = (2.0 + 4.0 * torch.rand(2, generator=generator, dtype=torch.float64)).unbind()
        alpha, beta = optimal_normaliser(a, b)
        integrand = x * (1 - x) * torch.exp(log_density(x, a, b) - 2 * log_density(x, alpha, beta))
        assert float(variance(a, b, alpha, beta)) == pytest.approx(float(torch.trapezoid(integrand, x)), rel=1e-4)
        best = variance(a, b, alpha, beta)
        for da, db in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05), (0.05, -0.05)):
            assert variance(a, b, alpha + da, beta + db) > best


def test_at_equal_sizes_of_advantages_no_normaliser_is_best() -> None:
    a, b = torch.tensor([2.0, 6.0], dtype=torch.float64)
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64)[1:-1]
    alpha, beta = optimal_normaliser(a, b)
    integrand = x * (1 - x) * torch.exp(log_density(x, a, b) - log_density(x, alpha, beta))
    assert float(size(a, b, alpha, beta)) == pytest.approx(float(torch.trapezoid(integrand, x)), rel=1e-4)
    relative = lambda *shape: float(variance(a, b, *shape) / size(a, b, *shape) ** 2)  # noqa: E731
    one = torch.ones_like(a)
    assert relative(one, one) == pytest.approx(6.0)
    assert relative(alpha, beta) == pytest.approx(6.574863, abs=1e-6)


def test_the_optimum_on_a_uniform_bandit() -> None:
    ratio, gain = uniform_bandit((4.0, 1.0, 2.0, 0.0), steps=150)
    assert ratio.tolist() == pytest.approx([1.2, 0.8, 1.2, 0.8], abs=5e-3)
    assert gain == pytest.approx(0.25, abs=5e-3)


def test_the_constrained_bandit_converges_to_the_closed_form() -> None:
    found = bandit(300, 0.3, dual_rate=2.0, dual_init=2.0)
    assert found.ratio.tolist() == pytest.approx([1.158481, 0.982391, 0.630211], abs=1e-5)
    assert found.dual == pytest.approx(2.839454, abs=1e-5)
    assert found.gain == pytest.approx(0.227156, abs=1e-5)
    old = torch.tensor([0.5, 0.3, 0.2]).double()
    new = found.ratio * old
    assert new.tolist() == pytest.approx([0.579241, 0.294717, 0.126042], abs=1e-5)
    assert float(old @ (found.ratio - 1).square()) == pytest.approx(0.04, abs=1e-5)
    assert float(new @ found.ratio.log()) == pytest.approx(0.021782, abs=1e-5)


def test_a_fixed_dual_on_the_bandit() -> None:
    found = bandit(200, 0.5, dual_rate=1e-12, dual_init=2.0)
    assert found.ratio.tolist() == pytest.approx([1.225, 0.975, 0.475], abs=1e-5)


def test_in_ppo_the_dual_follows_every_minibatch() -> None:
    seen: list[tuple[float, float]] = []

    class Watched(reproduction.Held):
        def after_minibatch(self, stats: dict[str, Tensor], ctx: Any) -> None:
            super().after_minibatch(stats, ctx)
            seen.append((float(stats["ratio_variance"]), float(self.dual)))

    variance, _ = reproduction.control(Watched, epochs=3, seed=0, iterations=1)
    assert len(seen) == 3 * 4
    assert variance > 0.0
    dual = 0.5
    for each, found in seen:
        dual = max(0.0, dual + 2.0 * (each - 0.04))
        assert found == pytest.approx(dual, abs=1e-5)
    assert seen[0][0] == pytest.approx(0.0, abs=1e-9)  # the first minibatch is the policy's own
    assert seen[-1][0] > 0.0


def test_the_exact_reward_of_gaussian_policies() -> None:
    """s^2 = 4: N(c; 0.8 ref, 1.8) over N(c; 0, 5)."""
    one, candidate = torch.ones(2, dtype=torch.float64), torch.tensor([1.2, -2.0], dtype=torch.float64)
    found = polar.pmi(one, candidate, 4.0)
    assert found.tolist() == pytest.approx([0.6103811793, -1.2669521540], abs=1e-10)
    assert float(torch.nn.functional.softplus(found[1] - found[0])) == pytest.approx(0.1423651214, abs=1e-10)


@pytest.mark.parametrize(
    ("variance", "accuracy", "loss"), [(1.0, 0.6229, 0.6248), (4.0, 0.7403, 0.4696), (16.0, 0.8502, 0.2824)]
)
def test_no_reward_does_better_than_the_exact_one(variance: float, accuracy: float, loss: float) -> None:
    """Numbers of 2,000,000 triples; 200,000 have standard errors of 0.001."""
    assert polar.bayes(variance, 200_000, 0) == pytest.approx((accuracy, loss), abs=5e-3)


def test_the_identity_of_regularised_reinforcement() -> None:
    """E_pi* r = beta KL(pi* || pi_init) + beta log Z, log Z = 2.7023109669."""
    start, reward = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, 2.0]).double()
    best, value, total = polar.regularised(start, reward, 0.5)
    assert best.tolist() == pytest.approx([0.247720, 0.020115, 0.732165], abs=2e-6)
    assert value == pytest.approx(1.7120502523, abs=1e-6)
    assert total == pytest.approx(value, abs=1e-12)


def test_the_kl_of_bigram_policies() -> None:
    """Against the mean of log-ratios over sequences of the first."""
    generator = torch.Generator().manual_seed(0)
    one, other = polar.draw_logits(2, generator)
    tokens = polar.written(one.expand(20_000, -1, -1), generator)
    before = torch.cat([torch.full_like(tokens[:, :1], polar.SYMBOLS), tokens[:, :-1]], 1)
    ratio = (one.log_softmax(1) - other.log_softmax(1))[before, tokens].sum(1)
    assert polar.sequence_kl(one, other) == pytest.approx(float(ratio.mean()), abs=5 * float(ratio.std()) / 20_000**0.5)
    assert polar.sequence_kl(one, one) == pytest.approx(0.0, abs=1e-9)
