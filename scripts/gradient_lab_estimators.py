"""The estimators that the gradient lab can name, each as one call: rollouts in, gradient (and covariance) out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from agents.harpg import HARPGConfig, HARPGEstimator
from agents.npg_igt import NPGIGTConfig, NPGIGTEstimator
from ccrl.collect import Collector
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context
from ccrl.estimators.stages import EpisodeReturn, Gae, Values
from ccrl.gp.fisher import AnalyticFisher
from ccrl.policies import MLPPolicy
from ccrl.seeding import stream_seed
from ccrl.updaters import GradientEstimate
from scripts import gradient_lab_problems as problems

__all__ = ["NAMES", "Estimate", "build"]

Estimate = Callable[[Data], GradientEstimate]
"""Rollouts ``[T, M]`` of the problem's policy -> an estimate of ``grad J``, ``[n]``."""

PATH = 8
"""Points of the path along which momentum methods arrive."""


def build(name: str, setting: Any, episodes: int, path_step: float = 0.02) -> Estimate:
    """The estimator ``name`` for rollouts of ``episodes`` episodes.

    :raises ValueError: an unknown name.
    """
    if name in _PLAIN:
        return _PLAIN[name](setting)
    if name.startswith("bpg"):
        return _bpg(name, setting, episodes)
    if name == "bac":
        return _bac(setting, episodes)
    if name == "dbqpg":
        return _dbqpg(setting, episodes)
    for config, estimator in ((NPGIGTConfig, NPGIGTEstimator), (HARPGConfig, HARPGEstimator)):
        if name in estimator.rules and estimator.rules[name].eta is not None:
            return _momentum(config, estimator, name, setting, episodes, path_step)
    if name in agents.AGENTS:
        return _surrogate(name, setting, episodes)
    raise ValueError(f"estimators: expected some of {', '.join(NAMES)}, got {name!r}")


# -- from paths alone -------------------------------------------------------------------------------------------------


def _from_paths(setting: Any, weights: Callable[[Data], Tensor]) -> Estimate:
    """``mean_i sum_t weight_ti score_ti`` with the covariance of that mean, from the spread between episodes."""

    def estimate(data: Data) -> GradientEstimate:
        row, column = (data["valid"] > 0).nonzero(as_tuple=True)
        # valid rows alone: long horizons are mostly empty
        rows = {name: data[name][row, column].unsqueeze(0) for name in ("obs", "action", "valid")}
        scores = setting.scores(setting.theta, Data(rows), "step").dense()  # [n, K]
        n, m = scores.shape[0], data.shape[1]
        paths = scores.new_zeros(n, m).index_add_(1, column, scores * weights(data)[row, column].double())
        matrix = torch.cov(paths).reshape(n, n) / m if m > 1 else paths.new_full((n, n), torch.nan)
        return GradientEstimate(paths.mean(1), covariance=lambda v: matrix @ v)

    return estimate


def _mc(setting: Any) -> Estimate:
    returns = EpisodeReturn(setting.problem.gamma)
    return _from_paths(setting, lambda data: returns(data)["episode_reward"].expand(data.shape))


def _rloo(setting: Any) -> Estimate:
    """Minus the mean return of the other episodes; alone: no baseline."""
    returns = EpisodeReturn(setting.problem.gamma)

    def weights(data: Data) -> Tensor:
        score = returns(data)["episode_reward"]
        m = score.shape[0]
        return ((score - score.mean()) * (m / (m - 1)) if m > 1 else score).expand(data.shape)

    return _from_paths(setting, weights)


def _gpomdp(setting: Any) -> Estimate:
    return _from_paths(setting, lambda data: setting.weigh(data)["psi"])


def _gae(setting: Any) -> Estimate:
    p = setting.problem
    values = Values(lambda obs: problems.design(p.features(obs).double()) @ setting.critic)
    advantage = Gae(p.gamma, 0.95)
    return _from_paths(setting, lambda data: advantage(values(data))["advantage"] * p.gamma ** data["t"].double())


_PLAIN = {"mc": _mc, "rloo": _rloo, "gpomdp": _gpomdp, "gae": _gae}


