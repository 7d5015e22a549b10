"""MHPO: Modulated Hazard-aware Policy Optimization (Wang et al. 2026, arXiv 2603.16929).

GRPO's clip is replaced by a smooth bounded map of the log-ratio times an asymmetric survival weight:

    psi(r)  = c tanh(log(r) / c)                                             log-fidelity modulator, in (-c, c)
    zeta(r) = (s(sg psi) / lam+)^k+ + (s(-sg psi) / lam-)^k-                 decoupled hazard penalty, s = softplus
    loss    = -A exp(psi - zeta), averaged over tokens, then over sequences
    d loss / d log pi = -A M(r),  M(r) = exp(psi - zeta) sech^2(log(r) / c) <= e^c

``zeta(1)`` is not 0: on policy the gradient is ``exp(-zeta(1))`` (0.265 with the defaults) times GRPO's. Works on
tokens and on the steps of control episodes alike: it reads log-probabilities and rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators.recipe import Aggregation, MethodConfig, Recipe
from ccrl.estimators.terms import Diagnostics, LogRatio, Loss, Outputs, Term
from ccrl.settings import Positive, Range

__all__ = ["MHPO", "Hazard", "MHPOConfig", "MHPORecipe", "modulated"]

LIMIT = 20.0
"""Log-ratios are cut here: the multiplier is 0 to machine precision beyond, and their hyperbolic functions overflow."""


PositiveOrInf = Annotated[float, Range(0.0, above=True, also=(math.inf,))]


@dataclass(frozen=True)
class MHPOConfig(MethodConfig):
    """The paper's settings; nothing is clipped."""

    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    bound: PositiveOrInf = 1.5
    """c: the modulated log-ratio stays within -c and c; with inf it is the log-ratio."""
    shape_up: Positive = 1.5
    """k+: the hazard of ratios above 1 has this Weibull shape."""
    scale_up: PositiveOrInf = 1.0
    """lambda+: their hazard has this Weibull scale; inf is no hazard."""
    shape_down: Positive = 2.0
    """k-: the hazard of ratios below 1 has this Weibull shape."""
    scale_down: PositiveOrInf = 0.8
    """lambda-: their hazard has this Weibull scale; inf is no hazard."""
    normalise_at_one: bool = False
    """zeta(1) is subtracted, so that the gradient on policy is GRPO's; not the paper's."""
    aggregate: Aggregation = "sequence_mean_token_mean"


@dataclass(frozen=True)
class Hazard:
    """The two maps of the log-ratio, on tensors of any shape."""

    bound: float = 1.5
    shape_up: float = 1.5
    scale_up: float = 1.0
    shape_down: float = 2.0
    scale_down: float = 0.8
    normalise_at_one: bool = False

    def psi(self, log_ratio: Tensor) -> Tensor:
        """The log-fidelity modulator."""
        x = log_ratio.clamp(-LIMIT, LIMIT)
        return x if math.isinf(self.bound) else self.bound * torch.tanh(x / self.bound)

    def zeta(self, psi: Tensor) -> Tensor:
        """The decoupled hazard penalty, a constant for the gradient: with it the weight would turn around where the
        hazard grows faster than ``psi``."""
        psi = psi.detach()
        up = (F.softplus(psi) / self.scale_up) ** self.shape_up
        down = (F.softplus(-psi) / self.scale_down) ** self.shape_down
        return up + down - self._at_one if self.normalise_at_one else up + down

    @property
    def _at_one(self) -> float:
        up, down = math.log(2.0) / self.scale_up, math.log(2.0) / self.scale_down
        return float(up**self.shape_up + down**self.shape_down)


def modulated(hazard: Hazard) -> Loss:
    """``-A exp(psi - zeta)``, whatever the sign of ``A``."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        psi = hazard.psi(ratio.log_ratio)
        return -advantage * torch.exp(psi - hazard.zeta(psi))

    return loss


class MHPORecipe(Recipe):
    """GRPO's advantages and the modulated ratio."""

    def hazard(self) -> Hazard:
        """The configured maps."""
        c = self.config
        return Hazard(c.bound, c.shape_up, c.scale_up, c.shape_down, c.scale_down, c.normalise_at_one)

    def loss(self) -> Loss:
        return modulated(self.hazard())

    def terms(self) -> tuple[Term, ...]:
        term = replace(self.policy_term(self.loss()), stats=_stats(self.hazard()))
        return (term, *self.penalties())


def _stats(hazard: Hazard) -> Diagnostics:
    def stats(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        x = ratio.log_ratio
        psi = hazard.psi(x)
        zeta = hazard.zeta(psi)
        return {"approx_kl": x.exp() - 1.0 - x, "abs_log_ratio": x.abs(), "psi": psi, "zeta": zeta,
                "survival": torch.exp(-zeta)}  # fmt: skip

    return stats  # type: ignore[return-value]


MHPO = LLMMethod(
    "mhpo",
    "Wang et al. 2026, arXiv 2603.16929",
    MHPOConfig,
    MHPORecipe,
    {
        "advantage": "group z-score",
        "ratio": "token, bounded by tanh",
        "loss": "ratio x survival weight",
        "aggregate": "sequence means",
    },
)
"""Modulated Hazard-aware Policy Optimization: a bounded ratio with a survival weight, no clip."""
