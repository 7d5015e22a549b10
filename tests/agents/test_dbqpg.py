"""DBQPG and UAPG as agents: targets, the gradient, steps, settings (the algebra: test_dbqpg_quadrature.py)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

import envs  # noqa: F401  (registers ids)
from agents.dbqpg import DBQPG, DBQPGConfig
from agents.dbqpg.kernel import DeepKernel
from agents.dbqpg.uncertainty import shrink, stretch
from ccrl.data import Data
from ccrl.gp.lowrank import Eigen
from ccrl.testing import ClockEnv, Episode
from ccrl.updaters import GradientEstimate

DOUBLE = torch.float64

SMALL = {"num_envs": 2, "n_steps": 20, "hidden": (8,), "rank": 60, "kernel_hidden": (8,), "normalise_obs": False}


def prepared(env: str = "Pendulum-v1", **options) -> tuple[DBQPG, Data]:
    agent = DBQPG(env, DBQPGConfig(**(SMALL | options)), seed=2)
    agent._started = (0.0, 0)
    (request,) = agent.estimator.plan({}, {}, agent.ctx)
    have = {"on": agent.collector.collect(request, agent.policy)}
    agent.estimator.fit(have, agent.ctx)
    with torch.no_grad():
        return agent, agent.estimator.prepare(have, agent.ctx)["on"]


def test_whitened_scores_give_the_fisher_kernel() -> None:
    agent, data = prepared()
    theta = agent.updaters["policy"].flat
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    _, values, right = torch.linalg.svd(u, full_matrices=False)
    right = right[values > 1e-10 * values.max()]
    whitened = data["whitened"].reshape(40, -1)
    assert torch.allclose(whitened @ whitened.T, 40.0 * right.T @ right, atol=1e-4)
    # with a well-conditioned Fisher matrix this is U^T G^-1 U
    agent, data = prepared(rank=2)
    leading = data["whitened"].reshape(40, -1)
    u = (leading / 40**0.5).T
    kernel = u.T @ torch.linalg.inv(u @ u.T / 40) @ u
    assert torch.allclose(leading @ leading.T, kernel, atol=1e-6)


def test_the_gradient_is_the_weighted_score() -> None:
    """And with c1 -> 0 that of Monte Carlo on the standardised advantages."""
    agent, data = prepared(state_scale=0.0, fisher_scale=0.1)
    theta = agent.updaters["policy"].flat
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    noise = agent.estimator.deep.noise.item()
    target = data["target"].reshape(-1).double()
    assert float(target.mean()) == pytest.approx(0.0, abs=1e-6)
    share = 0.1 * 40 / (0.1 * 40 + noise)
    assert torch.allclose(estimate.mean, share * u @ target / 40, atol=1e-5)


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
@pytest.mark.parametrize("targets", ["gae", "returns"])
def test_targets_are_standardised_advantages_or_returns(targets: str, time_limit: str) -> None:
    """By a loop backwards through each environment: lambda-weighted errors, or rewards and the value at the end."""
    options = {"gamma": 0.9, "time_limit": time_limit, "targets": targets, "kernel_lr": 0.1}
    options |= {"gae_lambda": 0.6} if targets == "gae" else {}
    config = DBQPGConfig(**(SMALL | options))
    agent = DBQPG(ClockEnv([[Episode(0, 6, "truncate"), Episode(50, 4)], [Episode(10, 30)]]), config, seed=2)
    agent._started = (0.0, 0)
    (request,) = agent.estimator.plan({}, {}, agent.ctx)
    have = {"on": agent.collector.collect(request, agent.policy)}
    agent.estimator.fit(have, agent.ctx)
    with torch.no_grad():
        data = agent.estimator.prepare(have, agent.ctx)["on"]
    lam, gamma = 0.6 if targets == "gae" else 1.0, 0.9
    with torch.no_grad():
        estimator = agent.estimator
        value, after = data.state_values(lambda obs: estimator.deep.values(estimator._inputs(obs)))
    alive = data["alive"].double()
    if time_limit == "terminal":
        alive = alive * (~data["truncated"])
    expected, carried = torch.zeros(20, 2, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE)
    for t in reversed(range(20)):
        error = data["reward"][t].double() + gamma * alive[t] * after[t] - value[t]
        carried = error + gamma * lam * data["carry"][t] * alive[t] * carried
        expected[t] = carried if targets == "gae" else carried + value[t]
    expected = (expected - expected.mean()) / expected.std()
    torch.testing.assert_close(data["target"].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_deep_kernel_learns_what_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"state_scale": 0.7, "fisher_scale": 0.2, "likelihood_points": 13, "kernel_lr": 0.03, "min_noise": 0.5}
    seen: list[tuple] = []
    monkeypatch.setattr(DeepKernel, "fit", lambda self, *args, **named: seen.append((args, named)) or {})
    agent, data = prepared(targets="returns", cg_tolerance=1e-5, solver="cg", **options)
    ((_, whitened, target, returns), named), *_ = seen
    assert [named[k] for k in ("state_scale", "fisher_scale", "points", "lr")] == [0.7, 0.2, 13, 0.03]
    torch.testing.assert_close(whitened, data["whitened"].reshape(40, -1))
    torch.testing.assert_close(target, data["target"].reshape(-1).double())
    torch.testing.assert_close(returns, data["return"].reshape(-1).double())
    assert agent.estimator.deep.min_noise == 0.5
    agent.estimator.gradient(agent.updaters["policy"].flat, data, agent.ctx)
    assert (agent.estimator.system.kind, agent.estimator.system.solver.tolerance) == ("cg", 1e-5)


def test_defaults_are_the_published_ones_at_a_fifth_of_the_batch() -> None:
    """The released code's (github.com/Akella17/Deep-Bayesian-Quadrature-Policy-Optimization, commit 276e2c1)."""
    c = DBQPGConfig()
    assert (c.num_envs * c.n_steps, c.gamma, c.gae_lambda, c.hidden) == (3000, 0.995, 0.97, (64, 64))
    assert (c.normalise_obs, c.clip_norm) == (True, 5.0)
    assert (c.state_scale, c.fisher_scale, c.min_noise, c.stretch_limit) == (1.0, 5e-5, 1e-4, 3.0)
    assert (c.kernel_hidden, c.kernel_features, c.kernel_lr) == ((64, 48), 10, 1e-4)
    assert (c.max_kl, c.damping, c.cg_iterations, c.rank, c.learning_rate) == (0.01, 0.1, 50, 30, 2.1e-3)


