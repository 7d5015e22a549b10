"""GBPO: Group-relative Bounded Policy Optimization (Ao et al. 2026, arXiv 2604.18578; the language-model part of BPO).

The surrogate ``max E[rho A]`` with hard bounds ``c_l <= rho <= c_h`` has a closed-form optimum; GBPO regresses every
token's ratio onto it, with thresholds and weights from the group:

    A_i    = (s_i - mean) / (std + 1e-6)
    z_i    = (s_i - q) / (std + 1e-6) / T,    q: the group's (1 - kappa)-quantile, kappa = (1 - c_l) / (c_h - c_l)
    rho*_i = c_l + (c_h - c_l) sigmoid(z_i),  c_l = 1 - clip_low, c_h = 1 + clip_high
    loss   = token mean of |(rho_t - rho*_i) A_i|

No clipping: the loss pulls a ratio back once it has overshot its target. Slots: loss = bounded ratio; stage = target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.llm.base import LLM, LLMConfig
from ccrl.data import Data
from ccrl.estimators.base import Stage
from ccrl.estimators.losses import bounded_target, ratio_stats
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.stages import GroupBaseline, GroupThreshold
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term

__all__ = ["GBPO", "BoundedGroupTarget", "GBPOConfig", "GBPORecipe", "bounded_regression"]

LARGEST = 20.0
"""Log-ratios are cut there: the exponential of a larger one overflows, and such a token has no information left."""


@dataclass(frozen=True)
class GBPOConfig(LLMConfig):
    """The released settings; ``clip_low`` and ``clip_high`` are the bounds of the ratio target."""

    target_temperature: float = 1e-4
    """T of the ratio target, in standard deviations of the group's scores; towards 0 the targets are the bounds."""
    threshold: str = "quantile"
    """quantile: the (1 - kappa)-quantile, whose target ratios average to 1 but for ties at it; median: as released. The
    same for equal bounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_low == 0.0 or self.clip_high == 0.0:
            raise ValueError(f"expected 0 < clip_low <= 1 and clip_high > 0 (bounds of the ratio target), got "
                             f"{self.clip_low}, {self.clip_high}")  # fmt: skip
        if self.target_temperature <= 0.0:
            raise ValueError(f"target_temperature: expected > 0, got {self.target_temperature}")
        if self.threshold not in ("quantile", "median"):
            raise ValueError(f"threshold: expected quantile or median, got {self.threshold!r}")

    @property
    def level(self) -> float:
        """Which quantile of the group's scores is the threshold."""
        return 0.5 if self.threshold == "median" else self.clip_high / (self.clip_low + self.clip_high)


@dataclass(frozen=True)
class BoundedGroupTarget:
    """``advantage`` ``[T, N]`` (group z-score) and ``ratio_target`` ``[N]``. A group of one has mean 0, deviation 1 and
    threshold 0; equal scores have advantage 0, which switches their loss off."""

    low: float
    high: float
    temperature: float
    level: float

    def __call__(self, data: Data) -> Data:
        score, group = data["episode_reward"], data["group"]
        advantage = GroupBaseline(scale="std", eps=1e-6, single="keep").advantages(score, group)
        # the z-score is affine in the score, so its quantile is the score's quantile in the same units
        z = advantage - GroupThreshold(level=self.level).thresholds(advantage, group)
        target = bounded_target(z, self.low, self.high, self.temperature)
        steps = data.shape[0]
        return data.derive_sequence(ratio_target=target).derive(
            advantage=advantage.expand(steps, *advantage.shape) * data["valid"]
        )


def bounded_regression(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
    """``|(rho - rho*) A|`` with the column ``ratio_target``."""
    return ((_ratio(level) - batch["ratio_target"]) * advantage).abs()


def _ratio(level: LogRatio) -> Tensor:
    return level.log_ratio.clamp(-LARGEST, LARGEST).exp()


class GBPORecipe(Recipe):
    """The target is of the whole group, the regression of every token; also for grouped episodes."""

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        return (BoundedGroupTarget(c.clip_low, c.clip_high, c.target_temperature, c.level),)

    def loss(self) -> Loss:
        return bounded_regression

    def terms(self) -> tuple[Term, ...]:
        term = Term("policy_gradient_loss", self.loss(), self.aggregate(), type(self).ratio, stats=self._stats)
        return (term, *self.penalties())

    def _stats(self, level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> dict[str, Tensor]:
        c = self.config
        found: dict[str, Tensor] = ratio_stats(c.clip_low, c.clip_high)(level, advantage, evaluation, batch)  # type: ignore[assignment]
        informative = torch.where(advantage != 0, (_ratio(level) - batch["ratio_target"]).abs(), 0.0)
        return found | {"target_gap": informative}


class GBPO(LLM):
    """Group-relative Bounded Policy Optimization."""

    name = "gbpo"
    paper = "Ao et al. 2026, arXiv 2604.18578"
    Config = GBPOConfig
    Recipe = GBPORecipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "advantage": "group z-score", "ratio": "token", "loss": "|rho - rho*| |A|, rho* by the group's quantile",
            "aggregate": "token mean",
        }  # fmt: skip
