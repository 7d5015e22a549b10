"""REINFORCE, RLOO and PPO for language models: KL to the reference in the reward, not in the loss.

    name       advantage                                ratio       loss          aggregate
    reinforce  R - mean over the batch                  -           -A log pi     sum over tokens, sequence mean
    rloo       R - mean of the other members            -           -A log pi     sum over tokens, sequence mean
    ppo_llm    reward to go - group's mean, whitened    token       clip          token mean

with ``R = score - kl_coef * sum_t (log pi_old - log ref)`` (k1; per token in PPO).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agents.llm.base import LLM, LLMConfig
from ccrl.data import Data, masked
from ccrl.estimators import losses, ratios
from ccrl.estimators.base import Stage
from ccrl.estimators.outcomes import KLPenalty, SequenceAdvantage, SequenceWhiten, kl_tokens
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.stages import GroupBaseline, Standardise
from ccrl.estimators.terms import Loss, Term
from ccrl.returns import discounted_sum

__all__ = ["PPO", "REINFORCE", "RLOO", "RewardKLRecipe", "one_of"]


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """:raises ValueError: unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")


class RewardKLRecipe(Recipe):
    """``kl_coef`` times k1 is subtracted from the score; as a loss k1 would have no expected gradient."""

    @property
    def reward_column(self) -> str:
        """The column that advantages are made of."""
        return "shaped_episode_reward" if self.config.kl_coef else "episode_reward"

    def shaping(self) -> tuple[Stage, ...]:
        return (KLPenalty(self.config.kl_coef),) if self.config.kl_coef else ()

    def penalties(self) -> tuple[Term, ...]:
        return tuple(term for term in super().penalties() if term.name != "kl")


@dataclass(frozen=True)
class REINFORCEConfig(LLMConfig):
    """REINFORCE, with the mean of the batch as baseline."""

    baseline: str = "batch"
    """batch (subtract the mean score of the rollout) or none."""
    aggregate: str = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("baseline", self.baseline, ("batch", "none"))


class REINFORCERecipe(RewardKLRecipe):
    """``-A log pi`` with the score of the live policy, also on a rollout's later minibatches."""

    ratio = staticmethod(ratios.plain)

    def stages(self) -> tuple[Stage, ...]:
        return (*self.shaping(), self.advantage)

    def advantage(self, data: Data) -> Data:
        """``advantage`` ``[T, N]``; equal scores give 0 with the baseline, whatever the rounding of their mean."""
        advantage = data[self.reward_column]
        if self.config.baseline == "batch":
            differ = (advantage != advantage[0]).any()
            advantage = torch.where(differ, advantage - advantage.mean(), torch.zeros_like(advantage))
        return data.derive(advantage=advantage.expand(data.shape) * data["valid"])

    def loss(self) -> Loss:
        return losses.weighted_ratio


class REINFORCE(LLM):
    """REINFORCE (Williams 1992)."""

    name = "reinforce"
    paper = "Williams 1992, Machine Learning 8"
    Config = REINFORCEConfig
    Recipe = REINFORCERecipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"advantage": "score - batch mean", "ratio": "none", "loss": "-A log pi", "aggregate": "sequence sums"}


@dataclass(frozen=True)
class RLOOConfig(LLMConfig):
    """RLOO as published; ``form`` and ``normalise`` are TRL's."""

    form: str = "score"
    """score (-A log pi) or sequence_clip (PPO's clip of the whole sequence's ratio, not normalised by its length)."""
    normalise: bool = False
    """Standardise the advantages over the rollout's sequences."""
    aggregate: str = "sequence_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("form", self.form, ("score", "sequence_clip"))


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


class RLOO(LLM):
    """REINFORCE Leave-One-Out (Ahmadian et al. 2024)."""

    name = "rloo"
    paper = "Ahmadian et al. 2024, arXiv 2402.14740"
    Config = RLOOConfig
    Recipe = RLOORecipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"reward": "k1", "advantage": "leave one out", "loss": "-A log pi", "aggregate": "sequence sums"}


@dataclass(frozen=True)
class PPOConfig(LLMConfig):
    """PPO without a critic: the group's mean return is the baseline. One rollout is used several times."""

    baseline: str = "group"
    """group (subtract the group's mean return) or none."""
    whiten: bool = True
    """Standardise the advantages over the rollout's tokens."""
    dual_clip: float = 0.0
    """Where A < 0 the loss is at most this times -A; 0: unbounded."""
    n_epochs: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("baseline", self.baseline, ("group", "none"))
        if self.dual_clip and self.dual_clip <= 1.0:
            raise ValueError(f"dual_clip: expected 0 (none) or > 1, got {self.dual_clip}")


class PPORecipe(RewardKLRecipe):
    """Token rewards (k1 at every token, the score at the last), summed to the end of the sequence."""

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


class PPO(LLM):
    """Proximal Policy Optimization (Schulman et al. 2017) without a critic."""

    name = "ppo_llm"
    paper = "Schulman et al. 2017, arXiv 1707.06347"
    Config = PPOConfig
    Recipe = PPORecipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"reward": "k1 per token", "advantage": "reward to go - group mean, whitened", "ratio": "token",
                "loss": "clip", "aggregate": "token mean"}  # fmt: skip