@pytest.mark.parametrize("update", ["vanilla", "natural", "trpo"])
def test_uncertainty_changes_the_step(update: str) -> None:
    flats = []
    for uncertainty in (False, True):
        config = DBQPGConfig(**SMALL, update=update, uncertainty=uncertainty)
        agent = DBQPG("Pendulum-v1", config, seed=2)
        before = agent.updaters["policy"].flat.clone()
        agent.learn(until=agent.samples_per_iteration)
        flats.append(agent.updaters["policy"].flat - before)
    assert not torch.allclose(*flats)
    assert float(flats[0] @ flats[1]) > 0.0, "it shapes the step, it does not turn it around"


def test_the_natural_step_has_the_published_scale() -> None:
    """lr (F + damping)^-1 mean(w_t grad log pi) with w = W A, whatever c2 is."""
    agent, data = prepared(update="natural", learning_rate=0.5, state_scale=0.0, damping=0.3)
    theta = agent.updaters["policy"].flat
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    w = agent.estimator.weight.reshape(-1) / agent.config.fisher_scale
    fisher = torch.stack([agent.estimator.scores.fvp(e) for e in torch.eye(len(theta), dtype=DOUBLE)], 1)
    expected = 0.5 * torch.linalg.solve(fisher + 0.3 * torch.eye(len(theta), dtype=DOUBLE), u @ w / 40)
    moved = agent.learner.direction.step(theta, lambda tag: estimate, {"on": data}, agent.ctx) - theta
    assert torch.allclose(moved.double(), expected, rtol=1e-3, atol=1e-6)


