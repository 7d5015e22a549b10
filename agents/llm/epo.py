"""EPO: Entropy-regularized Policy Optimization for language-model agents (Xu et al. 2025, arXiv 2509.22576).

Over many turns with a reward at the end, an entropy bonus alone makes the entropy swing. EPO adds a hinge that keeps
every token's entropy near what the entropy has been so far:

    L_H      = mean over trajectories, their turns, the tokens of a turn of H                             eq. 2
    Hbar_m   = mean entropy per token of the rollout of iteration m,  Hbar_W = mean of Hbar_0..Hbar_k-1
    P        = [kappa_l Hbar_W - H]_+ + [H - kappa_r Hbar_W]_+                                            eq. 3
    L_smooth = the same nested mean of alpha P; 0 in the first iteration                                  eq. 4
    beta_k   = 1 + exp(-gamma k / floor(K / 2))                                                           eq. 5
    L        = L_MT - lambda (L_H - beta_k L_smooth)                                                      eq. 6

``L_MT`` is GRPO's clipped loss. The gradient goes through H in both; Hbar_W is a constant. The published corridor
(0, 2) has no lower side. Slots: penalty = entropy corridor; state = the mean entropy so far; aggregate = turn means.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data, Field
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.steps import find_steps
from ccrl.estimators.terms import Aggregate, LogRatio, Loss, Outputs, Term
from ccrl.settings import ConfigError, Nonnegative, Range, Unit
from ccrl.updaters import Stats

__all__ = ["EPO", "EPOConfig", "EPORecipe", "corridor", "decay_factor", "released_factor", "turn_mean", "turn_shares"]

RELEASED_LENGTH = 150
"""Iterations that the released weights assume, whatever the run's length."""


