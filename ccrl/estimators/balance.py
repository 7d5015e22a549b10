"""The anchor of bounded ratio targets: target ratios of a group average to 1, as ratios of a policy do.

    rho*(x) = c_l + (c_h - c_l) sigmoid((x - mu) / lambda),   c_l = 1 - low,  c_h = 1 + high,   mean rho* = 1

The optimum of ``max E[rho Q]`` with ``c_l <= rho <= c_h`` and an entropy of strength ``lambda`` has this form, and its
``mu`` is the multiplier of ``E[rho] = 1`` (Ao et al. 2026, arXiv 2604.18578, theorem 4.1). Towards ``lambda = 0`` and
without ties it is the ``(1 - kappa)``-quantile, ``kappa = low / (low + high)``, the median for equal bounds. Among ties
a quantile leaves it free what those AT it get, and the wrong choice pushes them all: rewards (1, 0, 0, 0, 0) with
bounds 0.2 and 0.28 have the 0.58-quantile 0, so that wrong answers would get 1.04, and the mean 1.088 in place of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.estimators.groups import Groups
from ccrl.estimators.losses import bounded_target

__all__ = ["balanced_anchor", "balanced_target"]

STEPS = 100
"""Bisections: past float64's precision from any bracket."""


def balanced_anchor(
    x: Tensor, group: Tensor, low: float, high: float, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """``mu`` ``[Q]`` float64 of every group, in the order of their labels.

    :param x: values ``[N]`` that are compared: rewards, advantages, or action values.
    :param group: labels ``[N]``.
    :param weight: probabilities ``[N]`` of the mean, of any scale; None: all the same.
    :raises ValueError: unless ``0 < low <= 1``, ``high > 0`` and ``temperature > 0``.
    """
    _check(low, high, temperature)
    groups, x = Groups(group), x.double()
    w = torch.ones_like(x) if weight is None else weight.double()
    total, kappa = groups.sum(w), low / (low + high)
    # sigmoid(+-40) is 0 or 1 in float64
    least = torch.full_like(total, torch.inf).scatter_reduce(0, groups.index, x, "amin") - 40.0 * temperature
    most = torch.full_like(total, -torch.inf).scatter_reduce(0, groups.index, x, "amax") + 40.0 * temperature

    def edge(low: Tensor, high: Tensor, strict: bool) -> Tensor:
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            share = groups.sum(w * torch.sigmoid((x - middle[groups.index]) / temperature)) / total
            above = share > kappa if strict else share >= kappa  # the mean of the targets is above 1: raise the anchor
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return 0.5 * (low + high)

    # between values far apart every anchor will do, to rounding: the middle of them
    return 0.5 * (edge(least, most, True) + edge(least, most, False))


def balanced_target(
    x: Tensor, group: Tensor, low: float, high: float, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """``rho*`` ``[N]`` in the type of ``x``, with the anchors of ``balanced_anchor``; the arguments are the same."""
    anchor = balanced_anchor(x, group, low, high, temperature, weight)
    return bounded_target(x.double() - anchor[Groups(group).index], low, high, temperature).to(x.dtype)


def _check(low: float, high: float, temperature: float) -> None:
    if not (0.0 < low <= 1.0 and high > 0.0 and temperature > 0.0):
        raise ValueError(f"expected 0 < low <= 1, high > 0 and temperature > 0, got {low}, {high} and {temperature}")
