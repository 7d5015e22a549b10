"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv 1707.06347), implementation details as switches.

Loss over shuffled minibatches, ``n_epochs`` passes over each rollout:

    L = -mean min(rho A, clamp(rho, 1 - eps, 1 + eps) A)  +  vf_coef * mean (V - R)^2  -  ent_coef * mean H
    rho = pi_theta(a|s) / pi_old(a|s),   A = GAE(gamma, lambda),   R = A + V_old

Slots: prepare = values, GAE; ratio = token; loss = clip, value, entropy; aggregate = mean over the minibatch.
Defaults are SB3's; ``docs/ppo.md`` lists each detail and who does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from agents.base import Agent
from agents.on_policy import (
    VALUE,
    ActorCriticConfig,
    OnPolicyEstimator,
    Updaters,
    check_standardised,
    check_unused,
    cut,
)
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Phase
from ccrl.estimators.stages import Standardise, standardise
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.learn import Learner
from ccrl.policies import MLPPolicy
from ccrl.policies.distributions import Distribution
from ccrl.settings import Count, Finite, Nonnegative, Positive
from ccrl.updaters import AdaptiveRate, FlatUpdater, Updater

__all__ = ["PPO", "PPOConfig"]

Statistics = Callable[[LogRatio, Tensor, Outputs, Data], dict[str, Tensor]]


