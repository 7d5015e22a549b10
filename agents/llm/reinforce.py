"""REINFORCE, RLOO and PPO for language models: KL to the reference in the reward, not in the loss.

    name       advantage                                ratio       loss          aggregate
    reinforce  R - mean over the batch                  -           -A log pi     sum over tokens, sequence mean
    rloo       R - mean of the other members            -           -A log pi     sum over tokens, sequence mean
    ppo_llm    reward to go - group's mean, whitened    token       clip          token mean

with ``R = reward - kl_coef * sum_t (log pi_old - log ref)`` (k1; per token in PPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from agents.llm.agent import LLMMethod
from ccrl.data import Data, masked
from ccrl.estimators import losses, ratios
from ccrl.estimators.base import Stage
from ccrl.estimators.outcomes import KLPenalty, SequenceAdvantage, SequenceWhiten, kl_tokens
from ccrl.estimators.recipe import Aggregation, MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline, Standardise
from ccrl.estimators.terms import Loss, Term
from ccrl.returns import discounted_sum
from ccrl.settings import Count, Range

__all__ = ["PPO", "REINFORCE", "RLOO", "RewardKLRecipe"]


class RewardKLRecipe(Recipe):
    """``kl_coef`` times k1 is subtracted from the reward; as a loss k1 would have no expected gradient."""

    @property
    def reward_column(self) -> str:
        """The column that advantages are made of."""
        return "shaped_episode_reward" if self.config.kl_coef else "episode_reward"

    def shaping(self) -> tuple[Stage, ...]:
        return (KLPenalty(self.config.kl_coef),) if self.config.kl_coef else ()

    def penalties(self) -> tuple[Term, ...]:
        return tuple(term for term in super().penalties() if term.name != "kl")


@dataclass(frozen=True)
class REINFORCEConfig(MethodConfig):
    """REINFORCE, with the mean of the batch as baseline."""

    baseline: Literal["batch", "none"] = "batch"
    """The mean reward of the rollout is subtracted, or nothing."""
    aggregate: Aggregation = "sequence_mean"


class REINFORCERecipe(RewardKLRecipe):
    """``-A log pi`` with the score of the live policy, also on a rollout's later minibatches."""

    ratio = staticmethod(ratios.plain)

    def stages(self) -> tuple[Stage, ...]:
        return (*self.shaping(), self.advantage)

    def advantage(self, data: Data) -> Data:
        """``advantage`` ``[T, N]``; equal rewards give 0 with the baseline, whatever the rounding of their mean."""
        advantage = data[self.reward_column]
        if self.config.baseline == "batch":
            differ = (advantage != advantage[0]).any()
            advantage = torch.where(differ, advantage - advantage.mean(), torch.zeros_like(advantage))
        return data.derive(advantage=advantage.expand(data.shape) * data["valid"])

    def loss(self) -> Loss:
        return losses.weighted_ratio


REINFORCE = LLMMethod(
    "reinforce",
    "Williams 1992, Machine Learning 8",
    REINFORCEConfig,
    REINFORCERecipe,
    {"advantage": "reward - batch mean", "ratio": "none", "loss": "-A log pi", "aggregate": "sequence sums"},
)
"""REINFORCE (Williams 1992)."""


@dataclass(frozen=True)
class RLOOConfig(MethodConfig):
    """RLOO as published; ``form`` and ``normalise`` are TRL's."""

    form: Literal["score", "sequence_clip"] = "score"
    """The loss is -A log pi (score), or PPO's clip of the whole sequence's ratio, not normalised by its length."""
    normalise: bool = False
    """Advantages are standardised over the rollout's sequences."""
    aggregate: Aggregation = "sequence_mean"


class RLOORecipe(RewardKLRecipe):
    """Leave-one-out baselines; every sequence is one action."""

    def stages(self) -> tuple[Stage, ...]:
        baseline = GroupBaseline(self.reward_column, "leave_one_out", single="zero")
        return (*self.shaping(), SequenceWhiten(baseline) if self.config.normalise else baseline, SequenceAdvantage())

    def terms(self) -> tuple[Term, ...]:
        if self.config.form == "score":
            term = self.policy_term(losses.weighted_ratio, ratios.plain)
        else:
            term = self.policy_term(self.loss(), ratios.sequence_product, advantage="sequence_advantage")
        return (term, *self.penalties())


RLOO = LLMMethod(
    "rloo",
    "Ahmadian et al. 2024, arXiv 2402.14740",
    RLOOConfig,
    RLOORecipe,
    {"reward": "k1", "advantage": "leave one out", "loss": "-A log pi", "aggregate": "sequence sums"},
)
"""REINFORCE Leave-One-Out (Ahmadian et al. 2024)."""


@dataclass(frozen=True)
class PPOConfig(MethodConfig):
    """PPO without a critic: the group's mean return is the baseline. One rollout is used several times."""

    baseline: Literal["group", "none"] = "group"
    """The group's mean return is subtracted, or nothing."""
    whiten: bool = True
    """Advantages are standardised over the rollout's tokens."""
    dual_clip: Annotated[float, Range(1.0, above=True, also=(0.0,))] = 0.0
    """Where A < 0 the loss is at most this times -A; 0 leaves it unbounded."""
    n_epochs: Count = 2


class PPORecipe(RewardKLRecipe):
    """Token rewards (k1 at every token, the reward at the last), summed to the end of the sequence."""

    def stages(self) -> tuple[Stage, ...]:
        return (self.advantage, *((Standardise(),) if self.config.whiten else ()))

    def advantage(self, data: Data) -> Data:
        """``advantage`` ``[T, N]``: reward to go minus the group's mean return."""
        c, valid = self.config, data["valid"]
        reward = data["reward"] - c.kl_coef * kl_tokens(data) if c.kl_coef else data["reward"]
        to_go = discounted_sum(reward, 1.0, data["carry"])
        if c.baseline == "group":
            total = to_go[0]
            centred = GroupBaseline(single="zero").advantages(total, data["group"])
            to_go = (to_go - total) + centred
        return data.derive(advantage=masked(to_go, valid))

    def loss(self) -> Loss:
        c = self.config
        return losses.clip(c.clip_low, c.clip_high, c.dual_clip or None)


PPO = LLMMethod(
    "ppo_llm",
    "Schulman et al. 2017, arXiv 1707.06347",
    PPOConfig,
    PPORecipe,
    {
        "reward": "k1 per token",
        "advantage": "reward to go - group mean, whitened",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "token mean",
    },
)
"""Proximal Policy Optimization (Schulman et al. 2017) without a critic."""
