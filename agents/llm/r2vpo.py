"""R2VPO: Ratio-Variance Regularised Policy Optimisation (Luo et al. 2026, arXiv 2601.03320 and 2605.26784).

The trust region is a bound on the variance of the policy ratio, enforced by a primal-dual loop; no ratio is clipped:

    maximise E_old[r A]  subject to  V = E_old[(r - 1)^2] <= delta
    L(theta; lambda) = E[ -r A + lambda ((r - 1)^2 - delta) ],   gradient in log pi: -r (A - 2 lambda (r - 1))
    lambda <- clip(lambda + eta (V - delta), 0, lambda_max)

so the effective advantage ``A - 2 lambda (r - 1)`` shrinks smoothly and changes sign at ``r = 1 + A / (2 lambda)``,
which also lets stale samples take part: the last ``replay`` rollouts, with the advantages and log-probabilities they
were collected with, join every update. Slots: loss = Lagrangian; state = dual variable, ring of old rollouts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.base import Context
from ccrl.estimators.losses import cut_ratio
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.rollouts import concatenate, evaluate_columns
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Natural, Nonnegative, Positive
from ccrl.updaters import Stats

__all__ = ["R2VPO", "R2VPOConfig", "R2VPORecipe", "RolloutRing", "dual_step", "lagrangian", "ratio_variance"]


@dataclass(frozen=True)
class R2VPOConfig(MethodConfig):
    """The paper's numbers are not public: these follow from PPO's clip range (``delta = eps^2``)."""

    variance_budget: Positive = 0.04
    """delta: the mean of (r - 1)^2 is bounded by this."""
    dual_init: Nonnegative = 0.5
    """The first lambda is this."""
    dual_rate: Positive = 5.0
    """eta: a dual step moves lambda by this times the excess of the variance."""
    dual_max: Nonnegative = 100.0
    """lambda is at most this."""
    dual_every: Literal["auto", "rollout", "minibatch"] = "auto"
    """A dual step is made after every gradient step, with the V that the step saw (minibatch), or once per iteration,
    with V after its last epoch (rollout: over many epochs V grows before lambda answers, and lambda swings). With auto
    it is once per iteration for one epoch, else after every gradient step."""
    replay: Natural = 0
    """So many old rollouts are kept and trained on beside the fresh one; 0 is on-policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_init > self.dual_max:
            raise ValueError(f"expected dual_init <= dual_max, got {self.dual_init}, {self.dual_max}")

    @property
    def per_rollout(self) -> bool:
        """Whether lambda moves once per iteration."""
        return self.dual_every == "rollout" or (self.dual_every == "auto" and self.n_epochs == 1)


def dual_step(dual: Tensor, variance: Tensor, budget: float, rate: float, largest: float) -> Tensor:
    """The next lambda (0-d). A variance that is not finite doubles it."""
    moved = torch.where(variance.isfinite(), dual + rate * (variance - budget), 2.0 * dual)
    return moved.clamp(0.0, largest)


def ratio_variance(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """``(r - 1)^2``, about 1 and not about the batch's mean ratio: that would hide a drift of all ratios."""
    return (cut_ratio(ratio) - 1.0).square()


def lagrangian(dual: Callable[[], Tensor], budget: float) -> Loss:
    """``-r A + lambda ((r - 1)^2 - budget)`` with the current lambda (0-d), which no gradient reaches."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        r = cut_ratio(ratio)
        return -r * advantage + dual() * ((r - 1.0).square() - budget)

    return loss


class RolloutRing(nn.Module):
    """The last ``size`` rollouts, copied: the sampler writes the next one over its columns.

    They differ in length, so they are no buffers of fixed shape; the checkpoint holds them as the module's extra state.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rollouts: deque[Data] = deque(maxlen=size)

    def push(self, data: Data, columns: set[str]) -> None:
        """Keep those of ``columns`` that are per step or per sequence."""
        kept = {name: data[name].clone() for name in sorted(columns) if name in data and name not in data.scalars}
        self.rollouts.append(Data(kept, raw=data.raw & kept.keys(), sequence=data.sequence & kept.keys()))

    def get_extra_state(self) -> list[dict[str, Any]]:
        return [
            {"columns": dict(r), "raw": sorted(r.raw), "sequence": sorted(r.sequence)} for r in self.rollouts
        ]  # fmt: skip

    def set_extra_state(self, state: list[dict[str, Any]]) -> None:
        self.rollouts.clear()
        self.rollouts.extend(
            Data(r["columns"], raw=frozenset(r["raw"]), sequence=frozenset(r["sequence"])) for r in state
        )


class R2VPORecipe(Recipe):
    """The Lagrangian, its dual variable, and the mix of fresh and old rollouts.

    Works for grouped episodes whose observations are tensors.
    """

    dual: Tensor

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        self.register_buffer("dual", torch.tensor(config.dual_init))
        self.ring = RolloutRing(config.replay)

    def loss(self) -> Loss:
        """``-r A + lambda ((r - 1)^2 - delta)``."""
        return lagrangian(lambda: self.dual, self.config.variance_budget)

    def terms(self) -> tuple[Term, ...]:
        # of no weight: V is the mean over tokens, whatever the loss averages
        variance = Term("ratio_variance", ratio_variance, aggregates.mean, ratios.token, advantage=None, coef=0.0)
        return (self.policy_term(self.loss()), variance, *self.penalties())

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """``fresh``: this iteration's rollout; ``on``: what is trained on."""
        found = super().prepare(have, ctx)
        fresh = found["on"]
        return found | {
            "fresh": fresh,
            "on": concatenate([fresh, *self.ring.rollouts]) if self.ring.rollouts else fresh,
        }

    def after_minibatch(self, stats: Stats, ctx: Context) -> None:
        if not self.config.per_rollout:
            self._move(stats["ratio_variance"])

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        on, read = data["on"], self.read[self.phases()[0].terms]
        if self.config.per_rollout:
            columns = self.config.microbatch or None
            log_prob = evaluate_columns(self.parts.policy, on, frozenset({"log_prob"}), columns)["log_prob"]
            ratio = LogRatio(log_prob, on["log_prob"], on["valid"])
            element = ratio_variance(ratio, ratio.valid, {}, on)
            stats["variance_after"] = (element * on["valid"]).sum() / on["valid"].sum()
            self._move(stats["variance_after"])
        stats["dual"] = self.dual.clone()
        if self.config.replay:
            self.ring.push(data["fresh"], read | {"valid", "group"})

    def _move(self, variance: Tensor) -> None:
        c = self.config
        self.dual.copy_(dual_step(self.dual, variance, c.variance_budget, c.dual_rate, c.dual_max))


R2VPO = LLMMethod(
    "r2vpo",
    "Luo et al. 2026, arXiv 2601.03320",
    R2VPOConfig,
    R2VPORecipe,
    {
        "plan": "fresh and old rollouts",
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "-r A + lambda (r - 1)^2",
        "dual": "ratio variance",
        "aggregate": "token mean",
    },
)
"""Ratio-Variance Regularised Policy Optimisation."""
