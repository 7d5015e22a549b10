"""Pairs of a preferred and a rejected sequence: the ratio of a pair, its losses, and pairs made of groups.

A pair is a group of two columns told apart by the column ``preferred`` ``[N]`` (+1, -1); a group without a pair has 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ccrl.data import Data, masked
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Ratio

__all__ = ["best_and_worst", "dpo", "ipo", "pair", "per_pair"]


def pair(mean: bool = False) -> Ratio:
    """A pair's log-ratio ``(logp_w - ref_w) - (logp_l - ref_l)`` on the column of the preferred sequence, ``[1, B]``,
    not valid elsewhere; log-probabilities are summed over tokens, or averaged with ``mean`` (TRL's IPO)."""

    def ratio(evaluation: Outputs, batch: Data) -> LogRatio:
        valid, group = batch["valid"], batch["group"]
        # a padded column repeats a member of a pair: without valid rows it is in none
        sign = batch["preferred"].to(valid.dtype) * (valid > 0).any(0)
        count = valid.sum(0).clamp_min(1.0) if mean else torch.ones_like(sign)
        partners = (group.unsqueeze(0) == group.unsqueeze(1)).to(valid.dtype)

        def signed(log_prob: Tensor) -> Tensor:
            total = masked(log_prob, valid).sum(0)
            return ((sign * total / count) @ partners).unsqueeze(0)

        whole = (sign > 0) & ((sign < 0).to(valid.dtype) @ partners > 0)
        return LogRatio(
            signed(evaluation["log_prob"]), signed(batch["ref_log_prob"]), whole.to(valid.dtype).unsqueeze(0)
        )

    return ratio


def dpo(beta: float) -> Loss:
    """``-log sigmoid(beta D)`` of a pair's log-ratio ``D`` (Rafailov et al. 2023, eq. 7)."""

    def loss(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
        return -F.logsigmoid(beta * level.log_ratio)

    return loss


def ipo(tau: float) -> Loss:
    """``(D - 1 / (2 tau))^2`` (Azar et al. 2023, eq. 17): a margin to reach, not one to grow for ever."""

    def loss(level: LogRatio, advantage: Tensor, evaluation: Outputs, batch: Data) -> Tensor:
        return (level.log_ratio - 0.5 / tau).square()

    return loss


def per_pair(valid: Tensor, batch: Data) -> Tensor:
    """Mean over the pairs of the batch."""
    return valid / batch["n_groups"]


def best_and_worst(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ``[P]`` int64 of the highest and of the lowest reward ``[N]`` of every group ``[N]`` where they differ.
    Among equals the first counts: samples of one prompt are exchangeable."""
    order = reward.argsort(stable=True)
    descending = reward.argsort(stable=True, descending=True)
    worst = _first_of_groups(order, group)
    best = _first_of_groups(descending, group)
    differ = reward[best] > reward[worst]
    return best[differ], worst[differ]


def _first_of_groups(order: Tensor, group: Tensor) -> Tensor:
    """Of the columns in ``order`` the first of every group, groups ascending."""
    by_group = order[group[order].argsort(stable=True)]
    _, counts = torch.unique(group, return_counts=True)
    return by_group[counts.cumsum(0) - counts]