LINEAR = {"hidden": (), "rank": 10, "damping": 0.3, "fisher_scale": 0.1}  # five parameters: matrices can be written


def stepped(**options) -> tuple[DBQPG, GradientEstimate, Tensor]:
    """The agent, its posterior and the move of one step."""
    linear = {k: v for k, v in LINEAR.items() if (k, options.get("update")) != ("damping", "vanilla")}
    agent, data = prepared(**(linear | options))
    theta = agent.updaters["policy"].flat
    before = theta.clone()
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    after = agent.learner.direction.step(theta, lambda tag: estimate, {"on": data}, agent.ctx)
    return agent, estimate, (after - before).double()


def fisher_of(agent: DBQPG) -> Tensor:
    return torch.stack([agent.estimator.scores.fvp(e) for e in torch.eye(5, dtype=DOUBLE)], 1)


def eigen(product) -> Eigen:
    """All pairs, from the matrix itself, largest first."""
    matrix = product(torch.eye(5, dtype=DOUBLE))
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    return Eigen(values.flip(0), vectors.flip(1))


def test_the_vanilla_step_is_adams_along_the_shrunk_gradient() -> None:
    agent, estimate, moved = stepped(update="vanilla", uncertainty=True, learning_rate=0.01, adam_eps=0.1)
    mean = estimate.mean
    shaped = shrink(mean, eigen(agent.estimator.system.covariance))
    assert not torch.allclose(shaped, mean, rtol=0.1)
    expected = 0.01 * shaped / (shaped.abs() + 0.1)  # Adam's first step
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("update", ["natural", "trpo"])
def test_natural_and_trust_region_steps_are_stretched_along_certain_directions(update: str) -> None:
    options = {"update": update, "uncertainty": True, "stretch_limit": 1.2}
    options |= {"learning_rate": 0.5} if update == "natural" else {"max_kl": 0.02}
    agent, estimate, moved = stepped(**options)
    damped = fisher_of(agent) + 0.3 * torch.eye(5, dtype=DOUBLE)
    step = stretch(torch.linalg.solve(damped, estimate.mean), eigen(agent.estimator.system.natural_precision), 1.2)
    if update == "natural":
        expected = 0.5 / (0.1 * 40) * step
    else:  # x^T (F + damping I) x / 2 = max_kl, then the line search
        share = float(estimate.stats["line_search"])
        assert share > 0.0
        expected = share * (2 * 0.02 / (step @ damped @ step)).sqrt() * step
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_the_natural_step_ends_after_its_iterations() -> None:
    agent, estimate, moved = stepped(update="natural", cg_iterations=1, learning_rate=0.5)
    mean = estimate.mean
    product = fisher_of(agent) @ mean + 0.3 * mean
    expected = 0.5 / (0.1 * 40) * (mean @ mean) / (mean @ product) * mean  # one step of conjugate gradients
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_the_surrogate_by_hand() -> None:
    """sum_t w_t (ratio_t - 1) and the mean of KL(old || new), over valid rows."""
    agent, data = prepared(**LINEAR)
    theta = agent.updaters["policy"].flat
    agent.estimator.gradient(theta, data, agent.ctx)
    evaluate = agent.learner.direction._surrogate(data, agent.ctx)
    assert [float(x) for x in evaluate(theta)] == pytest.approx([0.0, 0.0], abs=1e-6)
    other = theta + 0.3 * torch.randn(5)
    found = evaluate(other)
    with torch.no_grad():
        params = agent.ctx.bank.policy(other).params(data["obs"].flatten(0, 1))
    mean, log_std = (params[k].reshape(20, 2) for k in ("mean", "log_std"))
    new = torch.distributions.Normal(mean, log_std.exp())
    old = torch.distributions.Normal(data["old_mean"].squeeze(-1), data["old_log_std"].squeeze(-1).exp())
    action = data["action"].squeeze(-1)
    ratio = (new.log_prob(action) - old.log_prob(action)).exp()
    assert float(found[0]) == pytest.approx(float((agent.estimator.weight * (ratio - 1)).sum()), rel=1e-3)
    kl = float(torch.distributions.kl_divergence(old, new).mean())
    assert float(found[1]) == pytest.approx(kl, rel=1e-3)
    columns = {k: torch.cat([data[k], torch.full_like(data[k], 7)], 1) for k in data if k not in data.sequence}
    columns["valid"] = torch.cat([data["valid"], torch.zeros_like(data["valid"])], 1)
    agent.estimator.weight = torch.cat([agent.estimator.weight] * 2, 1)
    padded = agent.learner.direction._surrogate(Data(columns), agent.ctx)(other)
    assert [float(x) for x in padded] == pytest.approx([float(x) for x in found], rel=1e-4)


