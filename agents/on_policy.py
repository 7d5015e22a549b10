"""What on-policy agents share: the settings of rollout and networks, and the stages from rewards to advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.stages import Gae, RewardNorm, Values
from ccrl.policies import MLPPolicy
from ccrl.updaters import FlatUpdater, linear_decay

__all__ = [
    "VALUE", "ActorCriticConfig", "OnPolicyConfig", "OnPolicyEstimator", "check_eager", "check_layers",
    "check_positive", "check_unused", "cut",
]  # fmt: skip

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
    state_dependent_std: bool = False
    """Gaussian policies compute their deviations from the observation; else deviations are parameters of their own."""
    actor_obs: tuple[str, ...] | None = None
    """Keys of a Dict observation that the actor sees (unset: all, but not a privileged group called critic)."""
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
        check_layers(self, "hidden")
        for name in ("gamma", "gae_lambda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        for name, allowed in (("compile", ("auto", "on", "off")), ("time_limit", ("bootstrap", "terminal"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class ActorCriticConfig(OnPolicyConfig):
    """What agents with a critic have (PPO, MDPO, BPO)."""

    critic_hidden: tuple[int, ...] | None = None
    """Hidden layers of the critic (unset: those of the actor)."""
    critic_obs: tuple[str, ...] | None = None
    """Keys of a Dict observation that the critic sees (unset: all, but critic in place of a group called policy)."""
    recurrent: Literal["none", "gru", "lstm"] = "none"
    """A recurrent layer in front of the actor's and of the critic's hidden layers: none, gru or lstm. Minibatches are
    then whole columns of n_steps, as many as batch_size steps need, and updates run uncompiled."""
    recurrent_size: int = 64
    """Units of the recurrent layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "critic_hidden")
        check_positive(self, "recurrent_size")
        if self.recurrent not in ("none", "gru", "lstm"):
            raise ValueError(f"recurrent: expected none, gru or lstm, got {self.recurrent!r}")
        if self.recurrent == "none":
            check_unused(self, "there is no recurrent layer", "recurrent_size")
        elif self.compile == "on":
            raise ValueError(
                "compile='on': recurrent policies are updated uncompiled; expected compile='auto' or 'off'"
            )


def check_layers(config: Any, *names: str) -> None:
    """``ValueError`` unless these settings are hidden layers of at least one unit, or None."""
    for name in names:
        if any(size < 1 for size in getattr(config, name) or ()):
            raise ValueError(f"{name}: expected layers of >= 1 unit, got {getattr(config, name)}")


def cut(policy: Any, n_steps: int, size: int | Literal["full"], epochs: int) -> Batching:
    """Minibatches of ``size`` steps; of a policy with a memory whole columns, as many as ``size`` steps need."""
    if policy.unit != "sequence":
        return Batching(size=size, epochs=epochs)
    return Batching("sequence", size if size == "full" else -(-size // n_steps), epochs)


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
        # bound methods: holding the module itself would save it twice
        self._values: Callable[[Data], Data] = Values(policy.values)
        if policy.unit == "sequence":
            self._values = partial(_sequence_values, policy.state_values)
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


def _sequence_values(state_values: Callable[[Data], tuple[Tensor, Tensor]], data: Data) -> Data:
    """``value`` and ``next_value`` of a critic with a memory."""
    value, next_value = state_values(data)
    return data.derive(value=value, next_value=next_value)
