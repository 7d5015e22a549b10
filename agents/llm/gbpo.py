"""GBPO: Group-relative Bounded Policy Optimization (Ao et al. 2026, arXiv 2604.18578; the language-model part of BPO).

The surrogate ``max E[rho A]`` with hard bounds ``c_l <= rho <= c_h`` has a closed-form optimum; GBPO regresses every
token's ratio onto it, with thresholds and weights from the group:

    A_i    = (s_i - mean) / (std + 1e-6)
    z_i    = (s_i - q) / (std + 1e-6) / T,    q: such that mean(rho*) = 1 in the group
    rho*_i = c_l + (c_h - c_l) sigmoid(z_i),  c_l = 1 - clip_low, c_h = 1 + clip_high
    loss   = token mean of |(rho_t - rho*_i) A_i|

No clipping: the loss pulls a ratio back once it has overshot its target. Slots: loss = bounded ratio; stage = target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators.balance import balanced_target
from ccrl.estimators.base import Stage
from ccrl.estimators.losses import bounded_target, cut_ratio, ratio_stats
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline, GroupThreshold
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Above, Positive

__all__ = ["GBPO", "BoundedGroupTarget", "GBPOConfig", "GBPORecipe", "bounded_regression"]


@dataclass(frozen=True)
class GBPOConfig(MethodConfig):
    """The released settings; ``clip_low`` and ``clip_high`` are the bounds of the ratio target."""

    clip_low: Annotated[float, Above(0.0, 1.0)] = 0.2
    """The ratio target is at least 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio target is at most 1 + clip_high."""
    target_temperature: Positive = 1e-4
    """T: the ratio target has this temperature, in standard deviations of the group's rewards; towards 0 the targets
    are the bounds."""
    threshold: Literal["quantile", "median"] = "quantile"
    """Rewards are compared with the anchor at which the group's target ratios average to 1 (quantile: without ties and
    towards T = 0 it is the (1 - kappa)-quantile), or with the group's median, as released."""


@dataclass(frozen=True)
class BoundedGroupTarget:
    """``advantage`` ``[T, N]`` (group z-score) and ``ratio_target`` ``[N]``. Equal rewards have advantage 0, which
    switches their loss off. A group of one has mean 0 and deviation 1; its target is 1 (``threshold="median"``: that of
    a threshold of 0, as released)."""

    low: float
    high: float
    temperature: float
    threshold: Literal["quantile", "median"] = "quantile"

    def __call__(self, data: Data) -> Data:
        reward, group = data["episode_reward"], data["group"]
        advantage = GroupBaseline(scale="std", eps=1e-6, single="keep").advantages(reward, group)
        if self.threshold == "median":
            # the z-score is affine in the reward, so its median is the reward's in the same units
            target = bounded_target(
                advantage - GroupThreshold(level=0.5).thresholds(advantage, group), self.low, self.high,
                self.temperature,
            )  # fmt: skip
        else:
            target = balanced_target(advantage, group, self.low, self.high, self.temperature)
        steps = data.shape[0]
        return data.derive_sequence(ratio_target=target).derive(
            advantage=advantage.expand(steps, *advantage.shape) * data["valid"]
        )


def bounded_regression(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``|(rho - rho*) A|`` with the column ``ratio_target``."""
    return ((cut_ratio(ratio) - batch["ratio_target"]) * advantage).abs()


class GBPORecipe(Recipe):
    """The target is of the whole group, the regression of every token; also for grouped episodes."""

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        return (BoundedGroupTarget(c.clip_low, c.clip_high, c.target_temperature, c.threshold),)

    def loss(self) -> Loss:
        return bounded_regression

    def terms(self) -> tuple[Term, ...]:
        term = Term("policy_gradient_loss", self.loss(), self.aggregate(), type(self).ratio, stats=self._stats)
        return (term, *self.penalties())

    def _stats(self, ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        c = self.config
        found: dict[str, Tensor] = ratio_stats(c.clip_low, c.clip_high)(ratio, advantage, outputs, batch)  # type: ignore[assignment]
        informative = torch.where(advantage != 0, (cut_ratio(ratio) - batch["ratio_target"]).abs(), 0.0)
        return found | {"target_gap": informative}


GBPO = LLMMethod(
    "gbpo",
    "Ao et al. 2026, arXiv 2604.18578",
    GBPOConfig,
    GBPORecipe,
    {
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "|rho - rho*| |A|, rho* by the group's quantile",
        "aggregate": "token mean",
    },
)
"""Group-relative Bounded Policy Optimization."""
