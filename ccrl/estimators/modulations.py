"""The stabilisation slot of the unified policy gradient as a number per element (Lv et al. 2025, arXiv 2509.04419).

    grad = M * (1 / pi_ref) * A * grad pi_theta        loss = -sg(M A) exp(log pi_theta - sg(log pi_ref))

A mask is 0 or 1; a shaping function's slope is any number, so the slot is a float. The ratio slot says what ``pi_ref``
is: the behaviour policy, the policy itself (``ratios.plain``), or 1 (a ``log_prob`` column of zeros: demonstrations).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.terms import LogRatio, Loss, Outputs

__all__ = ["Modulation", "cispo_mask", "clip_mask", "clipped_weight", "modulated", "shaping"]

Modulation = Callable[[LogRatio, Tensor, Data], Tensor]
"""From a log-ratio, advantages and the batch to ``M`` per element; no gradient flows through it."""


def modulated(modulation: Modulation) -> Loss:
    """``-M A exp(log pi - log pi_ref)`` with ``M`` from a function."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return -modulation(ratio, advantage, batch).detach() * advantage * ratio.ratio

    return loss


def clip_mask(low: float, high: float) -> Modulation:
    """PPO's clip: 0 where the ratio has left ``[1 - low, 1 + high]`` on the advantage's side. With
    ``ratios.sequence_token`` it is GSPO's."""

    def mask(ratio: LogRatio, advantage: Tensor, batch: Data) -> Tensor:
        rho = ratio.ratio
        outside = ((advantage > 0) & (rho > 1.0 + high)) | ((advantage < 0) & (rho < 1.0 - low))
        return (~outside).to(rho.dtype)

    return mask


def cispo_mask(low: float, high: float) -> Modulation:
    """CISPO as the table of the paper reads it: 0 wherever the clipped weight is saturated. ``losses.cispo`` is the
    method as published, which keeps a bounded gradient there."""

    def mask(ratio: LogRatio, advantage: Tensor, batch: Data) -> Tensor:
        rho = ratio.ratio
        return ((rho >= 1.0 - low) & (rho <= 1.0 + high)).to(rho.dtype)

    return mask


def clipped_weight(low: float, high: float) -> Modulation:
    """CISPO as published in this form: with ``ratios.plain``, the clipped ratio to the behaviour policy."""

    def weight(ratio: LogRatio, advantage: Tensor, batch: Data) -> Tensor:
        log_ratio = torch.where(ratio.valid > 0, ratio.log_prob.detach() - batch["log_prob"], 0.0)
        return log_ratio.exp().clamp(1.0 - low, 1.0 + high)

    return weight


def shaping(gamma: float) -> Modulation:
    """LUFFY's ``f'(u) = gamma / (u + gamma)^2`` for ``f(u) = u / (u + gamma)``, ``u`` the term's ratio (``pi_theta``
    where the denominator is 1): unlikely tokens of a demonstration get the gradient that the denominator takes away.

    :raises ValueError: unless gamma > 0.
    """
    if gamma <= 0:
        raise ValueError(f"shaping: expected gamma > 0, got {gamma}")
    return lambda ratio, advantage, batch: gamma / (ratio.ratio + gamma).square()
