"""REAL: Rewards as Labels (Zhai et al. 2026, arXiv 2602.05630).

A right completion is a positive example, a wrong one a negative, and its length-normalised log-ratio the logit:

    s_i   = (1 / |o_i|) sum_t (log pi - log pi_old)
    L_k   = log(1 + sum_{i right} e^{-s_i / tau}) + log(1 + sum_{j wrong} e^{s_j / tau})       per prompt k
    loss  = (1 / prompts) sum of L_k over prompts with both labels
    |d L_k / d s_i| < 1 / tau,  falling in s_i where right, rising where wrong

The 1 is an anchor of logit 0: right completions are pushed above what they were, wrong ones below. There is no
advantage, no clip. Works on control episodes too; their rewards are no labels, so take ``labels="group_mean"``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.agent import LLMMethod
from ccrl.data import Data
from ccrl.estimators import ratios
from ccrl.estimators.base import Stage
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Positive

__all__ = ["REAL", "Labels", "REALConfig", "REALRecipe", "anchored", "bce", "group_mean", "product"]


@dataclass(frozen=True)
class REALConfig(MethodConfig):
    """The released settings. ``batch_size`` counts prompts."""

    search: ClassVar[dict[str, Any]] = {"tau": {"around": 4}}
    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    tau: Positive = 0.5
    """The logits have this temperature: gradient weights stay below 1 / tau."""
    comparison: Literal["anchored", "bce", "product"] = "anchored"
    """The loss is the paper's (anchored), or an ablation: every completion on its own (bce), or right against wrong
    without an anchor (product)."""
    labels: Literal["binary", "group_mean"] = "binary"
    """Reward 1 is right, 0 is wrong and others are left out (binary), or right is what is above its group's mean
    (group_mean, the same where rewards are 0 and 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.microbatch % self.group_size:
            raise ValueError(
                f"microbatch: expected a multiple of group_size = {self.group_size}, got {self.microbatch}; the loss "
                "compares the completions of a prompt"
            )
        if self.comparison == "bce" and self.microbatch:
            raise ValueError("microbatch: expected 0 with comparison='bce', which divides by the examples of the batch")


@dataclass(frozen=True)
class Labels:
    """``label`` ``[N]``: 1 right, 0 wrong, -1 neither, from ``episode_reward`` ``[N]``."""

    rule: str = "binary"

    def __call__(self, data: Data) -> Data:
        reward = data["episode_reward"]
        if self.rule == "group_mean":
            right = GroupBaseline(single="zero").advantages(reward, data["group"]) > 0
            return data.derive_sequence(label=right.to(reward.dtype))
        label = torch.where((reward == 0) | (reward == 1), reward, torch.full_like(reward, -1.0))
        return data.derive_sequence(label=label)


def _sides(ratio: LogRatio, batch: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[B, B]`` bool: who is a right, who a wrong member of the row's group; ``[B]`` bool: whose group has both (and
    who is itself a member); ``[B]``: members of the row's group. Columns without a valid step are members of none."""
    label, group, present = batch["label"], batch["group"], ratio.valid.squeeze(0) > 0
    together = group.unsqueeze(1) == group
    right, wrong = together & (present & (label == 1)), together & (present & (label == 0))
    member = present & (label >= 0)
    both = member & right.any(1) & wrong.any(1)
    return right, wrong, both, (right | wrong).sum(1)


def _log_sum(logit: Tensor, chosen: Tensor) -> Tensor:
    """``log sum_j exp(logit_j)`` over the chosen of each row; without any -inf, and no gradient."""
    return torch.logsumexp(torch.where(chosen, logit, -torch.inf), 1)


def _shared(loss: Tensor, both: Tensor, members: Tensor) -> Tensor:
    """A group's loss ``[B]`` (the same for its members) split evenly among them, so that the sum is each group once."""
    share = torch.where(both, loss, torch.zeros_like(loss)) / members.clamp_min(1)
    return share.unsqueeze(0)


def anchored(tau: float) -> Loss:
    """The paper's loss on sequence-level logits ``[1, B]``."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        logit = ratio.log_ratio.squeeze(0) / tau
        right, wrong, both, members = _sides(ratio, batch)
        # softplus(log sum) is log(1 + sum); softplus(-inf) is 0 but has no gradient, hence the anchor as a column
        anchor, always = logit.new_zeros(1), torch.ones_like(both).unsqueeze(1)
        push = _log_sum(torch.cat([anchor, -logit]), torch.cat([always, right], 1))
        pull = _log_sum(torch.cat([anchor, logit]), torch.cat([always, wrong], 1))
        return _shared(push + pull, both, members)

    return loss


def product(tau: float) -> Loss:
    """Ablation: ``log(1 + sum_wrong e^{s / tau} sum_right e^{-s / tau})``, right against wrong without an anchor."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        logit = ratio.log_ratio.squeeze(0) / tau
        right, wrong, both, members = _sides(ratio, batch)
        # rows without both labels compare everything with everything: finite, and left out below
        some = ~both.unsqueeze(1)
        pair = _log_sum(logit, wrong | some) + _log_sum(-logit, right | some)
        return _shared(F.softplus(pair), both, members)

    return loss


def bce(tau: float) -> Loss:
    """Ablation: binary cross-entropy of every completion, averaged over those of prompts with both labels."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        logit = ratio.log_ratio.squeeze(0) / tau
        *_, both, _ = _sides(ratio, batch)
        target = batch["label"].clamp_min(0).to(logit.dtype)
        element = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
        # the aggregation divides by the prompts
        element = torch.where(both, element, torch.zeros_like(element)) * batch["n_groups"]
        return (element / both.sum().clamp_min(1)).unsqueeze(0)

    return loss


def group_mean(valid: Tensor, batch: Data) -> Tensor:
    """Sum divided by all prompts of the optimiser batch, also those without both labels."""
    return valid / batch["n_groups"]


COMPARISONS = {"anchored": anchored, "bce": bce, "product": product}


def _stats(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
    """Share of prompts with both labels."""
    *_, both, members = _sides(ratio, batch)
    return {"compared_prompts": _shared(torch.ones_like(ratio.valid).squeeze(0), both, members)}


class REALRecipe(Recipe):
    """Labels in place of advantages, one classification loss per prompt."""

    unit = "group"
    ratio = staticmethod(ratios.sequence)

    def stages(self) -> tuple[Stage, ...]:
        return (Labels(self.config.labels),)

    def loss(self) -> Loss:
        return COMPARISONS[self.config.comparison](self.config.tau)

    def terms(self) -> tuple[Term, ...]:
        term = self.policy_term(self.loss(), aggregate=group_mean, advantage=None)
        return (replace(term, name="classification_loss", stats=_stats), *self.penalties())


REAL = LLMMethod(
    "real",
    "Zhai et al. 2026, arXiv 2602.05630",
    REALConfig,
    REALRecipe,
    {
        "advantage": "none: labels",
        "ratio": "sequence, mean log-ratio",
        "aggregate": "mean over prompts",
        "loss": "anchored log-sum-exp per prompt",
    },
)
"""Rewards as Labels: completions of a prompt are classified by their log-ratio, with bounded gradients."""