# -- with a posterior -------------------------------------------------------------------------------------------------


def _prepared(setting: Any, estimator: Any, scale: Callable[[Data, Data], Tensor] | None = None) -> Estimate:
    """The estimator's life cycle on given rollouts; the result is multiplied with ``scale(rollouts, prepared)``."""

    def estimate(data: Data) -> GradientEstimate:
        have = {"on": data}
        estimator.fit(have, setting.ctx)
        with torch.no_grad():
            ready = estimator.prepare(have, setting.ctx)["on"]
        got: GradientEstimate = estimator.gradient(setting.theta, ready, setting.ctx)
        if scale is None:
            return got
        s = scale(data, ready).double()
        covariance = got.covariance
        assert covariance is not None
        return GradientEstimate(s * got.mean, covariance=lambda v: s * s * covariance(v))

    return estimate


def _steps(data: Data) -> Tensor:
    """Steps per episode: Fisher matrices and gradients that are means over steps, times this, belong to whole paths."""
    return data["valid"].sum() / data.shape[1]


def _bpg(name: str, setting: Any, episodes: int) -> Estimate:
    """bpg1, bpg2: the two models, plain. bpg2c: with a constant. bpg2s: with a constant, kernel and noise in the scale
    of the returns (the mean of bpg2c; a covariance that can be calibrated)."""
    from agents.bpg import BPGConfig, BPGEstimator

    if name not in ("bpg1", "bpg2", "bpg2c", "bpg2s"):
        raise ValueError(f"estimators: expected bpg1, bpg2, bpg2c or bpg2s, got {name!r}")
    p = setting.problem
    constant = 1e4 if name in ("bpg2c", "bpg2s") else 0.0
    config = BPGConfig(
        num_envs=episodes, n_steps=p.horizon, gamma=p.gamma, model=2 if name[3] == "2" else 1,
        baseline=False, constant=constant, **p.bpg,
    )  # fmt: skip
    estimator = BPGEstimator(config, AnalyticFisher(lambda: setting.fisher))
    if name != "bpg2s":
        return _prepared(setting, estimator)
    returns, plain = EpisodeReturn(p.gamma), _prepared(setting, estimator)

    def scaled(data: Data) -> GradientEstimate:
        # the kernel of a path is n on average, so n times the amplitude is the variance of the returns
        s = float(returns(data)["episode_reward"].var(unbiased=False).clamp_min(1e-12)) / len(setting.theta)
        estimator.config = replace(config, amplitude=s, noise=s * config.noise, constant=s * constant)
        return plain(data)

    return scaled


def _bac(setting: Any, episodes: int) -> Estimate:
    from agents.bac import BACConfig, BACEstimator

    p = setting.problem
    config = BACConfig(
        num_envs=episodes, n_steps=p.horizon, gamma=p.gamma, **({"fisher": "mean", "discounted": True} | p.bac)
    )
    estimator = BACEstimator(config, setting.policy, lambda obs: obs.reshape(obs.shape[0], -1).double())
    # the kernel integrates to c_F U if G belongs to the measure of the gradient: the discounted visits of an episode
    return _prepared(setting, estimator, lambda data, ready: _steps(data))


