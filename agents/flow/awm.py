"""AWM - Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050, ICML 2026).

    l(x_0, t, e) = - w(t) m,   m = mean over dimensions of (v(x_t, t, c) - (e - x_0))^2      the surrogate
    log-likelihood
                   ghuber: - t ((m + 1e-10)^a - (1e-10)^a) / a,  a = 1/4                     (released configs)
    A    = (R - mean of the condition's samples) / (std of ALL rewards + 1e-4), cut at +-5, divided by 5
    rho  = exp(l - l_old) on the SAME (t, e)
    loss = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + beta ||v - v_ref||^2 + beta_ema ||v - v_ema||^2
    v_ema <- d v_ema + (1 - d) v after every iteration,  d = min(0.3, 0.001 iterations)

A policy gradient whose denoising target is the clean sample, not the next noisy state: the same expectation, less
variance (theorem 1 of the paper; docs/awm.md). ``|A| <= 1`` and beta_ema = 1 keep the squared velocity's coefficient
A + beta + beta_ema from turning negative, where a bad sample would pay without bound.

Slots: source = clean samples of any sampler; likelihood = matching error; advantage = group mean, batch deviation; loss
= clip + distances to two references. Decoupled: it needs no log-probability of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.flow.agent import FlowMethod
from agents.flow.matching import MatchingRecipe, Times
from agents.flow.parts import ClippedAdvantage, FlowConfig
from ccrl.data import Data
from ccrl.diffusion.flow import matching_error
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import ClipHigh, ClipLow
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Above, Count, Nonnegative
from ccrl.updaters import Stats

__all__ = ["AWM", "AWMConfig", "AWMRecipe", "Weighting", "surrogate_log_likelihood", "velocity_distance"]

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


@dataclass(frozen=True)
class AWMConfig(FlowConfig):
    """Defaults are those of the released configs, the weight of the fixed reference that of a small task."""

    search: ClassVar[dict[str, Any]] = {"clip_high": None}
    weighting: Weighting = "ghuber"
    """Squared errors are weighted by 1 (uniform, the paper), by t, by t^2, or pass through a root (huber) or a fourth
    root (ghuber, released configs) times t, which holds large errors down."""
    power: Annotated[float, Above(0.0, 1.0)] = 0.25
    """ghuber raises mean squared errors to this power."""
    n_times: Count = 6
    """Every sample is noised at this many times."""
    times: Times = "grid"
    """Times are those of the sampler's own steps but the first and the last (grid), uniform, or logit-normal."""
    ratio: Literal["exp_first", "sum_first"] = "exp_first"
    """Ratios are formed at every time (exp_first), or of the mean surrogate over a sample's times (sum_first)."""
    kl_coef: Nonnegative = 0.01
    """The squared distance to the first policy's velocity is added to the loss with this weight."""
    ema_coef: Nonnegative = 1.0
    """The squared distance to the moving average's velocity is added with this weight; below the largest advantage,
    which is 1, the loss may have no minimum unless ghuber is used."""
    kl_weight: Literal["uniform", "elbo"] = "uniform"
    """Distances of velocities are taken as they are, or divided by 2 s^2 with s = 0.7 sqrt(t / (1 - min(t, 0.99)))."""
    scale_advantage: bool = True
    """Advantages are divided by max_advantage, so that none is above 1."""
    advantage_std: Literal["group", "batch"] = "batch"
    """Advantages are divided by the standard deviation of the group's rewards, or of all rewards of the rollout."""
    clip_low: ClipLow = 1.0
    """Ratios below 1 - clip_low are clipped."""
    clip_high: ClipHigh = 1.0
    """Ratios above 1 + clip_high are clipped; inf clips none."""


def surrogate_log_likelihood(error: Tensor, time: Tensor, weighting: Weighting, power: float = 0.25) -> Tensor:
    """``l`` of mean squared errors ``[...]`` at times ``[...]``."""
    if weighting == "huber":
        return -((error + 1e-10).sqrt() - 1e-5) * time
    if weighting == "ghuber":
        rooted: Tensor = (error + 1e-10).pow(power) - 1e-10**power
        return -rooted * time / power
    weights: Mapping[str, Tensor] = {"uniform": torch.ones_like(time), "t": time, "t2": time.square()}
    return -weights[weighting] * error


