"""Tasks of return distributions: the contract, what they draw, and their optima."""

from __future__ import annotations

import math

import pytest
import torch

import envs
from ccrl.distributional import CVaR, Expected, best_stock_free, law_of, scalar_value
from ccrl.testing import EnvContract
from ccrl.wrappers import StockEnv
from envs.stock import CostBudget, FiniteEnv, Homeostat, OrderExecution, RiskGridworld, SABChain


class TestChain(EnvContract):
    env = "ccrl/SABChain-v0"
    random_starts = False
    independent_copies = True


class TestGrid(TestChain):
    env = "ccrl/RiskGridworld-v0"


class TestHomeostat(TestChain):
    env = "ccrl/Homeostat-v0"


class TestBudgetWithStock(TestChain):
    def make_env(self, num_envs, autoreset_mode):
        return StockEnv(CostBudget(num_envs, autoreset_mode=autoreset_mode), 1.0, (0.0, 3.0), rewards="rewards")


class TestExecution(TestChain):
    env = "ccrl/OrderExecution-v0"


@pytest.mark.parametrize("cls", [SABChain, RiskGridworld, Homeostat, CostBudget])
def test_finite_tasks_draw_what_their_tables_say(cls):
    """Frequencies of returns of a fixed policy against its exact law."""
    env: FiniteEnv = cls(4000)
    plan = [1, 2, 0, 1, 1, 1] if cls is not RiskGridworld else [0, 1, 1, 2, 1, 1]
    law = law_of(
        env.mdp, lambda t, s, c: plan[t], env.horizon, start=0.0 if not env.mdp.dims else (0.0,) * env.mdp.dims
    )
    env.reset(seed=0)
    total = torch.zeros(4000, dtype=torch.float64)
    alive = torch.ones(4000, dtype=torch.bool)
    for t in range(env.horizon):
        result = env.step(torch.full((4000,), plan[t]))
        total += torch.where(alive, result.reward.double(), 0.0)
        alive &= ~(result.terminated | result.truncated)
    assert not bool(alive.any())
    first = law.atoms if not env.mdp.dims else law.atoms[:, 0]
    for x in first.unique().tolist():
        p = float(law.weights[first == x].sum())
        # five standard deviations
        assert abs(float((total == x).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / 4000) + 1e-9
    assert bool(torch.isin(total, first).all())


def test_vector_rewards_are_those_of_the_last_step():
    env = CostBudget(500)
    obs = env.reset(seed=0)
    assert float(obs["rewards"].abs().max()) == 0.0
    result = env.step(torch.full((500,), 2))
    assert {tuple(row) for row in result.obs["rewards"].tolist()} == {(3.0, 0.0), (3.0, -3.0)}
    assert torch.equal(result.reward, result.obs["rewards"][:, 0])


def test_the_way_around_the_cliff():
    """Straight: 2 steps, one beside the cliff: 8 with .9, -2 with .1, mean 7. Around: 4 steps, 6 for sure. CVaR at .5
    of the straight way: (.1 * -2 + .4 * 8) / .5 = 6, as much; the tie goes to up, the lower number."""
    env = RiskGridworld()
    assert (env.optimum(Expected()).value, env.optimum(Expected()).action) == (7.0, 1)
    for tau in (0.5, 0.1, 0.05):
        assert (round(env.optimum(CVaR(tau)).value, 9), env.optimum(CVaR(tau)).action) == (6.0, 0)
    # at .6: (-.2 + 4) / .6
    assert abs(env.optimum(CVaR(0.6)).value - 3.8 / 0.6) < 1e-9


def test_vector_objectives_need_the_stock():
    for env, optimum, stock_free in ((Homeostat(), -0.606694, -1.051159), (CostBudget(), 5.625, 3.8125)):
        objective = type(env).objective
        solved = env.optimum()
        assert abs(solved.value - optimum) < 1e-6
        again = scalar_value(env.mdp, env.horizon, objective, 1.0, 0, objective.start)
        assert abs(again - optimum) < 1e-6
        assert abs(best_stock_free(env.mdp, env.horizon, objective)[0] - stock_free) < 1e-6


def test_one_step_of_the_budget_by_hand():
    """With 3 left one step may hurry for free: +3. With 1 left: 3 - 3 * .5 * 2 = 0, against 1 for work."""
    env = CostBudget(horizon=1)
    assert env.optimum().value == 3.0
    solved = scalar_value(env.mdp, 1, CostBudget.objective, 1.0, 0, (0.0, 1.0))
    assert solved == 1.0


# Execution


def test_execution_by_hand():
    """Sell half, hold half over a rise and a crash, sell all: -impact / 4 + Z / 2, then -impact / 4."""
    env = OrderExecution(2000, horizon=2, impact=0.5, rise=0.2, fall=1.0, crash=0.1)
    env.reset(seed=0)
    first = env.step(torch.full((2000, 1), 0.5))
    seen = {round(x, 5) for x in first.reward.tolist()}
    assert seen == {round(-0.125 + 0.1, 5), round(-0.125 - 0.5, 5)}
    assert torch.allclose(first.obs, torch.tensor([0.5, 0.5]))
    second = env.step(torch.zeros(2000, 1))  # the last step sells whatever is asked for
    assert bool(second.terminated.all())
    assert torch.allclose(second.reward, torch.full((2000,), -0.125))


def test_half_an_action_sells_equal_parts():
    env = OrderExecution(1, horizon=5)
    env.reset(seed=0)
    left = [float(env.step(torch.full((1, 1), 0.5)).obs[0, 1]) for _ in range(4)]
    assert left == pytest.approx([0.8, 0.6, 0.4, 0.2])
    env.reset(seed=0)
    assert float(env.step(torch.zeros(1, 1)).obs[0, 1]) == 1.0
    assert float(env.step(torch.ones(1, 1)).obs[0, 1]) == 0.0


def test_mean_optimum_of_two_steps_in_closed_form():
    """mean of Z = m: max over x of x m - impact ((1 - x)^2 + x^2): x = 1/2 + m / (4 impact) = .54 for m = .08."""
    env = OrderExecution(horizon=2, impact=0.5)
    x, m = 0.5 + 0.08 / 2.0, 0.08
    exact = x * m - 0.5 * ((1 - x) ** 2 + x**2)
    coarse, fine = (exact - env.optimum(Expected(), inventory=n, stocks=41).value for n in (26, 51))
    assert 0 <= fine <= coarse < 1e-3
    assert fine < 1e-9  # .54 is in the finer grid


def test_cvar_optimum_against_a_solver_of_the_tree():
    """Every policy is one inventory per history of moves, so the optimum is a concave programme of few variables:
    the tail of each of 4 outcomes, c_0 and 3 inventories."""
    optimize = pytest.importorskip("scipy.optimize")
    env, tau = OrderExecution(horizon=3), 0.2

    def returns(v):
        left, up, down = v[:3]
        total = []
        for first, second in ((left, up), (left, down)):
            move = env.rise if second is up else -env.fall
            for last in (env.rise, -env.fall):
                sold = (1 - first) ** 2 + (first - second) ** 2 + second**2
                total.append(first * move + second * last - env.impact * sold)
        return total

    p = [0.81, 0.09, 0.09, 0.01]
    cost = lambda v: v[3] + sum(w * u for w, u in zip(p, v[4:])) / tau  # noqa: E731
    above = {"type": "ineq", "fun": lambda v: [u + v[3] + g for u, g in zip(v[4:], returns(v))]}
    order = {"type": "ineq", "fun": lambda v: [v[0] - v[1], v[0] - v[2]]}
    found = optimize.minimize(
        cost, [0.5, 0.25, 0.25 + 1e-9, 0.5] + [0.5] * 4, bounds=[(0, 1)] * 3 + [(None, None)] + [(0, None)] * 4,
        constraints=[above, order], method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    errors = [env.optimum(CVaR(tau), inventory=n, stocks=m).value + found.fun for n, m in ((21, 161), (61, 961))]
    assert abs(errors[1]) < 1e-3
    assert abs(errors[1]) <= abs(errors[0]) + 1e-6


def test_the_tail_asks_for_earlier_sales_than_the_mean():
    env = OrderExecution()
    mean, tail = env.optimum(Expected()).value, env.optimum(CVaR(0.1)).value
    # all at once: -impact in every case; in equal parts without moves: -impact / horizon
    assert tail > -env.impact
    assert mean > -env.impact / env.horizon
    # the mean's own plan has a CVaR of -1.03
    assert mean > -0.03
    assert tail > -0.75


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SABChain(horizon=0), "horizon"),
        (lambda: RiskGridworld(rows=1), "at least 2 rows and 3 columns"),
        (lambda: RiskGridworld(slip=1.5), "slip"),
        (lambda: RiskGridworld(loss=-1.0), "loss: expected"),
        (lambda: OrderExecution(impact=0.0), "impact"),
        (lambda: OrderExecution().optimum(Homeostat.objective), "objective of numbers"),
        (lambda: OrderExecution().optimum(stocks=1), "grids of 2 or more"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_ids():
    for name in ("SABChain", "RiskGridworld", "Homeostat", "CostBudget", "OrderExecution"):
        env = envs.make(f"ccrl/{name}-v0", 2, seed=0)
        assert env.id == f"ccrl/{name}-v0"
