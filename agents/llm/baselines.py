"""GRPO and what followed it, the baselines for language models: each fills one or two slots of the recipe.

    name       advantage                         ratio       loss                       aggregate
    grpo       group z-score                     token       clip, k3 in the loss       mean of sequence means
    dr_grpo    R - group mean                    token       clip                       sums / longest length
    dapo       group z-score, groups redrawn     token       clip, higher above         token mean
    gspo       group z-score                     sequence    clip                       sequence mean
    cispo      group z-score                     token       -sg(clip(rho)) A log pi    token mean
    sapo       group z-score                     token       -gate(rho) A               mean of sequence means

A group of one has advantage 0: it is compared with nothing. The reference's KL (k3) is in the loss, and off unless
``kl_coef`` says otherwise. REINFORCE, RLOO and PPO are in ``agents.llm.reinforce``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.outcomes import OverlongPenalty, SequenceAdvantage, informative
from ccrl.estimators.recipe import Aggregation, ClipHigh, ClipLow, MethodConfig, Recipe
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.stages import GroupBaseline, with_episode_reward
from ccrl.estimators.terms import Loss, Term
from ccrl.settings import Count, Positive, Unit

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "SAPO", "DrGRPO"]


# -- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GRPOConfig(MethodConfig):
    """GRPO as published, but for the KL (0.04 there, 0 or 0.001 in later work)."""

    aggregate: Aggregation = "sequence_mean_token_mean"


GRPO = LLMMethod(
    "grpo",
    "Shao et al. 2024, arXiv 2402.03300",
    GRPOConfig,
    Recipe,
    {"advantage": "group z-score", "ratio": "token", "loss": "clip (+ k3)", "aggregate": "sequence means"},
)
"""Group Relative Policy Optimization (Shao et al. 2024): group z-score, clipped token ratio."""


@dataclass(frozen=True)
class DrGRPOConfig(MethodConfig):
    """Dr. GRPO: neither the deviation of a group nor the length of a completion weighs it."""

    aggregate: Aggregation = "fixed"


class DrGRPORecipe(Recipe):
    """Centred rewards."""

    def stages(self) -> tuple[Stage, ...]:
        return (GroupBaseline(single="zero"),)


DrGRPO = LLMMethod(
    "dr_grpo",
    "Liu et al. 2025, arXiv 2503.20783",
    DrGRPOConfig,
    DrGRPORecipe,
    {"advantage": "score - group mean", "ratio": "token", "loss": "clip", "aggregate": "length constant"},
)
"""GRPO Done Right (Liu et al. 2025)."""


@dataclass(frozen=True)
class DAPOConfig(MethodConfig):
    """DAPO as published: its buffer is a fifth of the longest completion."""

    clip_high: ClipHigh = 0.28
    max_tries: Count = 4
    """An iteration takes at most this many rollouts, until there are enough groups whose outcomes differ; 1 samples
    once."""
    overlong_share: Unit = 0.2
    """The length penalty grows to 1 over this share of the longest completion; 0 penalises none."""
    overlong_floor: bool = True
    """The penalty of a completion beyond the limit stays 1 (the paper); if false it goes on growing (verl)."""


class DAPORecipe(Recipe):
    """Dynamic sampling and the length penalty before GRPO's advantages."""

    _warned = False

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """Rollouts of the usual size, until the groups whose outcomes differ fill one of them."""
        if not have:
            return [self.parts.request]
        if len(have) >= self.config.max_tries:
            return []
        found = sum(_count(data["group"][informative(data)]) for data in map(with_episode_reward, have.values()))
        if found >= _count(have["on"]["group"]):
            return []
        return [replace(self.parts.request, tag=f"on{len(have)}")]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """Of all rollouts as many informative groups as the first one has groups; without any, no update."""
        joined = with_episode_reward(concatenate(list(have.values())) if len(have) > 1 else have["on"])
        if self.config.max_tries > 1:
            kept = informative(joined)
            wanted = torch.unique(joined["group"][kept])[: _count(have["on"]["group"])]
            columns = torch.isin(joined["group"], wanted).nonzero().squeeze(-1)
            if columns.numel():
                joined = joined.take(columns)
        return super().prepare({"sampled": have["on"], "on": joined}, ctx)

    def idle(self, data: Data, ctx: Context) -> bool:
        # without an informative group the length penalty would be all there is to learn from
        learns = (informative(data) if self.config.max_tries > 1 else data["advantage"]).any()
        if self._warned or "shaped_episode_reward" not in data:
            return not bool(learns)
        any_learns, share = torch.stack([learns.double(), _penalised(data)]).tolist()  # one wait for the device
        self._warn_of_right_answers(share)
        return not any_learns

    def _warn_of_right_answers(self, share: float) -> None:
        """Once. Where an answer needs most of ``max_new_tokens`` the penalty teaches to leave it out."""
        if share > 0.5:
            self._warned = True
            warnings.warn(
                f"DAPO: the length penalty falls on {share:.0%} of the best completions: expected answers shorter than "
                f"{1.0 - self.config.overlong_share:.0%} of the {self.parts.max_length} tokens that a completion may "
                "have; give the task a larger max_new_tokens, or set overlong_share to 0",
                stacklevel=2,
            )

    def stages(self) -> tuple[Stage, ...]:
        c, limit = self.config, self.parts.max_length
        if not c.overlong_share or self.parts.request.counts is None:
            return super().stages()  # a control episode may be long for a good reason
        penalty = OverlongPenalty(limit, max(1, round(c.overlong_share * limit)), c.overlong_floor)
        return penalty, GroupBaseline("shaped_episode_reward", scale="std", single="zero")


