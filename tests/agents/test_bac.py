"""BAC: the batch posterior it must equal, angles on a random walk, solvers, its policy on a grid."""

from __future__ import annotations

import math
from dataclasses import replace

import gymnasium as gym
import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

import agents.bac.agent
import envs  # noqa: F401  (registers ids)
from agents.bac import BAC, BACConfig, BACEstimator, StateScale
from ccrl.gp.fisher import BatchFisher
from ccrl.gp.gptd import Chain, gptd
from ccrl.gp.kernels import rbf
from ccrl.policies import MLPPolicy
from ccrl.testing import ClockEnv, Episode

DOUBLE = torch.float64


def rollout(agent: BAC) -> tuple[Tensor, object]:
    theta = agent.updaters["policy"].flat
    (request,) = agent.estimator.plan({"on": theta}, {}, agent.ctx)
    return theta, agent.estimator.prepare({"on": agent.collector.collect(request, agent.policy)}, agent.ctx)["on"]


@pytest.mark.parametrize("natural", [False, True])
def test_on_terminating_episodes_it_is_regression_on_returns(natural: bool) -> None:
    """mean = c_F U (K + sigma^2 I)^-1 g with discounted returns to go g, by hand; G^-1 of it where natural."""
    config = BACConfig(
        num_envs=3, n_steps=20, gamma=0.9, noise=0.5, state_scale=2.0, fisher_scale=0.3, fisher="mean",
        lengthscale=0.7, natural=natural,
    )  # fmt: skip
    env = ClockEnv([[Episode(0, 4)], [Episode(1, 2)], [Episode(3, 5)]])
    agent = BAC(env, config)
    theta, data = rollout(agent)
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    u = agent.ctx.scores(theta.double(), data, "step").dense()
    assert u.shape[1] == 4 + 2 + 5
    fisher = BatchFisher("mean", 1e-6).estimate(u)
    x = agent.estimator.states(data["obs"][0])
    k = 2.0 * torch.exp(-0.5 * ((x - x.T) / 0.7).square()) + 0.3 * u.T @ fisher.inverse @ u
    returns = torch.tensor([sum(0.9**t for t in range(n - i)) for n in (4, 2, 5) for i in range(n)], dtype=DOUBLE)
    weights = torch.linalg.inv(k + 0.5 * torch.eye(len(k), dtype=DOUBLE))
    covariance = 0.3 * fisher.matrix - 0.09 * u @ weights @ u.T
    shape = fisher.inverse if natural else torch.eye(len(theta), dtype=DOUBLE)
    assert torch.allclose(estimate.mean, shape @ (0.3 * u @ weights @ returns), atol=1e-8)
    v = torch.randn(len(theta), dtype=DOUBLE)
    assert torch.allclose(estimate.covariance(v), shape @ covariance @ shape @ v, rtol=1e-4, atol=1e-8)
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert float(eigenvalues.min()) > -1e-10
    assert float(torch.linalg.eigvalsh(0.3 * fisher.matrix - covariance).min()) > -1e-10


@pytest.mark.parametrize("time_limit", ["bootstrap", "terminal"])
def test_a_time_limit_is_followed_by_a_bootstrap_pair_or_ends_the_task(time_limit: str) -> None:
    env = ClockEnv([[Episode(0, 4, "truncate")], [Episode(1, 2)]])
    agent = BAC(env, BACConfig(num_envs=2, n_steps=20, time_limit=time_limit))
    _, data = rollout(agent)
    assert int((~data["rewarded"]).sum()) == (1 if time_limit == "bootstrap" else 0)


def test_a_kernel_of_ones_own_takes_the_place_of_the_gaussian() -> None:
    agent = BAC(ClockEnv([[Episode(0, 4)]]), BACConfig(num_envs=1, n_steps=20, fisher="mean"))
    theta, data = rollout(agent)
    means = [
        BACEstimator(agent.config, agent.policy, agent.estimator.states, kernel).gradient(theta, data, agent.ctx).mean
        for kernel in (None, rbf(1.0), rbf(0.1))
    ]
    assert torch.equal(means[0], means[1])
    assert not torch.allclose(means[0], means[2])


