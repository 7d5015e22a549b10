"""BPG on tasks whose gradient is known, and with observations that hide the state."""

from __future__ import annotations

import copy
import math

import gymnasium as gym
import pytest
import torch
from torch import Tensor

pytest.importorskip("gpytorch")

import envs
from agents.bpg import BPG, BPGConfig, BPGEstimator, make_fisher
from agents.bpg.quadrature import model1, model2
from ccrl.batched_env import AutoresetMode, StepResult
from ccrl.data import Data
from ccrl.gp.fisher import AnalyticFisher, FisherEstimate, RunningFisher
from ccrl.policies import MLPPolicy

LQR = {"n_steps": 20, "gamma": 1.0, "orthogonal": False}


class Regulator(BPG):
    """With the policy of the task, ``a ~ N(-0.2 x, 1)``: a gain and a deviation, no bias."""

    def make_policy(self, heads) -> MLPPolicy:
        policy = super().make_policy(heads)
        policy.actor.net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        torch.nn.init.constant_(policy.actor.net[0].weight, -0.2)
        return policy


def lqr_agent(episodes: int, **options) -> BPG:
    return Regulator("ccrl/LQR-v0", BPGConfig(num_envs=episodes, **LQR, **options), seed=1)


def rollout(agent: BPG) -> tuple[Tensor, object]:
    theta = agent.updaters["policy"].flat
    have = {}
    for request in agent.estimator.plan({"on": theta}, {}, agent.ctx):
        have[request.tag] = agent.collector.collect(request, agent.policy)
    return theta, agent.estimator.prepare(have, agent.ctx)["on"]


