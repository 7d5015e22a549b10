"""GRPO-Guard (Wang et al. 2025, arXiv 2510.22319, CVPR 2026): ratios of denoising steps that clipping can hold.

With x' = mu_old + s z and dmu = mu - mu_old the log-ratio of a step is (means over the D dimensions)

    l = mean(z dmu) / s - mean(dmu^2) / (2 s^2):    E l < 0, and both moments depend on the step's deviation s

RatioNorm:   lhat = (l + mean(dmu^2) / (2 s^2)) s = mean(z dmu):   mean 0, deviation ||dmu|| / D at every step
Loss:        1 / (-dt) max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),   rho = exp(lhat)

d mu / d v = k dt with k nearly constant, so the gradient's size by step is ``|dt| k / s`` (raw), ``|dt| k`` (with
RatioNorm), k (with ``1 / |dt|``). The gradient flows through both summands of lhat: d lhat / d mu = z / D.

Slots: ratio = normalised transition; weight = ``1 / |dt|``; the rest is flow_grpo's. Coupled: it needs the log-prob
and the mean of the policy that sampled. For Gaussian policies of any kind; tokens have no mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.flow.agent import FlowMethod
from agents.flow.flow_grpo import FlowGRPOConfig, FlowGRPORecipe
from ccrl.data import Data
from ccrl.estimators import losses
from ccrl.estimators.recipe import ClipHigh, ClipLow
from ccrl.estimators.terms import LogRatio, Outputs, Term

__all__ = ["GRPOGuard", "GRPOGuardConfig", "GRPOGuardRecipe", "ratio_norm", "side_stats", "step_weight"]


@dataclass(frozen=True)
class GRPOGuardConfig(FlowGRPOConfig):
    """Clip ranges belong to the size of lhat, ``||dmu|| / D``: 2e-6 was published for images, 2e-3 suits 16 numbers."""

    clip_low: ClipLow = 2e-3
    """Ratios below 1 - clip_low are clipped."""
    clip_high: ClipHigh = 2e-3
    """Ratios above 1 + clip_high are clipped; inf clips none."""
    normalise: bool = True
    """Ratios are normalised; if false they are those of the transitions, as Flow-GRPO's."""
    step_weight: Literal["none", "dt", "beta_dt", "dt_over_beta"] = "dt"
    """A step's loss is multiplied by ``1 / |dt|`` (dt), by the paper's ``beta_t / |dt|`` for dance_sde (beta_dt), which
    leaves gradients proportional to beta_t squared, by ``1 / (beta_t |dt|)``, which makes them equal (dt_over_beta), or
    by 1 as in some trainers (none)."""


def ratio_norm(outputs: Outputs, batch: Data) -> LogRatio:
    """``lhat = mean_d z dmu`` per step: what ``(l + mean dmu^2 / (2 s^2)) s`` is, without its cancellation."""
    std = batch["std"]
    noisy = std > 0.0
    z = (batch["action"] - batch["old_mean"]) / torch.where(noisy, std, 1.0).unsqueeze(-1)
    moved = (z * (outputs["mean"] - batch["old_mean"])).mean(-1)
    found = torch.where(noisy, moved, 0.0)
    return LogRatio(found, torch.zeros_like(found), batch["valid"] * noisy)


def step_weight(batch: Data, kind: str) -> Tensor:
    """``[T, N]``, with ``beta = mean_v / dt`` of the sampler: ``1 + sigma^2 (1 - t) / (2 t)``."""
    dt, beta = -batch["dt"], batch["mean_v"] / batch["dt"]
    ones = torch.ones_like(dt)
    return {"none": ones, "dt": ones / dt, "beta_dt": beta / dt, "dt_over_beta": ones / (beta * dt)}[kind]


class GRPOGuardRecipe(FlowGRPORecipe):
    """flow_grpo with normalised ratios and weighted steps."""

    def start(self, data: Data, ctx: object) -> Data:
        return super().start(data, ctx).derive(step_weight=step_weight(data, self.config.step_weight))  # type: ignore[arg-type]

    def terms(self) -> tuple[Term, ...]:
        c = self.config
        ratio = ratio_norm if c.normalise else type(self).ratio
        policy = Term(
            "policy_gradient_loss", self.loss(), self.aggregate(), ratio, frozenset({"mean", "log_prob"}),
            weight="step_weight", stats=side_stats(c.clip_low, c.clip_high),
        )  # fmt: skip
        return (policy, *self.penalties())


def side_stats(low: float, high: float) -> Callable[..., dict[str, Tensor]]:
    """``approx_kl``, ``clip_fraction``, the mean of the log-ratio, and the fractions that clipping holds on either
    side:
    ``clip_above`` (A > 0 and a ratio above 1 + high), ``clip_below`` (A < 0 and one below 1 - low)."""
    usual = losses.ratio_stats(low, high)

    def stats(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        rho = ratio.ratio
        sides = {"clip_above": (advantage > 0) & (rho > 1.0 + high), "clip_below": (advantage < 0) & (rho < 1.0 - low)}
        found = {name: side.to(rho.dtype) for name, side in sides.items()}
        return usual(ratio, advantage, outputs, batch) | found | {"log_ratio": ratio.log_ratio}

    return stats


GRPOGuard = FlowMethod(
    "grpo_guard",
    "Wang et al. 2025, arXiv 2510.22319",
    GRPOGuardConfig,
    GRPOGuardRecipe,
    {
        "source": "denoising steps as rows",
        "advantage": "group mean and deviation",
        "ratio": "transition, centred and rescaled by its deviation",
        "loss": "clip / |dt|",
    },
)
"""GRPO with regulated clipping for flows (Wang et al. 2025)."""