def test_large_batches_are_solved_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[bool] = []
    solve = agents.bac.agent.gptd
    monkeypatch.setattr(agents.bac.agent, "gptd", lambda k, *a, **b: kernels.append(callable(k)) or solve(k, *a, **b))
    agent = BAC("CartPole-v1", BACConfig(num_envs=2, n_steps=5, noise=1.0))
    theta, data = rollout(agent)
    for limit in (data.shape[1], data.shape[1] - 1):
        monkeypatch.setattr(agents.bac.agent, "EXACT_UP_TO", limit)
        agent.estimator.gradient(theta, data, agent.ctx)
    assert kernels == [False, True]


def test_defaults_are_those_of_the_mountain_car() -> None:
    """Those of a public MATLAB implementation (docs/bac.md)."""
    c = BACConfig()
    assert (c.num_envs, c.n_steps, c.gamma, c.learning_rate, c.lr_decay) == (5, 200, 0.99, 0.025, None)
    assert (c.noise, c.nu, c.state_scale, c.fisher_scale, c.lengthscale) == (9.0, 0.1, 1.0, 1.0, 1.0)
    assert (c.fisher, c.damping, c.grid, c.discounted) == ("sum", 1e-6, 4, False)


def test_solvers_agree() -> None:
    """On a rollout with a truncated episode; the dictionary spans at a tiny threshold."""
    estimates = []
    for solver in ("exact", "cg", "sparse"):
        more = {"nu": 1e-11} if solver == "sparse" else {}
        config = BACConfig(num_envs=2, n_steps=12, solver=solver, fisher="mean", noise=0.5, **more)
        agent = BAC("Pendulum-v1", config, seed=4)
        theta, data = rollout(agent)
        estimates.append(agent.estimator.gradient(theta, data, agent.ctx))
    v = torch.randn(len(theta), dtype=DOUBLE)
    for other in estimates[1:]:
        assert torch.allclose(other.mean, estimates[0].mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(other.covariance(v), estimates[0].covariance(v), rtol=1e-4, atol=1e-5)


def test_conjugate_gradients_find_truncated_chains_easy() -> None:
    """1,200 points, 6 cut episodes, little noise: plain conjugate gradients on H K H^T give up after 1,000 iterations;
    preconditioned, a handful does, and the mean is Cholesky's."""
    config = BACConfig(num_envs=6, n_steps=199, policy="grid", noise=0.01, solver="cg")
    agent = BAC("ccrl/MountainCarTwoActions-v0", config, seed=0)
    theta, data = rollout(agent)
    assert int((~data["rewarded"]).sum()) == 6
    found = agent.estimator.gradient(theta, data, agent.ctx)
    exact = BACEstimator(replace(config, solver="exact"), agent.policy, agent.estimator.states)
    expected = exact.gradient(theta, data, agent.ctx)
    assert float((found.mean - expected.mean).norm()) < 1e-5 * float(expected.mean.norm())
    assert float(found.stats["gradient_std"]) == pytest.approx(float(expected.stats["gradient_std"]), rel=1e-6)


def test_a_state_kernel_alone_changes_no_prior() -> None:
    """It integrates to 0 against the scores: B and B0 stay c_F U and c_F G, the prior is c_F G."""
    agent = BAC("CartPole-v1", BACConfig(num_envs=2, n_steps=5, noise=1e12, state_scale=50.0, fisher="mean"))
    theta, data = rollout(agent)
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    u = agent.ctx.scores(theta.double(), data, "step").dense()[:, data["rewarded"][0]]
    prior = BatchFisher("mean", 1e-6).estimate(u).matrix
    v = torch.randn(len(theta), dtype=DOUBLE)
    assert torch.allclose(estimate.covariance(v), prior @ v, atol=1e-8)
    assert float(estimate.mean.norm()) < 1e-6


def test_discounting_weights_late_scores_less() -> None:
    both = [
        BAC("CartPole-v1", BACConfig(num_envs=2, n_steps=8, gamma=0.5, discounted=d, noise=1e12, fisher="sum"))
        for d in (False, True)
    ]
    theta, data = rollout(both[0])
    u = both[0].ctx.scores(theta.double(), data, "step").dense()
    keep, t = data["rewarded"][0], data["t"][0].double()
    v = torch.randn(len(theta), dtype=DOUBLE)
    for agent, weight in zip(both, (torch.ones_like(t), 0.5**t)):
        prior = (u * weight)[:, keep] @ u[:, keep].T @ v + 1e-6 * v
        assert torch.allclose(agent.estimator.gradient(theta, data, agent.ctx).covariance(v), prior, atol=1e-6)


def test_angles_on_the_random_walk() -> None:
    """At theta = 0 (docs/bac.md, results): BAC about 39 degrees at M = 5, Monte Carlo about 66."""
    exact = torch.tensor(  # of the discounted return: envs/classic/tabular.py, tests/envs/test_exact.py
        [2.788443, 7.104811, 10.018874, 11.767300, 12.492091, 12.252110, 11.027868, 8.719936, 5.140872], dtype=DOUBLE
    )
    generator = torch.Generator().manual_seed(0)

    def angle(v: Tensor) -> float:
        return float(torch.rad2deg(torch.acos((v @ exact / (v.norm() * exact.norm())).clamp(-1, 1))))

    bac, mc = [], []
    for _ in range(40):
        states, right, follows, times = [], [], [], []
        for _ in range(5):
            x, t = 0, 0
            while x < 9:
                right.append(bool(torch.rand((), generator=generator) < 0.5))
                states.append(x)
                times.append(t)
                x, t = (x + 1 if right[-1] else max(0, x - 1)), t + 1
                follows.append(x < 9)
        n, place = len(states), torch.tensor(states)
        u = torch.zeros(9, n, dtype=DOUBLE)
        u[place, torch.arange(n)] = torch.where(torch.tensor(right), 0.5, -0.5).double()
        distance = (place[:, None] - place).double()
        k = 100.0 * torch.exp(-distance.square() / 18.0) + u.T @ BatchFisher("sum").estimate(u).inverse @ u
        flags = torch.ones(n, dtype=torch.bool), torch.tensor(follows)
        steps = Chain(-torch.ones(n, dtype=DOUBLE), *flags, 0.99)
        bac.append(angle(u @ gptd(k, steps, 1.0).alpha))
        mc.append(angle(u @ (steps.returns() * 0.99 ** torch.tensor(times))))
    assert sum(bac) / 40 == pytest.approx(39.0, abs=5.0)
    assert sum(mc) / 40 > 55.0


def test_the_grid_policy() -> None:
    """4 x 4 bumps per action at (i - .5) / 4 of the scaled state, 1.3 * 0.25 wide; one at a centre is 1."""
    policy = BAC("ccrl/MountainCarTwoActions-v0", BACConfig(policy="grid")).policy
    assert sum(p.numel() for p in policy.parameters()) == 32
    centre = torch.tensor([[-1.2 + 1.7 * 0.125, -0.07 + 0.14 * 0.375]])
    features = policy.features(centre)[0]
    assert features.argmax() == 1
    assert float(features[1]) == pytest.approx(1.0, abs=1e-6)
    assert float(features[2]) == pytest.approx(float(torch.exp(torch.tensor(-0.5 / 1.3**2))), abs=1e-5)
    assert torch.equal(policy.params(centre)["logits"], torch.zeros(1, 2))
    coarse = BAC("ccrl/MountainCarTwoActions-v0", BACConfig(policy="grid", grid=2)).policy
    neighbour = coarse.features(torch.tensor([[-1.2 + 1.7 * 0.25, -0.07 + 0.14 * 0.25]]))[0, 1]
    assert float(neighbour) == pytest.approx(float(torch.exp(torch.tensor(-0.5 / 1.3**2))), abs=1e-5)


@pytest.mark.parametrize(
    ("env", "message"),
    [("CartPole-v1", "finite bounds"), ("FrozenLake-v1", "finite bounds"), ("Pendulum-v1", "Discrete")],
)
def test_where_the_grid_policy_does_not_fit(env: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAC(env, BACConfig(policy="grid"))


def test_a_policy_of_ones_own_is_not_replaced_by_the_grid() -> None:
    with pytest.raises(ValueError, match="policy: expected policy='mlp' next to a policy of your own"):
        BAC("ccrl/MountainCarTwoActions-v0", BACConfig(policy="grid"), policy=MLPPolicy)


def test_the_grid_policy_learns_from_its_own_rollouts() -> None:
    """The chain, the scores and the checkpoint of a policy that is no perceptron."""
    agent = BAC("ccrl/MountainCarTwoActions-v0", BACConfig(policy="grid", num_envs=2, n_steps=20), seed=1)
    agent.learn(until=80)
    assert agent.iteration == 2
    theta = agent.updaters["policy"].flat
    assert bool(theta.isfinite().all())
    assert float(theta.abs().max()) > 0
    other = BAC("ccrl/MountainCarTwoActions-v0", BACConfig(policy="grid", num_envs=2, n_steps=20), seed=2)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.learn(until=120).updaters["policy"].flat, agent.learn(until=120).updaters["policy"].flat)


def test_states_are_scaled_by_their_bounds() -> None:
    space = gym.spaces.Box(torch.tensor([-2.0, -torch.inf]).numpy(), torch.tensor([2.0, torch.inf]).numpy())
    policy = MLPPolicy(space, gym.spaces.Discrete(2), hidden=())
    assert StateScale(space, policy)(torch.tensor([[0.0, 7.0]])).tolist() == [[0.5, 7.0]]
    # finite only because a number had to stand there: scaled, nothing would be left of the coordinate
    nominal = gym.spaces.Box(-3e38, 3e38, (1,))
    policy = MLPPolicy(nominal, gym.spaces.Discrete(2), hidden=())
    assert StateScale(nominal, policy)(torch.tensor([[7.0]])).tolist() == [[7.0]]
    # a coordinate that has one value is no division by 0
    fixed = gym.spaces.Box(torch.tensor([0.0, 5.0]).numpy(), torch.tensor([4.0, 5.0]).numpy())
    policy = MLPPolicy(fixed, gym.spaces.Discrete(2), hidden=())
    assert StateScale(fixed, policy)(torch.tensor([[1.0, 5.0]])).tolist() == [[0.25, 0.0]]
    discrete = gym.spaces.Discrete(3)
    policy = MLPPolicy(discrete, gym.spaces.Discrete(2), hidden=())
    assert StateScale(discrete, policy)(torch.tensor([2])).tolist() == [[0.0, 0.0, 1.0]]


def test_it_learns_the_cart_pole() -> None:
    agent = BAC("CartPole-v1", BACConfig(num_envs=5, noise=1.0, fisher="mean", learning_rate=2.0), seed=0)
    agent.learn(until=500)
    early = agent.ep_rew_mean
    agent.learn(until=8000)
    agent.episodes.clear()
    agent.learn(until=agent.num_timesteps + 1)
    assert agent.ep_rew_mean > 2.0 * early


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "tree"}, {"fisher": "running"}, {"solver": "svd"}, {"noise": 0.0}, {"nu": 0.0}, {"grid": 0},
        {"lengthscale": 0.0}, {"state_scale": 0.0}, {"fisher_scale": -1.0}, {"normalise_obs": True, "policy": "grid"},
        {"hidden": (8,), "policy": "grid"}, {"activation": "elu", "policy": "grid"}, {"grid": 5}, {"damping": math.nan},
        {"squash": True, "policy": "grid"}, {"log_std_init": -1.0, "policy": "grid"}, {"nu": 1e-3, "solver": "exact"},
        {"orthogonal": False, "policy": "grid"}, {"compile": "on"}, {"noise": math.nan},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BACConfig(**wrong)
