"""P3O: Pairwise Proximal Policy Optimization (Wu et al. 2023, arXiv 2310.00212).

A policy gradient on differences: two completions of one prompt, whole sequences as actions. With ``l_i`` the sum of a
completion's log-probabilities, ``o_i`` that of the policy that sampled, ``w_i = exp(l_i - o_i)``,

    R_i    = r_i - beta (o_i - log ref_i)
    grad J = E[ (R_1 - R_2) w_1 w_2 grad(l_1 - l_2) / 2 ]                               theorem 1

    separate  -1/2 sum_i min(c_i w_i, c_i clip(w_i, 1 - eps, 1 + eps)),   c_i = sg[(R_i - R_j) w_j]          P3O-V1
    joint     -1/2 min(k d, k clip(d, d_0 - eps, d_0 + eps)),  k = sg[(R_1 - R_2) w_1 w_2],  d = l_1 - l_2   P3O-V2

Inside the bounds both have the theorem's gradient, beyond them none. Whatever is added to the rewards of a prompt
cancels: no baseline, no critic. More than two completions make all their pairs; on policy that is RLOO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from agents.llm.agent import LLMMethod
from agents.llm.reinforce import RewardKLRecipe
from ccrl.data import Data
from ccrl.estimators import ratios
from ccrl.estimators.base import Stage
from ccrl.estimators.losses import cut_ratio
from ccrl.estimators.recipe import MethodConfig
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.settings import Count, Nonnegative, Range

__all__ = ["P3O", "P3OConfig", "P3ORecipe", "joint", "separate"]


@dataclass(frozen=True)
class P3OConfig(MethodConfig):
    """Two completions per prompt as published; bound, weight of the KL and epochs are not known."""

    unread: ClassVar[tuple[str, ...]] = ("clip_low", "clip_high")
    group_size: Count = 2
    """A prompt has this many completions, which make all their pairs."""
    n_epochs: Count = 2
    """The update passes this many times over each rollout; with one the bounds are never met."""
    kl_coef: Nonnegative = 0.1
    """The sampled KL to the reference is subtracted from the reward of a completion with this weight; 0 keeps none."""
    form: Literal["joint", "separate"] = "joint"
    """What is bounded is the change of a pair's log-odds (joint, V2), or each completion's ratio (separate, V1)."""
    clip_range: Annotated[float, Range(0.0, above=True, also=(math.inf,))] = 0.2
    """Log-odds (joint) or ratios (separate) have no gradient once they moved further than this in the direction that
    improves; inf bounds none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError("group_size: expected at least two completions per prompt (there is no pair else), got 1")
        if self.microbatch % self.group_size:
            raise ValueError(f"microbatch: expected a multiple of group_size = {self.group_size} (pairs must not be "
                             f"split), got {self.microbatch}")  # fmt: skip


# -- losses -----------------------------------------------------------------------------------------------------------


def _pairs(ratio: LogRatio, reward: Tensor, batch: Data) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, B]`` differences of reward, row minus column, 0 where the two are no pair; whether they are one; ``[B]``:
    how many pairs, in both orders, the column's prompt has (at least 1)."""
    group, present = batch["group"], ratio.valid.squeeze(0) > 0
    pair = (group.unsqueeze(1) == group) & present.unsqueeze(1) & present
    members = pair.sum(1)
    pair = pair & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    gap = torch.where(pair, reward.unsqueeze(1) - reward, 0.0)
    return gap, pair, (members * (members - 1)).clamp_min(1)


def separate(eps: float) -> Loss:
    """P3O-V1 on whole sequences ``[1, B]``: summed over a prompt, the mean over its pairs."""

    def loss(ratio: LogRatio, reward: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        gap, _, count = _pairs(ratio, reward, batch)
        cut = cut_ratio(ratio).squeeze(0)
        weight = gap * cut.detach()  # the other's ratio, a constant: the product rule would count it twice
        up, down = weight.clamp_min(0.0).sum(1), weight.clamp_max(0.0).sum(1)
        bounded = up * cut.clamp(max=1.0 + eps) + down * cut.clamp(min=1.0 - eps)
        return -(bounded / count).unsqueeze(0)

    return loss


def joint(eps: float) -> Loss:
    """P3O-V2 on whole sequences ``[1, B]``: summed over a prompt, the mean over its pairs."""

    def loss(ratio: LogRatio, reward: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        gap, pair, count = _pairs(ratio, reward, batch)
        cut = cut_ratio(ratio).squeeze(0).detach()
        weight = gap * cut.unsqueeze(1) * cut
        now, old = ratio.log_prob.squeeze(0), ratio.log_ref.squeeze(0)
        odds, before = (torch.where(pair, x.unsqueeze(1) - x, 0.0) for x in (now, old))
        bounded = before + (odds - before).clamp(-eps, eps)
        return -0.5 * (torch.minimum(weight * odds, weight * bounded).sum(1) / count).unsqueeze(0)

    return loss


FORMS = {"joint": joint, "separate": separate}


def prompt_mean(valid: Tensor, batch: Data) -> Tensor:
    """Sum over a prompt's completions, mean over prompts."""
    return valid / batch["n_groups"]


# -- recipe -----------------------------------------------------------------------------------------------------------


class P3ORecipe(RewardKLRecipe):
    """Pairs of whole completions. The column ``advantage`` is what the loss comes to on policy: leave one out."""

    unit = "group"
    ratio = staticmethod(ratios.sequence_product)

    def stages(self) -> tuple[Stage, ...]:
        return (*self.shaping(), GroupBaseline(self.reward_column, "leave_one_out", single="zero"))

    def loss(self) -> Loss:
        return FORMS[self.config.form](self.config.clip_range)

    def terms(self) -> tuple[Term, ...]:
        term = Term(
            "pairwise_loss", self.loss(), prompt_mean, type(self).ratio, advantage=self.reward_column, stats=self._stats
        )
        return (term, *self.penalties())

    def _stats(self, ratio: LogRatio, reward: Tensor, outputs: Outputs, batch: Data) -> dict[str, Tensor]:
        """Means over prompts: size of a pair's difference in reward, share of pairs (joint) or completions (separate)
        beyond the bound, and of completions' sampled KL."""
        c, (gap, pair, count) = self.config, _pairs(ratio, reward, batch)
        members = (pair.sum(1) + 1).clamp_min(1)
        log_ratio = ratio.log_ratio.squeeze(0)
        change = torch.where(pair, log_ratio.unsqueeze(1) - log_ratio, 0.0)
        outside = (
            (change.abs() > c.clip_range).sum(1) / count
            if c.form == "joint"
            else ((cut_ratio(ratio).squeeze(0) - 1.0).abs() > c.clip_range) / members
        )
        found = {
            "pair_difference": gap.abs().sum(1) / count,
            "clip_fraction": outside,
            "approx_kl": (cut_ratio(ratio).squeeze(0) - 1.0 - log_ratio) / members,
        }
        return {name: value.to(gap.dtype).unsqueeze(0) for name, value in found.items()}


P3O = LLMMethod(
    "p3o",
    "Wu et al. 2023, arXiv 2310.00212",
    P3OConfig,
    P3ORecipe,
    {
        "reward": "k1",
        "advantage": "differences of pairs",
        "ratio": "sequence product",
        "loss": "clip of a pair's log-odds or of each ratio",
        "aggregate": "mean over pairs",
    },
)
"""Pairwise Proximal Policy Optimization (Wu et al. 2023)."""