def velocity_distance(column: str, weight: str) -> Loss:
    """Squared distance of the velocity to a stored one, mean over dimensions, per row."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        squared = matching_error(outputs["velocity"], batch[column])
        if weight == "uniform":
            return squared
        t = batch["time"]
        return squared / (2.0 * 0.49 * t / (1.0 - t.clamp_max(0.99)))

    return loss


class AWMRecipe(MatchingRecipe):
    """Matching errors as log-likelihoods."""

    @property
    def velocities(self) -> tuple[str, ...]:
        c = self.config
        return (*(("ref",) if c.kl_coef else ()), *(("ema",) if c.ema_coef else ()))

    @property
    def versions(self) -> tuple[str, ...]:
        return self.velocities

    def stages(self) -> tuple[Stage, ...]:
        c = self.config
        scale = c.max_advantage if c.scale_advantage else 1.0
        return (ClippedAdvantage(c.advantage_std, c.max_advantage, scale),)

    @property
    def once(self) -> bool:
        """Whether an iteration takes one step: the ratio is then 1 with the surrogate's gradient, and needs no old
        one."""
        c = self.config
        return c.n_epochs == 1 and not 0 < c.batch_size < self.parts.request.counts.sum()  # type: ignore[union-attr]

    def finish(self, rows: Data, ctx: Context) -> Data:
        if self._once:
            return rows
        velocity = self.evaluated(ctx, "live", rows, "velocity")
        return rows.derive(old_surrogate=self.surrogate({"velocity": velocity}, rows))

    def surrogate(self, outputs: Outputs, batch: Data) -> Tensor:
        """``l`` ``[K, B]`` in float64: it is exponentiated."""
        c = self.config
        error = matching_error(outputs["velocity"].double(), batch["target"].double())
        return surrogate_log_likelihood(error, batch["time"].double(), c.weighting, c.power)

    def likelihood_ratio(self, outputs: Outputs, batch: Data) -> LogRatio:
        """At every row, or of the sample's mean over rows."""
        new, valid = self.surrogate(outputs, batch), batch["valid"]
        old = new.detach() if self._once else batch["old_surrogate"].double()
        if self.config.ratio == "sum_first":
            new, old, valid = new.mean(0, keepdim=True), old.mean(0, keepdim=True), valid.amax(0, keepdim=True)
        return LogRatio(new, old, valid.to(new.dtype))

    def terms(self) -> tuple[Term, ...]:
        c, velocity = self.config, frozenset({"velocity"})
        whole = aggregates.mean if c.ratio == "exp_first" else aggregates.sequence_mean
        self._once = self.once
        clipped = self.loss()

        def policy(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            # of one ratio per sample: every row has the sample's advantage, and all of them would be summed
            return clipped(ratio, advantage[: ratio.valid.shape[0]], outputs, batch)

        # no statistics of ratios: they are no likelihood ratios, and would cost a forward pass
        found = [Term("policy_gradient_loss", policy, whole, self.likelihood_ratio, velocity)]
        for name, version, coef in (("kl", "ref", c.kl_coef), ("ema_kl", "ema", c.ema_coef)):
            if coef:
                loss = velocity_distance(f"{version}_velocity", c.kl_weight)
                found.append(Term(name, loss, aggregates.mean, want=velocity, advantage=None, coef=coef))
        return tuple(found)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        if self.config.ema_coef:
            ctx.bank.refresh("ema", mix=1.0 - (0.001 * ctx.k).clamp_max(0.3))
        stats["negative_advantages"] = (data["on"]["advantage"] < 0).float().mean()


AWM = FlowMethod(
    "awm",
    "Xue et al. 2025, arXiv 2509.25050",
    AWMConfig,
    AWMRecipe,
    {
        "source": "clean samples, any sampler",
        "likelihood": "matching error at drawn times",
        "advantage": "group mean, batch deviation",
        "loss": "clip + distances to the first and the averaged policy",
    },
)
"""Advantage Weighted Matching (Xue et al. 2025)."""