def _dbqpg(setting: Any, episodes: int) -> Estimate:
    """Its deep kernel learns by one step per rollout, as in training; 100 steps before the first estimate."""
    from agents.dbqpg import DBQPGConfig, DBQPGEstimator

    p = setting.problem
    config = DBQPGConfig(
        num_envs=episodes, n_steps=p.horizon, gamma=p.gamma, normalise_obs=False, rank=len(setting.theta)
    )
    env = setting.make(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        inputs = MLPPolicy(env.single_observation_space, env.single_action_space, hidden=(), heads={})
        estimator = DBQPGEstimator(config, inputs, setting.theta)

    def scale(data: Data, ready: Data) -> Tensor:
        return _steps(data) * ready["advantage"][ready["valid"] > 0].std()  # its targets are standardised

    estimate, rollouts = (
        _prepared(setting, estimator, scale),
        setting.rollouts(episodes, stream_seed(setting.seed, "kernel")),
    )
    for _ in range(100):
        estimator.fit({"on": next(rollouts)}, setting.ctx)
    return estimate


# -- surrogates -------------------------------------------------------------------------------------------------------


def _surrogate(name: str, setting: Any, episodes: int) -> Estimate:
    """Minus the gradient of an agent's first loss at the parameters that sampled the rollouts, in the scale of a sum
    over steps and a mean over episodes. The agent is the real one, built around the problem's policy."""
    cls, p = agents.get_agent(name), setting.problem
    if "num_envs" not in cls.Config.__dataclass_fields__:
        raise ValueError(f"estimators: {name!r} does not learn from rollouts; expected some of {', '.join(NAMES)}")

    class Lab(cls):  # type: ignore[misc,valid-type]
        def make_policy(self, heads: Any) -> Any:
            # a copy: an updater turns parameters into views of its own vector
            return problems.ActorCritic(copy.deepcopy(setting.policy), p.features, setting.critic, tuple(heads))

    fields = cls.Config.__dataclass_fields__
    plain = {"normalise_obs": False, "normalise_reward": False, "compile": "off"}
    config = cls.Config(
        num_envs=episodes, n_steps=p.horizon, gamma=p.gamma, **{k: v for k, v in plain.items() if k in fields}
    )
    agent = Lab(setting.make(episodes), config, seed=setting.seed)
    if not agent.estimator.phases():
        raise ValueError(f"estimators: {name!r} has no surrogate loss; expected some of {', '.join(NAMES)}")
    phase, n = agent.estimator.phases()[0], len(setting.theta)

    def estimate(data: Data) -> GradientEstimate:
        with torch.no_grad():
            ready = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
        batch = ready.epoch(Batching(size="full"), None)[0]
        mean = -phase.updater.gradient(phase.terms, batch).mean[:n].double()
        return GradientEstimate(mean * _steps(data))

    return estimate


# -- momentum ---------------------------------------------------------------------------------------------------------


def _momentum(config: Any, estimator: Any, name: str, setting: Any, episodes: int, path_step: float) -> Estimate:
    """``d`` at the problem's parameters after ``PATH`` moves along the true gradient, of the lengths of the method's
    own normalised steps. Every point is sampled anew (the line and look-ahead points too), so the rollouts given are
    not used: the method pays ``PATH + 1`` to ``2 PATH + 1`` times as many episodes."""
    p = setting.problem
    config = config(variant=name, num_envs=episodes, n_steps=p.horizon, gamma=p.gamma, learning_rate=path_step)
    lengths = path_step * 2.0 / (torch.arange(PATH, dtype=torch.float64) + 2.0)
    back = torch.cat([lengths.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    path = setting.theta - back.unsqueeze(1) * setting.truth / setting.truth.norm()
    env = setting.make(episodes)
    collector = Collector(env, seed=stream_seed(setting.seed, "path"), make_env=lambda n: env)
    k = torch.zeros((), dtype=torch.float64)
    own = setting.ctx
    ctx = Context(own.generator, own.bank, own.scores, k=k)

    def estimate(data: Data) -> GradientEstimate:
        k.zero_()
        direction = estimator(config, path[0])
        for theta in path:
            points = direction.points(theta, ctx)
            have: dict[str, Data] = {}
            while requests := direction.plan(points, have, ctx):
                for request in requests:
                    have[request.tag] = collector.collect(request, cast(Any, ctx.bank.policy(request.params)))
            ready = direction.prepare(have, ctx)
            direction.step(theta, lambda tag: direction.gradient(points[tag], ready[tag], ctx), ready, ctx)  # noqa: B023
            k.add_(1.0)
        return GradientEstimate(direction.d)

    return estimate


NAMES = (
    *_PLAIN, "bpg1", "bpg2", "bpg2c", "bpg2s", "bac", "dbqpg", "nmpg", "npg_igt", "harpg", "nharpg", "storm",
    "a2c", "bpo", "mdpo", "ppo",
)  # fmt: skip
"""Estimators by name: from paths, Bayesian, momentum methods on a path, and the agents with surrogate losses."""