def _count(group: Tensor) -> int:
    return int(torch.unique(group).numel())


def _penalised(data: Data) -> Tensor:
    """The share of the best completions that the length penalty falls on, float64; 0 where outcomes or lengths are all
    equal, which have no advantage."""
    score = data["episode_reward"]
    penalty = data["shaped_episode_reward"] - score
    best, differ = score == score.max(), (score.min() < score.max()) & (penalty.min() < penalty.max())
    return ((penalty < 0) & best).sum().double() / best.sum() * differ


DAPO = LLMMethod(
    "dapo",
    "Yu et al. 2025, arXiv 2503.14476",
    DAPOConfig,
    DAPORecipe,
    {
        "data": "groups whose outcomes differ",
        "reward": "length penalty",
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "clip, higher above",
        "aggregate": "token mean",
    },
)
"""Decoupled Clip and Dynamic Sampling Policy Optimization (Yu et al. 2025).

The clock counts every completion, those of dropped groups too: an iteration takes up to ``max_tries`` rollouts.
"""


# -- other ratios and bounds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GSPOConfig(MethodConfig):
    """GSPO's bounds are those of a ratio that is averaged over the sequence."""

    search: ClassVar[dict[str, Any]] = {"clip_high": {"around": 4}}  # of averaged ratios
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4
    level: Literal["sequence", "token"] = "sequence"
    """The ratio is one of the whole sequence, or (token, GSPO-token) the sequence's on every token, which is the same
    gradient unless advantages differ inside a sequence."""


class GSPORecipe(Recipe):
    """The aggregates belong to the level: sequence mean, or mean of sequence means; ``aggregate`` is the penalties'."""

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), SequenceAdvantage())

    def terms(self) -> tuple[Term, ...]:
        if self.config.level == "token":
            term = self.policy_term(self.loss(), ratios.sequence_token, aggregates.sequence_mean_token_mean)
        else:
            term = self.policy_term(
                self.loss(), ratios.sequence, aggregates.sequence_mean, advantage="sequence_advantage"
            )
        return (term, *self.penalties())


GSPO = LLMMethod(
    "gspo",
    "Zheng et al. 2025, arXiv 2507.18071",
    GSPOConfig,
    GSPORecipe,
    {"advantage": "group z-score", "ratio": "sequence mean", "loss": "clip", "aggregate": "sequence mean"},
)
"""Group Sequence Policy Optimization (Zheng et al. 2025)."""


@dataclass(frozen=True)
class CISPOConfig(MethodConfig):
    """CISPO: weights are clipped, gradients never vanish. Two readings of the bound."""

    clip_high: ClipHigh = 0.28
    bound: Literal["band", "cap"] = "band"
    """Weights stay within 1 - clip_low and 1 + clip_high (band, verl), or are at most cap (cap, TRL)."""
    cap: Positive = 5.0
    """With bound = cap, a weight is at most this."""


class CISPORecipe(Recipe):
    """A clipped weight on the score."""

    def loss(self) -> Loss:
        c = self.config
        return losses.capped_weight(c.cap) if c.bound == "cap" else losses.cispo(c.clip_low, c.clip_high)


CISPO = LLMMethod(
    "cispo",
    "MiniMax 2025, arXiv 2506.13585",
    CISPOConfig,
    CISPORecipe,
    {
        "advantage": "group z-score",
        "ratio": "token, clipped, detached",
        "loss": "-w A log pi",
        "aggregate": "token mean",
    },
)
"""Clipped Importance Sampling Policy Optimization (MiniMax 2025)."""


@dataclass(frozen=True)
class SAPOConfig(MethodConfig):
    """SAPO's temperatures: bad tokens fade sooner. ``clip_low`` and ``clip_high`` only serve the statistics."""

    tau_positive: Positive = 1.0
    """The gate has this temperature where the advantage is positive."""
    tau_negative: Positive = 1.05
    """The gate has this temperature elsewhere."""
    aggregate: Aggregation = "sequence_mean_token_mean"


class SAPORecipe(Recipe):
    """A sigmoid gate in the place of the clip."""

    def loss(self) -> Loss:
        return losses.sigmoid_gate(self.config.tau_positive, self.config.tau_negative)


SAPO = LLMMethod(
    "sapo",
    "Gao et al. 2025, arXiv 2511.20347",
    SAPOConfig,
    SAPORecipe,
    {"advantage": "group z-score", "ratio": "token", "loss": "sigmoid gate", "aggregate": "sequence means"},
)
"""Soft Adaptive Policy Optimization (Gao et al. 2025)."""
