"""How many completions each prompt gets: a total divided among prompts so that a sum of values is largest.

    max sum_i value(N_i, p_i)    subject to    sum_i N_i = total,  low <= N_i <= high

by dynamic programming, exact whatever the values, or greedily by the largest next gain: exact where ``value`` is
concave in ``N``, as ``gradient_value`` is from 1 on (docs/llm/knapsack_rl.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Solver", "Value", "allocate", "gradient_probability", "gradient_value", "information_gain", "knapsack",
           "spread"]  # fmt: skip

Value = Callable[[Tensor, Tensor], Tensor]
"""``value(n, p)`` of ``n`` completions of a prompt with success rate ``p``; broadcast, float64."""
Solver = Literal["dp", "greedy"]


def gradient_probability(n: Tensor, p: Tensor) -> Tensor:
    """``1 - p^n - (1 - p)^n``: that ``n`` completions are neither all right nor all wrong, so that a group baseline
    leaves a gradient (Li et al. 2025, arXiv 2509.25849). 0 for none, which are both."""
    return (1.0 - p**n - (1.0 - p) ** n).clamp_min(0.0)


def information_gain(p: Tensor) -> Tensor:
    """``p (1 - p)^2``: what a gradient step on a success is worth to the success rate (Li et al. 2025); at most 4/27,
    at ``p = 1/3``."""
    return p * (1.0 - p).square()


def gradient_value(n: Tensor, p: Tensor) -> Tensor:
    """``gradient_probability(n, p) * information_gain(p)`` (Li et al. 2025): concave in ``n`` from 1 on; a
    division that may leave a prompt out (``low = 0``) wants ``dp``."""
    return gradient_probability(n, p) * information_gain(p)


def allocate(p: Tensor, total: int, low: int, high: int, value: Value, solver: Solver = "greedy") -> Tensor:
    """Completions ``[Q]`` int64 of prompts with success rates ``p`` ``[Q]``: exactly ``total`` together.

    :raises ValueError: rates outside 0 to 1, or bounds that no division of ``total`` can keep.
    """
    count = len(p)
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"p: expected rates from 0 to 1, got {p.tolist()}")
    if not 0 <= low <= high or not low * count <= total <= high * count:
        raise ValueError(f"expected 0 <= low <= high and {count} prompts of low to high completions that can sum to "
                         f"total, got low={low}, high={high}, total={total}; lower low, raise high or change the "
                         "total")  # fmt: skip
    n = torch.arange(low, high + 1, dtype=torch.float64, device=p.device)
    table = value(n, p.detach().double().unsqueeze(1))
    return low + knapsack(table, total - low * count, solver)


def knapsack(table: Tensor, units: int, solver: Solver = "dp") -> Tensor:
    """``[Q]`` int64 summing to ``units``, entries up to ``K``, for which the sum of ``table[i, entry_i]`` is largest.

    :param table: ``[Q, K + 1]``: what 0 to ``K`` units are worth to each.
    :param solver: ``greedy`` is exact where the rows are concave; of equal gains it takes the smaller allocation's.
    :raises ValueError: more units than fit.
    """
    count, most = table.shape[0], table.shape[1] - 1
    if not 0 <= units <= count * most:
        raise ValueError(f"units: expected 0 to {count * most} for {count} rows of up to {most}, got {units}")
    table, device = table.detach().double(), table.device
    if solver == "greedy":
        # rounding may make a later gain the larger one, which would be taken without those before it
        gain = table.diff(dim=1).cummin(1).values if most else table[:, :0]
        order = gain.t().flatten().argsort(descending=True, stable=True)[:units]
        return torch.bincount(order % max(count, 1), minlength=count)
    best = torch.full((units + 1,), -torch.inf, dtype=torch.float64, device=device)
    best[0] = 0.0
    choice = torch.empty(count, units + 1, dtype=torch.int64, device=device)
    for i in range(count):
        before = F.pad(best, (most, 0), value=-torch.inf).unfold(0, most + 1, 1).flip(1)  # [units + 1, K + 1]
        best, choice[i] = (before + table[i]).max(1)
    found, left = torch.zeros(count, dtype=torch.int64, device=device), units
    for i in reversed(range(count)):
        found[i] = choice[i, left]
        left -= int(found[i])
    return found


def spread(counts: Tensor, among: Tensor, units: int, high: int) -> Tensor:
    """``counts`` ``[Q]`` with up to ``units`` more, as evenly as they go, on those of ``among`` ``[Q]`` (bool) that
    have fewer than ``high``; what does not fit is left out."""
    counts = counts.clone()
    while units > 0 and bool((room := among & (counts < high)).any()):
        open_ = room.nonzero().squeeze(-1)
        share = units // len(open_)
        more = (
            torch.full_like(open_, share) if share else (torch.arange(len(open_), device=open_.device) < units).long()
        )
        more = more.minimum(high - counts[open_])
        counts[open_] += more
        units -= int(more.sum())
    return counts
