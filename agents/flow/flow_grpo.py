"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): GRPO on the transitions of a stochastic sampler. The baseline.

    log p  = mean over dimensions of log N(x_{t-1}; mu, s^2),   mu and s of the sampler's transition
    A      = (R - group mean) / (group std + 1e-4), cut at +-5, the same for every step of a sample
    loss   = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta KL,   rho = exp(log p - log p_old)
    KL     = mean over dimensions of (mu - mu_ref)^2 / (2 sigma_t^2)   (released code; ``kl_divisor="sbar"``: the KL)

Slots: source = denoising steps as rows; advantage = group mean and deviation; ratio = transition; loss = clip.
Coupled: it needs a log-probability of every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from agents.flow.agent import FlowMethod
from agents.flow.parts import ClippedAdvantage, Divisor, FlowConfig, FlowRecipe, Needs, reference_term
from ccrl.estimators import aggregates
from ccrl.estimators.base import Stage
from ccrl.estimators.recipe import ClipHigh, ClipLow
from ccrl.estimators.terms import Aggregate, Term
from ccrl.settings import Range

__all__ = ["FlowGRPO", "FlowGRPOConfig", "FlowGRPORecipe"]


@dataclass(frozen=True)
class FlowGRPOConfig(FlowConfig):
    """Flow-GRPO; clip ranges suit log-probabilities that are means over dimensions."""

    search: ClassVar[dict[str, Any]] = {"clip_high": {"around": 4}}
    clip_low: ClipLow = 1e-3
    """Ratios below 1 - clip_low are clipped."""
    clip_high: ClipHigh = 1e-3
    """Ratios above 1 + clip_high are clipped; inf clips none."""
    kl_coef: Annotated[float, Range(0.0)] = 0.0
    """The squared distance to the reference's means is added to the loss with this weight; 0 keeps no reference."""
    kl_divisor: Divisor = "sigma"
    """The squared distance stands over the noise level as in released code (sigma), or over the variance of the
    transition, which makes it the KL (sbar)."""


class FlowGRPORecipe(FlowRecipe):
    """Group advantages, clipped ratios of transitions."""

    needs: ClassVar[Needs] = "log_prob"

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        return (ClippedAdvantage(c.advantage_std, c.max_advantage),)

    def aggregate(self) -> Aggregate:
        return aggregates.mean

    def penalties(self) -> tuple[Term, ...]:
        c = self.config
        return (reference_term(c.kl_coef, c.kl_divisor),) if c.kl_coef else ()


FlowGRPO = FlowMethod(
    "flow_grpo",
    "Liu et al. 2025, arXiv 2505.05470",
    FlowGRPOConfig,
    FlowGRPORecipe,
    {
        "source": "denoising steps as rows",
        "advantage": "group mean and deviation",
        "ratio": "transition",
        "loss": "clip",
    },
)
"""GRPO on denoising steps (Liu et al. 2025)."""
