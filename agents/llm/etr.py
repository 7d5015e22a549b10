"""ETR: outcome-guided Elastic Trust Regions for policy optimization (Zhang et al. 2026, arXiv 2601.03723). A
RECONSTRUCTION: the paper's formulas were not available, its words are that the clip range follows the size of the
advantage (micro) and the variance of the group's success rate (macro). docs/llm/etr.md says what is read into them.

    factor_i = (1 + l_mic tanh|A_i|) + l_mac v                        additive, v = min(1, 4 Var(R)) = 4 p (1 - p)
             | (1 + l_mic tanh|A_i|) (1 + l_mac (v - v0))             multiplicative
             | 1 + l_mic tanh|A_i|                                    implicit_abs
             | 1 + l_mic 4 (R_i - p)^2                                implicit_sq: on average over the group 1 + l_mic v
    eps_i    = clamp(eps factor_i, range_min, range_max)              for the lower and the upper eps
    loss     = -min(r A_i, clip(r, 1 - eps_low_i, 1 + eps_high_i) A_i)

Slots: stage = clip ranges per completion, from the group's statistics over the whole rollout; loss = a clip that reads
them. Another ETR (entropy trend reward) is a reward, not a clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import losses
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Aggregation, MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Above, ConfigError, Finite, Nonnegative, Range, Unit
from ccrl.updaters import Stats

__all__ = ["ETR", "ETRConfig", "ETRRecipe", "ElasticRange", "RangeFactor", "elastic_clip", "make_factor", "spread"]

RangeFactor = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From advantage, centred reward (scaled to [0, 1]), mean and variance of the group's rewards to the factor of the clip
range; tensors of one shape."""


@dataclass(frozen=True)
class ETRConfig(MethodConfig):
    """The reconstruction's settings, as the paper's are not known. What is scaled is clip_low and clip_high."""

    form: Literal["additive", "multiplicative", "implicit_abs", "implicit_sq"] = "additive"
    """The range grows with advantage and variance added up (additive) or multiplied (multiplicative), with the
    advantage alone (implicit_abs), or with the squared distance of a reward from its group's mean (implicit_sq)."""
    micro: Nonnegative = 0.5
    """The range grows by up to this share with the size of the advantage."""
    macro: Nonnegative = 0.5
    """The range grows by up to this share with the variance of the group's rewards."""
    neutral: Unit = 0.0
    """With form multiplicative, groups of this variance (1 is the largest) keep their range; those below get a smaller
    one."""
    range_min: Annotated[float, Above(0.0)] = 0.05
    """No range is smaller."""
    range_max: Annotated[float, Range(0.0, above=True, also=(math.inf,))] = 0.5
    """No range is larger."""
    reward_min: Finite = 0.0
    """Rewards are scaled from reward_min and reward_max to 0 and 1 before their variance is taken."""
    reward_max: Finite = 1.0
    """This reward becomes 1, and reward_min 0."""
    aggregate: Aggregation = "sequence_mean_token_mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range_min > self.range_max:
            raise ConfigError(f"expected range_min <= range_max, got {self.range_min}, {self.range_max}")
        if not self.reward_min < self.reward_max:
            raise ConfigError(f"expected reward_min < reward_max, got {self.reward_min}, {self.reward_max}")
        if self.form.startswith("implicit") and self.macro != 0.5:
            raise ConfigError(f"macro: expected 0.5 with form={self.form!r}, which does not read it, got {self.macro}")
        if self.form != "multiplicative" and self.neutral:
            raise ConfigError(
                f"neutral: expected 0 with form={self.form!r}, which does not read it, got {self.neutral}"
            )
        if self.macro * self.neutral >= 1.0 and self.form == "multiplicative":
            raise ConfigError(f"expected macro * neutral < 1 (a range is positive), got {self.macro} * {self.neutral}")