def test_the_trust_region_is_kept() -> None:
    agent = DBQPG("Pendulum-v1", DBQPGConfig(**SMALL, update="trpo", max_kl=1e-3), seed=2)
    agent.learn(until=agent.samples_per_iteration)
    assert float(agent.scalars["train/line_search"]) > 0.0
    data = agent.collector._stream.buffers.popitem()[1]
    out = agent.policy.params(data.obs[:-1].reshape(-1, 3))
    old = {k: data.extra[f"old_{k}"].reshape(-1, 1) for k in agent.policy.distribution.names}
    assert float(agent.policy.distribution.kl(old, {k: v.detach() for k, v in out.items()}).mean()) <= 1e-3


def test_dummy_rows_are_left_out() -> None:
    """Twice the same columns, one copy invalid: the same gradient."""
    agent, data = prepared(state_scale=0.5)
    theta = agent.updaters["policy"].flat
    expected = agent.estimator.gradient(theta, data, agent.ctx).mean
    columns = {k: torch.cat([data[k], torch.full_like(data[k], 77)], 1) for k in data if k not in data.sequence}
    columns["valid"] = torch.cat([data["valid"], torch.zeros_like(data["valid"])], 1)
    doubled = agent.estimator.gradient(theta, Data(columns), agent.ctx).mean
    assert torch.allclose(doubled, expected, atol=1e-8)


def test_it_learns_the_cart_pole() -> None:
    config = DBQPGConfig(num_envs=4, n_steps=100, hidden=(16,), update="trpo", max_kl=0.02, rank=20)
    agent = DBQPG("CartPole-v1", config, seed=0)
    agent.learn(until=400)
    early = agent.ep_rew_mean
    agent.learn(until=400 * 10)
    agent.episodes.clear()
    agent.learn(until=400 * 12)
    assert agent.ep_rew_mean > 2.0 * early


def test_equal_targets_give_no_gradient() -> None:
    agent, data = prepared("CartPole-v1")
    flat = data.derive(target=torch.zeros_like(data["target"]))
    estimate = agent.estimator.gradient(agent.updaters["policy"].flat, flat, agent.ctx)
    assert float(estimate.mean.abs().max()) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"update": "adam"}, {"targets": "td"}, {"solver": "lu"}, {"cg_tolerance": 1e-2}, {"fisher_scale": 0.0},
        {"rank": 0}, {"stretch_limit": 0.5}, {"damping": -1.0}, {"normalise_reward": True}, {"min_noise": 0.0},
        {"damping": math.nan}, {"learning_rate": math.nan}, {"state_scale": -1.0}, {"kernel_features": 0},
        {"compile": "on"}, {"learning_rate": 0.1}, {"adam_eps": 0.1}, {"max_kl": 0.1, "update": "natural"},
        {"damping": 0.2, "update": "vanilla"}, {"cg_iterations": 3, "update": "vanilla"}, {"stretch_limit": 2.0},
        {"stretch_limit": 2.0, "uncertainty": True, "update": "vanilla"}, {"gae_lambda": 0.9, "targets": "returns"},
        {"cg_tolerance": 1e-5, "solver": "exact"}, {"clip_norm": 1.0, "normalise_obs": False},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DBQPGConfig(**wrong)
