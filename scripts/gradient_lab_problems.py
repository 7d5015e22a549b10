"""What the gradient lab measures on: environments with the policies at which gradients are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from ccrl.bank import Bank
from ccrl.batched_env import BatchedEnv
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.scores import Scores
from ccrl.estimators.trajectory import TrajectoryEstimator
from ccrl.policies import GibbsPolicy, LinearGaussianPolicy, MLPPolicy, OneHot, RBFGrid
from ccrl.seeding import named_generator, stream_seed
from envs.classic import Exact

__all__ = ["PROBLEMS", "ActorCritic", "Problem", "Setting", "design", "problem"]


def _linear(env: Any, gain: float, std: float) -> nn.Module:
    return LinearGaussianPolicy(env.single_observation_space, env.single_action_space, gain=gain, std=std)


def _tabular(env: Any, states: int, pinned: bool) -> nn.Module:
    space = env.single_observation_space, env.single_action_space
    return GibbsPolicy(*space, features=OneHot(states), pinned=pinned)


def _grid(env: Any) -> nn.Module:
    space = env.single_observation_space
    return GibbsPolicy(space, env.single_action_space, features=RBFGrid(space.low.tolist(), space.high.tolist()))


def _perceptron(env: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(8,), heads={})


@dataclass(frozen=True)
class Problem:
    """An environment, the policy whose gradient is wanted, and settings that estimators read."""

    env: str
    policy: Callable[[Any], nn.Module]
    gamma: float
    horizon: int
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] = lambda obs: obs.reshape(obs.shape[0], -1)
    """Observations ``[K, ...]`` -> what critics are linear in, ``[K, D]``."""
    bpg: dict[str, Any] = field(default_factory=dict)
    """Of ``BPGConfig``."""
    bac: dict[str, Any] = field(default_factory=dict)
    """Of ``BACConfig``."""


_BANDIT = partial(_linear, gain=0.0, std=1.0)
PROBLEMS = {
    "bandit-linear": Problem("ccrl/Bandit-v0", _BANDIT, 1.0, 1, bpg={"noise": 1e-3}),
    "bandit-quadratic": Problem("ccrl/Bandit-v0", _BANDIT, 1.0, 1, {"kind": "quadratic"}, bpg={"noise": 1e-3}),
    "lqr": Problem(
        "ccrl/LQR-v0", partial(_linear, gain=-0.2, std=1.0), 1.0, 20, bpg={"noise": 0.1},
        bac={"noise": 100.0, "state_scale": 1000.0, "fisher_scale": 100.0},
    ),
    "random-walk": Problem(
        "ccrl/RandomWalk-v0", partial(_tabular, states=9, pinned=True), 0.99, 2000, features=OneHot(10),
        bpg={"noise": 0.1}, bac={"noise": 1.0, "state_scale": 100.0, "lengthscale": 3.0},
    ),
    "random-mdp": Problem(
        "ccrl/RandomMDP-v0", partial(_tabular, states=5, pinned=False), 0.9, 15, features=OneHot(5),
        bpg={"noise": 0.1}, bac={"noise": 1.0, "lengthscale": 0.5},
    ),
    "mountain-car": Problem("ccrl/MountainCarTwoActions-v0", _grid, 0.99, 200, bac={"noise": 9.0}),
}  # fmt: skip
"""Name -> problem. Any other environment id is taken with a small perceptron at its initial parameters."""


def problem(name: str) -> Problem:
    """The problem called ``name``, or one made of an environment id."""
    return PROBLEMS[name] if name in PROBLEMS else Problem(name, _perceptron, 0.99, 200)


class ActorCritic(nn.Module):
    """The problem's policy with a fitted critic: what agents with surrogate losses are built around.

    Parameters are named ``actor.*`` and ``critic.*`` as in the perceptron policy; every value head is the same critic,
    linear in ``x, x^2, 1`` of the problem's features.
    """

    unit = "transition"
    normalise_obs = False

    def __init__(
        self, actor: Any, features: Callable[[Tensor], Tensor], weight: Tensor, heads: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.actor, self.distribution = actor, actor.distribution
        self.critic = nn.ParameterDict({"weight": nn.Parameter(weight.float())})
        self._features, self.heads = [features], tuple(heads)  # in a list: a module of its own would be saved twice
        for name in ("act", "draw_noise", "initial_state", "to_env", "behaviour", "behaviour_fields"):
            setattr(self, name, getattr(actor, name))

    def values(self, obs: Tensor, head: str = "value") -> Tensor:
        """``[B]``."""
        found: Tensor = design(self._features[0](obs)) @ self.critic["weight"]
        return found

    def outputs(self) -> frozenset[str]:
        actors: frozenset[str] = self.actor.outputs()
        return actors | frozenset(self.heads)

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = self.actor.evaluate(batch, want & self.actor.outputs())
        heads = [head for head in self.heads if head in want]
        if heads:
            out |= dict.fromkeys(heads, self.values(batch["obs"].flatten(0, 1)).reshape(batch.shape))
        return out


def design(x: Tensor) -> Tensor:
    """``[K, 2 D + 1]``: what the critic is linear in."""
    return torch.cat([x, x * x, torch.ones_like(x[:, :1])], 1)


class Setting:
    """A problem made ready: environment, policy, true gradient, and what is learnt from ``warmup`` episodes of its own
    (a critic; the Fisher matrix and the reference gradient where none is exact).

    :param reference: episodes of the reference gradient where there is no exact one.
    """

    def __init__(self, name: str, seed: int = 0, warmup: int = 500, reference: int = 20_000) -> None:
        self.problem = p = problem(name)
        self.seed = seed
        env = self.make(warmup)
        self.policy: Any = p.policy(env)
        self.theta = torch.cat([x.detach().double().reshape(-1) for x in self.policy.parameters()])
        self.ctx = Context(named_generator(seed, "context"), Bank(self.policy), self.scores)
        data = next(self.rollouts(warmup, stream_seed(seed, "critic"), env))
        self.critic = self._fit(data)
        self.truth_error: Tensor | None = None
        """Standard errors of the reference gradient ``[n]``; None: it is exact."""
        if isinstance(env, Exact):
            self.truth, self.fisher = env.exact_gradient(self.policy), env.exact_fisher(self.policy)
        else:
            u = self.scores(self.theta, data, "trajectory").dense()
            self.fisher = u @ u.T / warmup
            self.truth, self.truth_error = self._reference(env, -(-reference // warmup))

    def make(self, episodes: int) -> BatchedEnv:
        """``episodes`` copies of the environment."""
        return envs.make(self.problem.env, episodes, **self.problem.env_kwargs)

    def scores(self, theta: Tensor, data: Data, level: Any) -> Scores:
        return Scores(self.policy, theta, data, level)

    def rollouts(self, episodes: int, seed: int, env: BatchedEnv | None = None) -> Iterator[Data]:
        """Fresh episodes ``[horizon, episodes]`` of the policy, without end; each is valid until the next."""
        env = self.make(episodes) if env is None else env
        collector = Collector(env, seed=seed, make_env=lambda n: env)
        while True:
            yield collector.collect(Request(episodes=episodes, horizon=self.problem.horizon), self.policy)

    def weigh(self, data: Data) -> Data:
        """``psi``: the discounted reward to go, ``[T, N]``."""
        p = self.problem
        return TrajectoryEstimator(episodes=data.shape[1], horizon=p.horizon, gamma=p.gamma).weigh(data)

    def _fit(self, data: Data) -> Tensor:
        target = self.weigh(data)["reward_to_go"]
        keep = data["valid"].reshape(-1) > 0
        x = design(self.problem.features(data["obs"].flatten(0, 1)[keep]).double())
        gram = x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)
        found: Tensor = torch.linalg.solve(gram, x.T @ target.reshape(-1)[keep].double())
        return found

    def _reference(self, env: BatchedEnv, batches: int) -> tuple[Tensor, Tensor]:
        """Mean over batches of the gradient with reward to go minus the critic, and its standard errors."""
        means, rollouts = [], self.rollouts(env.num_envs, stream_seed(self.seed, "reference"), env)
        for _ in range(batches):
            data = self.weigh(next(rollouts))
            value = design(self.problem.features(data["obs"].flatten(0, 1)).double()) @ self.critic
            discount = self.problem.gamma ** data["t"].double()
            advantage = data["psi"].double() - discount * value.reshape(data.shape)
            weight = torch.where(data["valid"] > 0, advantage, 0.0) / data.shape[1]
            means.append(self.scores(self.theta, data, "step").vjp(weight))
        stacked = torch.stack(means)
        return stacked.mean(0), stacked.std(0) / len(means) ** 0.5
