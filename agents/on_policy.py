"""What on-policy agents share: the settings of rollout and networks, and the stages from rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.stages import Gae, RewardNorm, Values
from ccrl.policies import MLPPolicy
from ccrl.updaters import FlatUpdater, linear_decay

__all__ = ["VALUE", "OnPolicyConfig", "OnPolicyEstimator", "check_eager", "check_positive", "check_unused"]

VALUE = frozenset({"value"})
"""What a value loss wants of the policy."""


@dataclass(frozen=True)
class OnPolicyConfig:
    """What every on-policy agent has."""

    num_envs: int = 16
    """Parallel environments."""
    n_steps: int = 128
    """Steps per environment and iteration; the rollout holds num_envs * n_steps."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """GAE's lambda."""
    time_limit: str = "bootstrap"
    """A time limit has a value after it (bootstrap) or ends the task (terminal: older code, biased)."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of the actor and of the critic (which share nothing)."""
    activation: str = "tanh"
    """tanh, relu, elu or silu."""
    log_std_init: float = 0.0
    """Initial log standard deviation of Gaussian policies."""
    orthogonal: bool = True
    """Orthogonal initialisation (hidden sqrt 2, policy output 0.01, value output 1)."""
    squash: bool = False
    """Gaussian actions through tanh onto the bounds; else clipped for the environment only."""
    normalise_obs: bool = False
    """Running observation statistics, part of the policy, moved once per iteration."""
    normalise_reward: bool = False
    """Rewards divided by the running deviation of the discounted return (training only; logs stay raw)."""
    clip_norm: float = 10.0
    """Normalised observations and rewards are clipped to +- this."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    compile: str = "auto"
    """Fuse updates into compiled graphs: auto (from 1,000 gradient steps, where a C++ compiler is), on, off."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        check_positive(self, "clip_norm", "adam_eps")
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"hidden: expected layers of >= 1 unit, got {self.hidden}")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name, allowed in (("compile", ("auto", "on", "off")), ("time_limit", ("bootstrap", "terminal"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")


def check_positive(config: Any, *names: str) -> None:
    """``ValueError`` unless these settings are above 0 (counts, of type int, so at least 1) or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected {'>= 1' if type(value) is int else '> 0'}, got {value}")


def check_unused(config: Any, why: str, *names: str) -> None:
    """``ValueError`` where one of these settings, which would do nothing, is not at its default.

    :param why: what makes it useless, for the message.
    """
    for name in names:
        default, value = type(config).__dataclass_fields__[name].default, getattr(config, name)
        if value != default:
            raise ValueError(f"{name}: {why}; expected the default {default!r}, got {value!r}")


def check_eager(config: Any) -> None:
    """``ValueError`` for ``compile="on"`` where updates are explicit steps: only surrogates are compiled."""
    if config.compile == "on":
        raise ValueError("compile: this agent has no surrogate to compile; expected 'auto' or 'off', got 'on'")


class OnPolicyEstimator(Estimator):
    """What PPO, MDPO and BPO share: one rollout, reward scaling, values, GAE, a learning-rate schedule."""

    def __init__(self, config: Any, policy: MLPPolicy, updaters: dict[str, FlatUpdater]) -> None:
        super().__init__()
        self.config, self._updaters = config, updaters
        self._values = Values(policy.values)  # a bound method: holding the module itself would save it twice
        self.reward_norm = (
            RewardNorm(config.num_envs, config.gamma, config.clip_norm) if config.normalise_reward else None
        )
        self._gae = Gae(
            config.gamma, config.gae_lambda, config.time_limit,
            reward="shaped_reward" if config.normalise_reward else "reward",
        )  # fmt: skip

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(steps=self.config.n_steps)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        data = have["on"]
        if self.reward_norm is not None:
            data = self.reward_norm(data)
        return have | {"on": self.advantages(data)}

    @torch.no_grad()
    def advantages(self, data: Data) -> Data:
        """Values, GAE, returns."""
        return self._gae(self._values(data))

    def anneal(self, ctx: Context) -> None:
        """Linear learning-rate decay."""
        linear_decay(self._updaters.values(), self.config.learning_rate, ctx.progress)