@dataclass(frozen=True)
class EPOConfig(MethodConfig):
    """The paper's settings on ScienceWorld."""

    kappa_low: Unit = 0.0
    """Entropies below this many times their mean so far are penalised; 0 penalises none."""
    kappa_high: Annotated[float, Range(1.0, also=(math.inf,))] = 2.0
    """Entropies above this many times their mean so far are penalised; inf penalises none."""
    alpha: Nonnegative = 0.05
    """The penalty outside the corridor has this weight beside the entropy; the paper has 0.1 on ALFWorld."""
    decay: Nonnegative = 3.0
    """The penalty's weight falls this fast from twice to once its final value, in units of half a run."""
    schedule: Literal["paper", "constant", "released"] = "paper"
    """The penalty's weight follows the paper's schedule, stays at its final value (constant), or follows that of the
    released code over 150 iterations (released)."""
    penalty: Literal["hinge", "indicator"] = "hinge"
    """The penalty is the distance from the corridor (hinge), or 1 outside it (indicator: the released code's, which has
    no gradient and only moves the logged loss)."""
    entropy_coef: Nonnegative = 0.001
    """The entropy bonus is subtracted from the loss with this weight, and the penalty added with it; 0 leaves out
    both."""
    kl_coef: Nonnegative = 0.01
    """KL(policy || reference) is added to the loss with this weight; 0 keeps no reference."""
    aggregate: Literal["turn_mean", "token_mean", "sequence_mean_token_mean", "sequence_mean", "fixed"] = "turn_mean"  # type: ignore[assignment]
    """All terms are averaged over the tokens of a turn, then turns, then sequences (turn_mean, the paper's), over all
    tokens (token_mean, as released), over each sequence's tokens and then sequences (sequence_mean_token_mean), summed
    over tokens and averaged over sequences (sequence_mean), or that divided by the length cap (fixed)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa_low == self.kappa_high:
            raise ConfigError(f"expected kappa_low < kappa_high, got {self.kappa_low} and {self.kappa_high}")
        if self.schedule != "paper" and self.decay != 3.0:
            raise ConfigError(f"decay: expected 3.0 with schedule={self.schedule!r}, which does not read it, got "
                              f"{self.decay}")  # fmt: skip


def decay_factor(k: Tensor, total: Tensor, decay: float) -> Tensor:
    """``beta_k`` (0-d) in iteration ``k`` = 0, 1, ... of ``total`` (0-d); 1 in a run of fewer than two."""
    half = (total / 2.0).floor()
    return torch.where(half > 0, 1.0 + torch.exp(-decay * k / half.clamp_min(1.0)), 1.0)


def released_factor(k: Tensor, length: int = RELEASED_LENGTH) -> Tensor:
    """What the released code has in place of ``beta_k``; it jumps down in the middle."""
    half = length / 2.0
    early = 1.0 - 0.2 * (1.0 - torch.exp(-2.0 * k / half))
    return torch.where(k <= half, early, 0.8 * torch.exp(-3.0 * (k - half) / half))


def corridor(
    entropy: Tensor, mean: Tensor, low: float, high: float, alpha: float, penalty: Literal["hinge", "indicator"]
) -> Tensor:
    """``alpha P`` of entropies of any shape, for the corridor from ``low`` to ``high`` times ``mean``."""
    below = low * mean - entropy
    # inf times a mean of 0 is NaN
    above = torch.full_like(entropy, -torch.inf) if math.isinf(high) else entropy - high * mean
    if penalty == "indicator":
        return alpha * ((below > 0) | (above > 0)).to(entropy.dtype)
    return alpha * (torch.relu(below) + torch.relu(above))


def turn_shares(data: Data) -> Data:
    """``turn_share`` ``[T, N]``: a token's share of its sequence, 1 / (tokens of its turn x turns of the sequence). A
    turn is what the policy writes between two replies."""
    valid = data["valid"]
    steps = find_steps(valid, None)
    if not len(steps.tokens):
        return data.derive(turn_share=torch.zeros_like(valid))
    share = steps.spread(1.0 / steps.tokens.to(valid.dtype), valid)
    return data.derive(turn_share=share / share.sum(0).clamp_min(1.0))


def turn_mean(valid: Tensor, batch: Data) -> Tensor:
    """Mean over the tokens of a turn, then over turns, then over sequences (column ``turn_share``)."""
    return valid * batch["turn_share"] / batch["n_sequences"]


class EPORecipe(Recipe):
    """GRPO's advantages, an entropy bonus, and the corridor around the mean entropy of all iterations before."""

    fields = (Field("entropy"),)
    entropy_sum: Tensor
    count: Tensor

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__(config, parts)
        for name in ("entropy_sum", "count"):
            self.register_buffer(name, torch.zeros(()))

    def start(self, data: Data, ctx: Context) -> Data:
        """``entropy_reference``, ``smoothing_weight`` ``[N]``: one number each, which all epochs share."""
        c = self.config
        reference = self.entropy_sum / self.count.clamp_min(1.0)
        total = (1.0 / ctx.share - 1e-6).ceil()
        k = ctx.progress / ctx.share
        factor = torch.ones_like(k)
        if c.schedule != "constant":
            factor = decay_factor(k, total, c.decay) if c.schedule == "paper" else released_factor(k)
        # a mean of 0 is no corridor: every entropy would be outside
        weight = torch.where(reference > 0, c.entropy_coef * factor.to(reference), 0.0)
        width = data.shape[1]
        data = data.derive_sequence(entropy_reference=reference.repeat(width), smoothing_weight=weight.repeat(width))
        return self.with_entropy(super().start(data, ctx))

    def stages(self) -> tuple[Stage, ...]:
        return (*super().stages(), turn_shares)

    def aggregate(self) -> Aggregate:
        return turn_mean if self.config.aggregate == "turn_mean" else super().aggregate()

    def smoothing(self) -> Loss:
        """``alpha P``, to be weighted by ``lambda beta_k``."""
        c = self.config

        def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            mean = batch["entropy_reference"]
            return corridor(outputs["entropy"], mean, c.kappa_low, c.kappa_high, c.alpha, c.penalty)

        return loss

    def terms(self) -> tuple[Term, ...]:
        terms = super().terms()
        if not self.config.entropy_coef:
            return terms
        term = Term(
            "smoothing_loss", self.smoothing(), self.aggregate(), want=frozenset({"entropy"}), advantage=None,
            weight="smoothing_weight", stats=self._stats,
        )  # fmt: skip
        return (*terms, term)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """The rollout's entropy joins the history, after the update; ``rollout_entropy`` and ``entropy_reference``."""
        on = data["on"]
        valid = on["valid"] > 0
        mean = torch.where(valid, on["entropy"], 0.0).sum() / valid.sum().clamp_min(1)
        stats["rollout_entropy"], stats["entropy_reference"] = mean, on["entropy_reference"].mean()
        self.entropy_sum.add_(mean)
        self.count.add_(1.0)

    def _stats(self, ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        """``outside_corridor``: share of tokens; without a history there is no corridor."""
        c, mean = self.config, batch["entropy_reference"]
        outside = corridor(outputs["entropy"], mean, c.kappa_low, c.kappa_high, 1.0, "indicator")
        return {"outside_corridor": outside * (mean > 0)}


EPO = LLMMethod(
    "epo",
    "Xu et al. 2025, arXiv 2509.22576",
    EPOConfig,
    EPORecipe,
    {
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "clip",
        "penalty": "entropy bonus, hinge outside a corridor around the mean entropy so far",
        "aggregate": "means of turns",
    },
)
"""Entropy-regularized Policy Optimization: token entropies are held near what they have been."""