@dataclass(frozen=True)
class PPOConfig(ActorCriticConfig):
    """SB3's defaults at 16 x 128 steps."""

    learning_rate: Positive = 3e-4
    """This is Adam's step size."""
    anneal_lr: bool = False
    """The learning rate falls linearly to 0 over training."""
    desired_kl: Positive | None = None
    """The learning rate moves before every step: by a factor of 1.5 down where the KL from the acting policy is above
    twice this number, up where it is below half of it, between 1e-5 and 1e-2 (rsl_rl); updates run uncompiled. None
    keeps it."""
    batch_size: Count = 64
    """A minibatch has this many environment steps."""
    n_minibatches: Count | None = None
    """An epoch has this many minibatches of equal size, in place of batch_size."""
    n_epochs: Count = 10
    """The update passes this many times over each rollout."""
    clip_range: Positive = 0.2
    """The probability ratio is clipped to 1 plus or minus this number."""
    clip_range_vf: Positive | None = None
    """New values are clipped to the old ones plus or minus this number; None does not clip them."""
    normalise_advantage: Literal["minibatch", "batch", "none"] = "minibatch"
    """Advantages are standardised within each minibatch (SB3, CleanRL), once over the batch (rsl_rl), or not at
    all."""
    ent_coef: Finite = 0.0
    """The entropy of the policy is added to the objective with this weight."""
    vf_coef: Nonnegative = 0.5
    """The value loss is added with this weight."""
    max_grad_norm: Positive = 0.5
    """Gradients are scaled down to this global norm."""
    target_kl: Positive | None = None
    """The update ends once approx_kl exceeds 1.5 times this number (one host sync per minibatch); None never ends
    it."""
    recompute_advantages: bool = False
    """Values and advantages are computed anew before every epoch but the first (Andrychowicz et al. 2021)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_minibatches is not None:
            check_unused(self, "n_minibatches says how many minibatches there are", "batch_size")
            rows, what = self.num_envs * self.n_steps, "num_envs * n_steps"
            if self.recurrent != "none":
                rows, what = self.num_envs, "num_envs (minibatches of recurrent policies are whole columns)"
            if rows % self.n_minibatches:
                raise ValueError(f"n_minibatches: expected a divisor of {what} = {rows}, got {self.n_minibatches}")
        if self.desired_kl is not None:
            if self.anneal_lr:
                raise ValueError("desired_kl: the learning rate follows the KL, got anneal_lr=True too; drop one")
            if not 1e-5 <= self.learning_rate <= 1e-2:  # the first large KL would raise a smaller one
                raise ValueError(f"learning_rate: desired_kl moves it between 1e-5 and 1e-2, got {self.learning_rate}")
            if self.compile == "on":
                raise ValueError("compile='on': adaptive steps are uncompiled; expected compile='auto' or 'off'")
        if self.normalise_advantage != "none":
            size = self.minibatch if self.normalise_advantage == "minibatch" else None
            check_standardised(self, f"normalise_advantage={self.normalise_advantage!r}", size)

    @property
    def minibatch(self) -> int:
        """Environment steps per minibatch."""
        if self.n_minibatches is None:
            return self.batch_size
        return self.num_envs * self.n_steps // self.n_minibatches


class PPOEstimator(OnPolicyEstimator):
    """Clipped surrogate, value and entropy terms in one phase."""

    def __init__(self, config: PPOConfig, policy: MLPPolicy, updaters: Updaters) -> None:
        super().__init__(config, policy)
        c = config
        loss = losses.clip(c.clip_range, c.clip_range)
        if c.normalise_advantage == "minibatch":
            loss = _standardised(loss)
        stats, want = losses.ratio_stats(c.clip_range, c.clip_range), frozenset({"log_prob"})
        if c.desired_kl is not None:
            stats, want = _with_kl(stats, policy.distribution), want | {"dist"}
        value = losses.value_loss(clip_range=c.clip_range_vf)
        terms = (
            Term("policy_gradient_loss", loss, aggregates.mean, ratios.token, want, stats=stats),
            Term("value_loss", value, aggregates.mean, want=VALUE, advantage=None, coef=c.vf_coef),
            Term(
                "entropy_loss", losses.neg_entropy, aggregates.mean, want=frozenset({"entropy"}),
                advantage=None, coef=c.ent_coef,
            ),
        )  # fmt: skip
        batching = cut(policy, c.n_steps, c.minibatch, c.n_epochs)
        self._phases = (_phase(c, batching, terms, updaters["policy"], self.advantages),)

    def advantages(self, data: Data) -> Data:
        data = super().advantages(data)
        return Standardise()(data) if self.config.normalise_advantage == "batch" else data

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def _phase(c: PPOConfig, batching: Batching, terms: tuple[Term, ...], updater: Updater, recompute: Any) -> Phase:
    limit = None if c.target_kl is None else 1.5 * c.target_kl
    stop = None if limit is None else (lambda stats, ctx: bool(stats["approx_kl"] > limit))
    before = (lambda data, ctx: recompute(data)) if c.recompute_advantages else None
    return Phase("policy", terms, batching, updater, before, stop)


def _standardised(loss: Loss) -> Loss:
    """The loss on advantages standardised inside the minibatch."""

    def wrapped(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return loss(ratio, standardise(advantage, batch["valid"]), outputs, batch)

    return wrapped


def _with_kl(stats: Statistics, distribution: Distribution) -> Statistics:
    """The statistics, and ``kl``: ``KL(pi_old || pi_theta)`` in closed form."""

    def more(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        old = {name: batch[f"old_{name}"] for name in distribution.names}
        return stats(ratio, advantage, outputs, batch) | {"kl": distribution.kl(old, outputs)}

    return more


class PPO(Agent):
    """Proximal Policy Optimization."""

    name = "ppo"
    paper = "Schulman et al. 2017, arXiv 1707.06347"
    Config = PPOConfig

    def build(self) -> Learner:
        c: PPOConfig = self.config
        policy = self.make_policy({"value": ()})
        updater = FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        if c.desired_kl is not None:
            updater.hooks.append(AdaptiveRate(updater.lr, c.desired_kl))
        updaters: Updaters = {"policy": updater}
        return self.rollouts(policy, PPOEstimator(c, policy, updaters), updaters)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "prepare": "values, GAE",
            "ratio": "token",
            "loss": "clip + value + entropy",
            "aggregate": "minibatch mean",
        }