def spread(variance: Tensor) -> Tensor:
    """``v = min(1, 4 Var)`` of rewards in [0, 1]: 4 p (1 - p) where they are 0 and 1."""
    return (4.0 * variance).clamp_max(1.0)


def make_factor(form: str, micro: float, macro: float, neutral: float = 0.0) -> RangeFactor:
    """The four readings."""

    def factor(advantage: Tensor, centred: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if form == "implicit_sq":
            return 1.0 + micro * 4.0 * centred.square()
        own = 1.0 + micro * torch.tanh(advantage.abs())
        if form == "implicit_abs":
            return own
        if form == "additive":
            return own + macro * spread(variance)
        return own * (1.0 + macro * (spread(variance) - neutral))

    return factor


@dataclass(frozen=True)
class ElasticRange:
    """``range_low``, ``range_high`` ``[T, N]`` and ``reward_spread`` ``[N]``, from the whole groups."""

    config: ETRConfig
    factor: RangeFactor

    def __call__(self, data: Data) -> Data:
        c, groups = self.config, Groups(data["group"])
        reward = (data["episode_reward"].double() - c.reward_min) / (c.reward_max - c.reward_min)
        mean = groups.mean(reward)[groups.index]
        centred = torch.where(groups.constant(reward)[groups.index], 0.0, reward - mean)
        variance = groups.mean(centred.square())[groups.index]
        dtype = data["advantage"].dtype
        factor = self.factor(data["advantage"], *(x.to(dtype) for x in (centred, mean, variance)))
        low, high = ((eps * factor).clamp(c.range_min, c.range_max) for eps in (c.clip_low, c.clip_high))
        ranges = {"range_low": low, "range_high": high}
        data = data.derive(**{name: x.expand(data.shape) for name, x in ranges.items()})
        return data.derive_sequence(reward_spread=spread(variance).to(dtype))


def elastic_clip(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """PPO's clip with a range for every element."""
    return losses.clip(batch["range_low"], batch["range_high"])(ratio, advantage, outputs, batch)


def _stats(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
    """The usual ones, clipped shares told apart by the sign of the advantage (of all elements), and the range."""
    stats = losses.ratio_stats(batch["range_low"], batch["range_high"])(ratio, advantage, outputs, batch)
    up, down = ratio.ratio > 1.0 + batch["range_high"], ratio.ratio < 1.0 - batch["range_low"]
    dtype = advantage.dtype
    return stats | {
        "clipped_up": (up & (advantage > 0)).to(dtype), "clipped_down": (down & (advantage < 0)).to(dtype),
        "clip_range": batch["range_high"],
    }  # fmt: skip


class ETRRecipe(Recipe):
    """GRPO's advantages (population deviation) and a clip range of every completion's own."""

    def factor(self) -> RangeFactor:
        """The configured reading; override it for another."""
        c = self.config
        return make_factor(c.form, c.micro, c.macro, c.neutral)

    def stages(self) -> tuple[Stage, ...]:
        baseline = GroupBaseline(scale="std", ddof=0, eps=1e-6, single="zero")
        return (baseline, ElasticRange(self.config, self.factor()))

    def loss(self) -> Loss:
        return elastic_clip

    def terms(self) -> tuple[Term, ...]:
        return (replace(self.policy_term(self.loss()), stats=_stats), *self.penalties())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """``clip_range_min``, ``clip_range_max``: of the upper range over the rollout."""
        on = data["on"]
        inside = on["valid"] > 0
        stats["clip_range_min"] = torch.where(inside, on["range_high"], torch.inf).min()
        stats["clip_range_max"] = torch.where(inside, on["range_high"], -torch.inf).max()


ETR = LLMMethod(
    "etr",
    "Zhang et al. 2026, arXiv 2601.03723 (reconstruction)",
    ETRConfig,
    ETRRecipe,
    {
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "clip, range by advantage and spread of the group's rewards",
        "aggregate": "sequence means",
    },
)
"""Elastic Trust Regions: clip ranges that follow the outcome."""
