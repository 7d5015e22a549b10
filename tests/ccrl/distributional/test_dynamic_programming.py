"""Exact optima of a chain of safe and risky actions, by computations that share no code: the oracle over laws, value
and policy iteration on a grid of stocks, and a recursion on numbers."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from ccrl.distributional import (
    CVaR,
    Entropic,
    ExactOracle,
    Expected,
    FiniteMDP,
    Homeostasis,
    Law,
    MeanCVaR,
    StockGrid,
    TargetReturn,
    best_stock_free,
    law_of,
    reachable_stocks,
    scalar_value,
    shortfall_range,
    wasserstein,
)

F = torch.float64
S, A, B = 0, 1, 2
SAB = FiniteMDP.of([[[(1.0, 0.0, 0)], [(0.75, 1.0, 0), (0.25, -1.0, 0)], [(0.6, 3.0, 0), (0.4, -2.0, 0)]]])
"""S: nothing; A: +1 with .75, else -1; B: +3 with .6, else -2."""

ROWS = [
    # gamma, horizon, tau, optimum, c_0*, first action, best policy without a stock
    (1.0, 3, 0.25, 0.125, -1.0, A, 0.0),
    (1.0, 3, 0.50, 0.6375, -2.0, A, 0.3125),
    (1.0, 3, 0.75, 4.9 / 3, -5.0, B, 3.68 / 3),
    (1.0, 4, 0.25, 0.31875, -1.0, A, 0.0),
    (1.0, 4, 0.50, 1.065625, -3.0, A, 0.734375),
    (1.0, 4, 0.75, 2.34, -7.0, B, 2.136),
    (1.0, 4, 1.00, 4.0, -12.0, B, 4.0),
    (0.9, 4, 0.25, 0.180041, -1.0, A, 0.0),
    (0.9, 4, 0.50, 0.873726, -2.53, A, 0.560672),
    (0.9, 4, 0.75, 1.961568, -5.439, B, 1.749837),
    (0.5, 3, 0.50, 0.34375, -1.5, A, 0.1),
]


@cache
def oracle(gamma: float, horizon: int) -> ExactOracle:
    return ExactOracle(SAB, horizon, CVaR(1.0), gamma)


@pytest.mark.parametrize(("gamma", "horizon", "tau", "optimum", "start", "first", "stock_free"), ROWS)
def test_cvar_of_the_chain(gamma, horizon, tau, optimum, start, first, stock_free):
    objective = CVaR(tau)
    solved = oracle(gamma, horizon).solve(0, objective)
    assert abs(solved.value - optimum) < 1e-6
    assert (round(solved.start, 9), solved.action) == (start, first)
    assert abs(float(objective.value(*solved.law)) - solved.value) < 1e-9  # the law's own CVaR
    assert abs(scalar_value(SAB, horizon, objective, gamma, 0, start) - start - solved.value) < 1e-9
    assert abs(best_stock_free(SAB, horizon, objective, gamma)[0] - stock_free) < 1e-6
    attainable = oracle(gamma, horizon).attainable(0)
    starts = sorted({-b for b in attainable[:: 1 + len(attainable) // 40]} | {start})
    grid = StockGrid(SAB.timed(horizon), reachable_stocks(SAB, horizon, gamma, starts), objective, gamma)
    for law in (grid.value_iteration(horizon).law, grid.policy_iteration(horizon)[0].law):
        found, value = grid.search(law, 0, starts)
        assert abs(value - solved.value) < 1e-9
        assert abs(found - start) < 1e-9


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_at_low_levels_the_sure_action_is_best(gamma):
    for tau in (0.05, 0.1):
        assert abs(oracle(gamma, 3).solve(0, CVaR(tau)).value) < 1e-12


def test_two_steps_of_the_chain():
    assert abs(oracle(0.9, 2).solve(0, CVaR(0.5)).value - 0.24) < 1e-9
    assert abs(oracle(0.9, 2).solve(0, CVaR(0.75)).value - 0.8733333333) < 1e-9


def test_brute_force_over_all_policies_that_see_the_history():
    """3^(1 + 2) policies of two steps on safe (+1) and risky (+3 with .6, -1 with .4): gamble, again after -1."""
    mdp = FiniteMDP.of([[[(1.0, 1.0, 0)], [(0.6, 3.0, 0), (0.4, -1.0, 0)]]])
    for tau, optimum in ((0.75, 2.08), (0.5, 2.0), (0.25, 2.0), (1.0, 2.8)):
        values = []
        for first in (0, 1):
            for good in (0, 1):
                for bad in (0, 1):
                    # the stock tells what the first reward was
                    act = lambda t, s, c, x=(first, good, bad): x[0] if t == 0 else x[1] if c >= 1.0 else x[2]  # noqa: E731
                    law = law_of(mdp, act, 2)
                    values.append(float(CVaR(tau).value(*law)))
        found = ExactOracle(mdp, 2, CVaR(tau)).solve()
        assert abs(max(values) - optimum) < 1e-12
        assert abs(found.value - optimum) < 1e-12
    best = ExactOracle(mdp, 2, CVaR(0.75))
    assert best.solve().start == -4.0
    assert (best.policy(0, 0, -4.0), best.policy(1, 0, -1.0), best.policy(1, 0, -5.0)) == (1, 0, 1)
    assert best_stock_free(mdp, 2, CVaR(0.75))[0] == 2.0


@pytest.mark.parametrize(
    ("target", "optimum"), [(0.0, 0.0), (1.0, -0.21875), (2.0, -0.68125), (3.0, -1.23125), (5.0, -2.525), (9.0, -6.0)]
)
def test_target_returns_of_the_chain(target, optimum):
    objective = TargetReturn(target)
    solved = ExactOracle(SAB, 3, objective).solve()
    assert abs(solved.value - optimum) < 1e-12
    assert abs(scalar_value(SAB, 3, objective, 1.0, 0, -target) - optimum) < 1e-12
    grid = StockGrid(SAB.timed(3), reachable_stocks(SAB, 3, 1.0, [-target]), objective, 1.0)
    for law in (grid.value_iteration(3).law, grid.policy_iteration(3)[0].law):
        assert abs(grid.search(law, 0, [-target])[1] - optimum) < 1e-12


def test_other_certainty_equivalents_of_the_chain():
    # A in every step: -3 log(.75 e^-.5 + .25 e^.5) / .5
    one = -math.log(0.75 * math.exp(-0.5) + 0.25 * math.exp(0.5)) / 0.5
    solved = ExactOracle(SAB, 3, Entropic(0.5)).solve()
    assert abs(solved.value - 3 * one) < 1e-9
    assert (round(solved.value, 6), solved.action) == (0.855756, A)
    assert round(ExactOracle(SAB, 3, Entropic(1.0)).solve().value, 6) == 0.136624
    half = ExactOracle(SAB, 3, MeanCVaR(0.5, 0.25)).solve()
    assert (round(half.value, 9), half.start) == (0.640625, -1.0)
    fifth = ExactOracle(SAB, 3, MeanCVaR(0.2, 0.5)).solve()
    assert (round(fifth.value, 9), fifth.start) == (0.78375, -3.0)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_for_the_mean_the_stock_does_not_matter(gamma):
    grid = StockGrid(SAB.timed(3), torch.linspace(-9, 9, 19, dtype=F), Expected(), gamma)
    sweep = grid.value_iteration(3)
    assert bool((sweep.action == B).all())
    discounted = 1.0 + gamma + gamma**2  # B has mean 1
    assert torch.allclose(sweep.law.mean()[0], torch.full((19,), discounted, dtype=F))


# Without a horizon

WALK = FiniteMDP.of([[[(1.0, r, 0)] for r in (-1.0, 0.0, 1.0)]])
"""One state, rewards -1, 0 and 1 for ever."""


@pytest.mark.parametrize("gamma", [0.5, 0.8])
def test_homeostasis_in_closed_form_and_its_rate(gamma):
    """The best value of -|c_0 + G| is -max(0, |c_0| - 1 / (1 - gamma)), as every return in +-1 / (1 - gamma) is
    attainable for gamma >= 1/3. Iterate k is off by at most gamma^k / (1 - gamma)."""
    reach = 1.0 / (1.0 - gamma)
    stocks = torch.linspace(-4 * reach, 4 * reach, 2401, dtype=F)
    grid = StockGrid(WALK, stocks, TargetReturn(0.0), gamma, atoms=16)
    exact = -(stocks.abs() - reach).clamp_min(0.0)
    middle = stocks.abs() <= 2 * reach
    law, gaps = grid.start(), []
    for _ in range(12):
        gaps.append(float((exact - grid.values(law)[0])[middle].max()))
        law = grid.improve(law).law
    spacing = 8 * reach / 2400
    for k, gap in enumerate(gaps):
        assert gap <= gamma**k * reach + 2 * spacing, (k, gap)
    assert abs(gaps[0] - reach) < 1e-9  # the first policy's return is 0
    assert gaps[-1] < 0.2 * gaps[0]


def test_a_fixed_policys_operator_is_a_contraction():
    gamma = 0.8
    grid = StockGrid(SAB, torch.linspace(-5, 5, 11, dtype=F), CVaR(0.5), gamma, atoms=4096)
    action = torch.full((1, 11), A)
    one, other = grid.start(0.0), grid.start(5.0)
    for k in range(6):
        # no episode ends, so the shift of the first laws is all that is between them
        assert abs(float(wasserstein(one, other).max()) - 5.0 * gamma**k) < 1e-9
        one, other = (grid.evaluate_once(x, action) for x in (one, other))


def test_a_coarse_grid_errs_little_and_a_finer_one_less():
    objective, gamma, horizon = CVaR(0.5), 0.9, 3
    exact = ExactOracle(SAB, horizon, objective, gamma).solve()
    errors = []
    for points in (19, 73, 289):
        grid = StockGrid(SAB.timed(horizon), torch.linspace(-18, 18, points, dtype=F), objective, gamma)
        errors.append(abs(grid.search(grid.value_iteration(horizon).law)[1] - exact.value))
    assert errors[2] < 0.05
    assert errors[2] <= errors[0]


def test_tables_stay_on_the_device_of_the_stocks():
    """A tensor on the default device, here one that mixes with no other, would stop it."""
    mdp, stocks = SAB.timed(2), torch.linspace(-6, 4, 11, dtype=F)

    def solved():
        grid = StockGrid(mdp, stocks, CVaR(0.5), 0.9, atoms=4)
        return grid.value_iteration(2), grid.policy_iteration(2)[0], grid.search(grid.value_iteration(2).law)

    plain = solved()
    torch.set_default_device("meta")
    try:
        moved = solved()
    finally:
        torch.set_default_device(None)
    for one, other in zip(plain[:2], moved[:2]):
        assert torch.equal(one.action, other.action)
        assert torch.equal(one.law.atoms, other.law.atoms)
    assert plain[2] == moved[2]


def test_vectors_in_the_oracle():
    """Two variables, one may be raised per step: from (-2, -1) three steps reach the set-points exactly."""
    mdp = FiniteMDP.of([[[(1.0, (0.0, 0.0), 0)], [(1.0, (1.0, 0.0), 0)], [(1.0, (0.0, 1.0), 0)]]])
    assert ExactOracle(mdp, 3, Homeostasis((-2.0, -1.0))).solve().value == 0.0
    # two steps leave one unit
    assert ExactOracle(mdp, 2, Homeostasis((-2.0, -1.0))).solve().value == -1.0
    assert scalar_value(mdp, 2, Homeostasis((-2.0, -1.0)), 1.0, 0, (-2.0, -1.0)) == -1.0


def test_episodes_that_end_by_themselves():
    """Stop (0) or go on for +1 with .5, else end: the objective after an end is f(c) alone."""
    mdp = FiniteMDP.of([[[(1.0, 0.0, None)], [(0.5, 1.0, 0), (0.5, -1.0, None)]]])
    objective = TargetReturn(1.0)
    solved = ExactOracle(mdp, 3, objective).solve()
    # go on once: .5 reaches 1 and stops, .5 ends at -1: -1; stopping at once: -1
    assert solved.value == -1.0
    assert ExactOracle(mdp, 3, objective).policy(1, 0, 0.0) == 0
    grid = StockGrid(mdp.timed(3), reachable_stocks(mdp, 3, 1.0, [-1.0]), objective, 1.0)
    assert grid.search(grid.value_iteration(3).law, 0, [-1.0])[1] == -1.0


def test_variance_is_not_indifferent_to_mixtures():
    """Why an objective must be an expected utility: states that score best alone are worst together."""
    variance = lambda law: float((law.weights * (law.atoms - law.mean()) ** 2).sum())  # noqa: E731
    sure = [Law(torch.tensor([x], dtype=F), torch.ones(1, dtype=F)) for x in (0.0, 10.0)]
    spread = [Law(torch.tensor([4.0, 6.0], dtype=F), torch.full((2,), 0.5, dtype=F))] * 2
    mix = lambda laws: Law(torch.cat([x.atoms for x in laws]), torch.cat([x.weights / 2 for x in laws]))  # noqa: E731
    assert all(variance(a) < variance(b) for a, b in zip(sure, spread))
    assert (variance(mix(sure)), variance(mix(spread))) == (25.0, 1.0)


def test_the_range_of_stocks_that_matter():
    assert shortfall_range(-2.0, 9.0) == (-9.0, 2.0)
    low, high = shortfall_range(-8.0, 12.0)
    grid = StockGrid(SAB.timed(4), torch.tensor([low - 5.0, low, high, high + 5.0], dtype=F), CVaR(0.5), 1.0)
    action = grid.value_iteration(4).action[0]
    assert action.tolist()[:2] == [B, B]
    assert action.tolist()[2:] == [S, S]  # all are equal: the lowest number
    with pytest.raises(ValueError, match="low <= high"):
        shortfall_range(1.0, 0.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FiniteMDP.of([[[(0.5, 0.0, 0)]]]), "sum to 1"),
        (lambda: FiniteMDP.of([[[(float("nan"), 0.0, 0)]]]), "sum to 1"),
        (lambda: FiniteMDP.of([[[(1.5, 0.0, 0), (-0.5, 0.0, 0)]]]), "probabilities >= 0"),
        (lambda: FiniteMDP.of([[[(1.0, 0.0, 3)]]]), r"successors in 0 \.\.\. 0, got 3 to 3"),
        (lambda: FiniteMDP.of([[[(1.0, float("inf"), 0)]]]), "finite rewards"),
        (lambda: FiniteMDP.of([]), "a state or more"),
        (lambda: FiniteMDP.of([[[(1.0, 0.0, 0)]], [[]]]), r"got \[\[1\], \[0\]\] outcomes"),
        (lambda: SAB.timed(0), "horizon: expected >= 1"),
        (lambda: ExactOracle(SAB, 3, Entropic(1.0), 0.9), "gamma = 1"),
        (lambda: ExactOracle(SAB, 3, Homeostasis((0.0, 0.0))), "rewards of 2 numbers, got 0"),
        (lambda: StockGrid(SAB, torch.tensor([1.0, 0.0]), CVaR(0.5), 1.0), "increasing"),
        (lambda: StockGrid(SAB, torch.tensor([0.0]), Homeostasis((0.0,)), 1.0), "numbers; vectors"),
        (lambda: best_stock_free(SAB, 20, CVaR(0.5)), r"at most 20000 policies, got 3\^20"),
    ],
)
def test_wrong_problems_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
