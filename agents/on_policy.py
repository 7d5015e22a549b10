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
from ccrl.settings import Activation, Compile, Count, Finite, Natural, Positive, Settings, TimeLimit, Unit
from ccrl.updaters import Updater

__all__ = [
    "VALUE", "ActorCriticConfig", "OnPolicyConfig", "OnPolicyEstimator", "Updaters", "check_eager", "check_features",
    "check_standardised", "check_unused", "cut",
]  # fmt: skip

Updaters = dict[str, Updater]
"""By name; the first one's step size is the agent's."""

VALUE = frozenset({"value"})
"""What a value loss wants of the policy."""


@dataclass(frozen=True)
class OnPolicyConfig(Settings):
    """What every on-policy agent has."""

    num_envs: Count = 16
    """The number of parallel environments."""
    n_steps: Count = 128
    """Every iteration takes this many steps in each environment; the rollout holds num_envs * n_steps."""
    gamma: Unit = 0.99
    """Rewards are discounted by this factor per step."""
    gae_lambda: Unit = 0.95
    """Lambda of generalised advantage estimation: 0 trusts the critic, 1 the returns."""
    time_limit: TimeLimit = "bootstrap"
    """At a time limit the critic's value goes on (bootstrap), or the task ends (terminal: older code, biased)."""
    hidden: tuple[Count, ...] = (64, 64)
    """These are the widths of the hidden layers of the actor, and of the critic unless it has its own; they share
    nothing."""
    activation: Activation = "tanh"
    """This function follows every hidden layer."""
    log_std_init: Finite = 0.0
    """Gaussian policies start with this log standard deviation."""
    orthogonal: bool = True
    """Weights start orthogonal, with gain sqrt 2 in hidden layers, 0.01 at the policy's output and 1 at the
    value's."""
    squash: bool = False
    """Gaussian actions go through tanh onto the bounds; otherwise they are clipped, for the environment only."""
    state_dependent_std: bool = False
    """Gaussian policies compute their deviations from the observation; otherwise they are parameters of their own."""
    actor_obs: tuple[str, ...] | None = None
    """The actor sees these keys of a Dict observation; unset, it sees all but a privileged group called critic."""
    normalise_obs: bool = False
    """Observations are normalised by running statistics, which belong to the policy and move once per iteration."""
    normalise_reward: bool = False
    """Rewards are divided by the running deviation of the discounted return, in training only: logs stay raw."""
    clip_norm: Positive = 10.0
    """Normalised observations and rewards are clipped to plus or minus this number."""
    adam_eps: Positive = 1e-5
    """Adam adds this epsilon to the root of its second moment."""
    collection_lag: Natural = 0
    """Rollouts are of the policy of this many iterations ago, for studies of staleness."""
    compile: Compile = "auto"
    """Updates are fused into compiled graphs: always (on), never (off), or from 1,000 gradient steps on where there
    is a C++ compiler (auto)."""


@dataclass(frozen=True)
class ActorCriticConfig(OnPolicyConfig):
    """What agents with a critic have (PPO, MDPO, BPO)."""

    std_parameter: Literal["log", "raw"] = "log"
    """Gaussian policies learn the logarithm of their deviations, or the deviations as they are (raw, rsl_rl)."""
    critic_hidden: tuple[Count, ...] | None = None
    """These are the widths of the critic's hidden layers; unset, they are the actor's."""
    critic_obs: tuple[str, ...] | None = None
    """The critic sees these keys of a Dict observation; unset, it sees all, but critic in place of a group called
    policy."""
    recurrent: Literal["none", "gru", "lstm"] = "none"
    """A recurrent layer (gru, lstm) stands in front of the actor's and of the critic's hidden layers, or none.
    Minibatches are then whole columns of n_steps, as many as batch_size steps need, and updates run uncompiled."""
    recurrent_size: Count = 64
    """The recurrent layer has this many units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.normalise_obs or self.normalise_reward):
            check_unused(self, "it clips what is normalised, and nothing is", "clip_norm")
        if self.recurrent == "none":
            check_unused(self, "there is no recurrent layer", "recurrent_size")
        elif self.compile == "on":
            raise ValueError(
                "compile='on': recurrent policies are updated uncompiled; expected compile='auto' or 'off'"
            )


def cut(policy: Any, n_steps: int, size: int | Literal["full"], epochs: int) -> Batching:
    """Minibatches of ``size`` steps; of a policy with a memory whole columns, as many as ``size`` steps need."""
    if policy.unit != "sequence":
        return Batching(size=size, epochs=epochs)
    return Batching("sequence", size if size == "full" else -(-size // n_steps), epochs)


def check_standardised(config: Any, why: str, size: int | None = None) -> None:
    """``ValueError`` if advantages are standardised over one row: it becomes 0 and the actor learns nothing of it.

    :param why: the setting that standardises, for the message.
    :param size: of minibatches that are standardised one by one, in steps; None: the whole rollout is.
    """
    total = config.num_envs * config.n_steps
    size = total if size is None else size
    if getattr(config, "recurrent", "none") != "none":  # whole columns
        size = -(-size // config.n_steps) * config.n_steps
    last = total % size or min(size, total)
    if last > 1:
        return
    if size == 1 or total == 1:
        got = f"minibatches of {size}" if total > 1 else "a rollout of 1"
    else:
        got = f"a last minibatch of 1 ({config.num_envs} * {config.n_steps} = {total} steps in minibatches of {size})"
    raise ValueError(
        f"{why}: expected at least 2 steps to standardise advantages over (one becomes 0 and moves no actor), got "
        f"{got}; change num_envs, n_steps or batch_size"
    )


def check_unused(config: Any, why: str, *names: str) -> None:
    """``ValueError`` where one of these settings, which would do nothing, is not at its default.

    :param why: what makes it useless, for the message.
    """
    for name in names:
        default, value = type(config).__dataclass_fields__[name].default, getattr(config, name)
        if value != default:
            raise ValueError(f"{name}: {why}; expected the default {default!r}, got {value!r}")


def check_features(policy: Any, why: str) -> None:
    """``ValueError`` for a policy of the caller's that does not say, as ``MLPPolicy.features`` does, what its actor
    sees."""
    if not isinstance(policy, MLPPolicy):
        raise ValueError(
            f"policy: {why}; expected an MLPPolicy or a class derived from it, got {type(policy).__name__}"
        )


def check_eager(config: Any) -> None:
    """``ValueError`` for ``compile="on"`` and a lag where updates are explicit steps: only surrogates are compiled, and
    an update rule says itself who acts."""
    check_unused(config, "this agent's update rule says who acts", "collection_lag")
    if config.compile == "on":
        raise ValueError("compile: this agent has no surrogate to compile; expected 'auto' or 'off', got 'on'")


class OnPolicyEstimator(Estimator):
    """What PPO, MDPO and BPO share: one rollout, reward scaling, values, GAE, a learning-rate schedule."""

    def __init__(self, config: Any, policy: MLPPolicy, critic: bool = True) -> None:
        super().__init__()
        self.config = config
        if critic:  # bound methods: holding the module itself would save it twice
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


def _sequence_values(state_values: Callable[[Data], tuple[Tensor, Tensor]], data: Data) -> Data:
    """``value`` and ``next_value`` of a critic with a memory."""
    value, next_value = state_values(data)
    return data.derive(value=value, next_value=next_value)