@pytest.mark.parametrize(("number", "model"), [(1, model1), (2, model2)])
def test_the_estimate_is_the_posterior_of_scores_and_returns(number: int, model) -> None:
    """Scores one path at a time by autograd, returns by a loop."""
    config = BPGConfig(num_envs=4, n_steps=20, gamma=0.9, model=number, fisher="mean", damping=1.0, noise=0.5)
    agent = BPG("ccrl/LQR-v0", config, seed=1)
    theta, data = rollout(agent)
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    scores, returns = [], []
    for i in range(4):
        agent.policy.zero_grad()
        column = data.take(torch.tensor([i]))
        agent.policy.evaluate(column, frozenset({"log_prob"}))["log_prob"].sum().backward()
        scores.append(torch.cat([p.grad.flatten().double() for p in agent.policy.parameters()]))
        returns.append(sum(0.9**t * float(data["reward"][t, i]) for t in range(20)))
    u, y = torch.stack(scores, 1), torch.tensor(returns, dtype=torch.float64)
    fisher = agent.estimator.fisher.estimate(u)
    expected = model(u, y - y.mean(), fisher, 0.5)
    assert torch.allclose(estimate.mean, expected.mean, rtol=1e-3, atol=1e-4 * float(expected.mean.norm()))
    v = torch.randn(len(theta), dtype=torch.float64)
    assert torch.allclose(estimate.covariance(v), expected.covariance(v), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("natural", [False, True])
def test_every_setting_of_the_posterior_counts(natural: bool) -> None:
    """Amplitude, constant, sparsity and natural step; scores of the float32 policy are those of a float64 one."""
    settings = {"amplitude": 2.0, "constant": 3.0, "sparsity": 2.0}
    config = BPGConfig(
        num_envs=6, n_steps=20, fisher="sum", damping=0.7, noise=0.5, natural=natural, baseline=False, **settings
    )
    agent = BPG("ccrl/LQR-v0", config, seed=1)
    theta, data = rollout(agent)
    estimate = agent.estimator.gradient(theta, data, agent.ctx)
    policy, scores = copy.deepcopy(agent.policy).double(), []
    for i in range(6):
        policy.zero_grad()
        obs, action = (data[k][:, i : i + 1].double() for k in ("obs", "action"))
        column = Data({"obs": obs, "action": action, "valid": torch.ones(20, 1)})
        policy.evaluate(column, frozenset({"log_prob"}))["log_prob"].sum().backward()
        scores.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    u = torch.stack(scores, 1)
    matrix = u @ u.T + 0.7 * torch.eye(len(u), dtype=torch.float64)
    fisher = FisherEstimate(matrix, torch.linalg.inv(matrix))
    expected = model2(u, data["episode_reward"].double(), fisher, 0.5, **settings)
    dense = model2(u, data["episode_reward"].double(), fisher, 0.5, **(settings | {"sparsity": None}))
    assert not torch.allclose(expected.mean, dense.mean, rtol=1e-3)
    if natural:
        expected = expected.natural(fisher.inverse)
    torch.testing.assert_close(estimate.mean, expected.mean, rtol=1e-8, atol=1e-10)
    v = torch.randn(len(theta), dtype=torch.float64)
    torch.testing.assert_close(estimate.covariance(v), expected.covariance(v), rtol=1e-8, atol=1e-10)


def test_the_fisher_matrix_that_the_settings_name() -> None:
    running = make_fisher(BPGConfig(fisher_rate=0.3, damping=1e-3), 2)
    assert isinstance(running, RunningFisher)
    assert (running.rate, running.damping, running.matrix.shape) == (0.3, 1e-3, (2, 2))
    for kind in ("mean", "sum"):
        batch = make_fisher(BPGConfig(fisher=kind, damping=0.5), 2)
        assert (batch.reduction, batch.damping) == (kind, 0.5)


def test_angles_to_the_exact_gradient_on_the_regulator() -> None:
    """With the analytic Fisher matrix, M = 20, about 4 to 6 degrees; Monte Carlo has 33 (docs/bpg.md, results)."""
    agent = lqr_agent(20)
    env = envs.make("ccrl/LQR-v0", 1)
    exact = env.exact_gradient(agent.policy)
    fisher = AnalyticFisher(lambda: env.exact_fisher(agent.policy))
    angles = {name: [] for name in ("mc", "one", "two")}
    models = {
        "one": BPGEstimator(BPGConfig(num_envs=20, model=1, noise=0.1, baseline=False, **LQR), fisher),
        "two": BPGEstimator(BPGConfig(num_envs=20, constant=1e4, noise=0.1, baseline=False, **LQR), fisher),
    }

    def angle(v: Tensor) -> float:
        return float(torch.rad2deg(torch.acos(v @ exact / (v.norm() * exact.norm()))))

    for _ in range(30):
        theta, data = rollout(agent)
        scores = agent.ctx.scores(theta.double(), data, "trajectory")
        angles["mc"].append(angle(scores.vjp(data["episode_reward"].double())))
        for name, estimator in models.items():
            angles[name].append(angle(estimator.gradient(theta, data, agent.ctx).mean))
    mean = {name: sum(x) / len(x) for name, x in angles.items()}
    assert mean["mc"] > 20.0
    assert mean["one"] < 10.0
    assert mean["two"] < 10.0


def test_equal_returns_move_nothing() -> None:
    agent = BPG("CartPole-v1", BPGConfig(num_envs=3, n_steps=2))  # two steps are always survived
    before = agent.updaters["policy"].flat.clone()
    agent.learn(until=6)
    assert torch.allclose(agent.updaters["policy"].flat, before)


def test_one_path_is_allowed_and_keeps_its_return() -> None:
    agent = BPG("CartPole-v1", BPGConfig(num_envs=1, n_steps=5))
    before = agent.updaters["policy"].flat.clone()
    agent.learn(until=5)
    assert not torch.equal(agent.updaters["policy"].flat, before)
    assert bool(agent.updaters["policy"].flat.isfinite().all())


def test_the_running_fisher_matrix_survives_directions_without_scores() -> None:
    """Adding a number to both logits changes nothing: the matrix decays there, its inverse must not overflow."""
    agent = BPG("CartPole-v1", BPGConfig(num_envs=20, n_steps=5, fisher_rate=0.5, natural=True, learning_rate=1e-3))
    agent.learn(until=100 * 60)  # 1,200 paths: 0.5^1200 underflows
    inverse = agent.estimator.fisher.inverse
    assert bool(inverse.isfinite().all())
    assert float(torch.linalg.eigvalsh(inverse).max()) < 1.1 / agent.config.damping
    assert bool(agent.updaters["policy"].flat.isfinite().all())


def test_it_learns_the_regulator() -> None:
    agent = lqr_agent(10, model=1, learning_rate=2e-3, noise=1.0)
    before = _regulator_cost(agent)
    agent.learn(until=10 * 20 * 40)
    assert _regulator_cost(agent) < 0.7 * before


def _regulator_cost(agent: BPG) -> float:
    _, data = rollout(agent)
    return -float(data["episode_reward"].mean())


class Hidden:
    """A hidden sign, an observation of it with noise, reward ``sign * action``: the state is never shown."""

    autoreset_mode, provides_final_obs = AutoresetMode.SAME_STEP, True
    device = torch.device("cpu")
    single_observation_space = gym.spaces.Box(-10, 10, (1,))
    single_action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.generator = num_envs, torch.Generator()

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tensor:
        if seed is not None:
            self.generator.manual_seed(seed)
        self.sign = torch.randint(2, (self.num_envs,), generator=self.generator) * 2.0 - 1.0
        return self.observe()

    def observe(self) -> Tensor:
        return (self.sign + torch.randn(self.num_envs, generator=self.generator)).unsqueeze(1)

    def step(self, action: Tensor) -> StepResult:
        reward = self.sign * action[:, 0]
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        obs = self.observe()
        return StepResult(obs, reward, never, never, obs)

    def close(self) -> None:
        """Nothing to release."""


def test_it_learns_from_observations_that_hide_the_state() -> None:
    agent = BPG(Hidden(20), BPGConfig(num_envs=20, n_steps=5, learning_rate=0.05), seed=0)
    agent.learn(until=20 * 5 * 30)
    assert agent.policy.actor.net[0].weight.item() > 0.3, "the action must follow the observed sign"


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": 3}, {"fisher": "exact"}, {"noise": 0.0}, {"amplitude": 0.0}, {"constant": -1.0}, {"sparsity": 0.0},
        {"learning_rate": 0.0}, {"lr_decay": 0.0}, {"noise": math.nan}, {"constant": math.nan}, {"compile": "on"},
        {"fisher_rate": 0.1, "fisher": "mean"}, {"clip_norm": 1.0}, {"activation": "elu"}, {"time_limit": "terminal"},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BPGConfig(**wrong)


def test_the_step_size_decays() -> None:
    agent = BPG("CartPole-v1", BPGConfig(num_envs=2, n_steps=3, learning_rate=0.1, lr_decay=2.0))
    agent.learn(until=6 * 3)
    assert float(agent.scalars["train/learning_rate"]) == pytest.approx(0.1 * 2.0 / (2.0 + 2.0))
