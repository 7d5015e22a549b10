"""Scores and denoisers of Gaussian data, exact: what learned ones and samplers are tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "dsm_optimum", "gaussian_denoiser", "gaussian_score", "mixture_log_density", "mixture_score", "mixture_velocity",
]  # fmt: skip


def gaussian_score(x: Tensor, mean: Tensor, covariance: Tensor, sigma: float | Tensor) -> Tensor:
    """``-(C + sigma^2 I)^-1 (x - m)`` of ``N(m, C)`` blurred with noise of ``sigma``; ``x [B, D]``, ``C [D, D]``."""
    blurred = covariance + torch.as_tensor(sigma).to(x) ** 2 * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    found: Tensor = -torch.linalg.solve(blurred, (x - mean).unsqueeze(-1)).squeeze(-1)
    return found


def gaussian_denoiser(x: Tensor, mean: Tensor, covariance: Tensor, sigma: float | Tensor) -> Tensor:
    """``E[clean | x]`` by Tweedie's formula, ``x + sigma^2 score``."""
    return x + torch.as_tensor(sigma).to(x) ** 2 * gaussian_score(x, mean, covariance, sigma)


def mixture_score(
    x: Tensor, weights: Tensor, means: Tensor, variances: Tensor, sigma: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The blurred score of a mixture of isotropic Gaussians, ``[B, D]``, and the responsibilities ``[B, K]``.

    :param weights: ``[K]``; :param means: ``[K, D]``; :param variances: ``[K]``.
    """
    blurred = variances + torch.as_tensor(sigma).to(x) ** 2
    away = means - x.unsqueeze(-2)
    log = weights.log() - 0.5 * away.square().sum(-1) / blurred - 0.5 * x.shape[-1] * (2.0 * math.pi * blurred).log()
    share = log.softmax(-1)
    return (share.unsqueeze(-1) * away / blurred.unsqueeze(-1)).sum(-2), share


def dsm_optimum(eigenvalues: Sequence[float], levels: Sequence[float]) -> float:
    """The least ``score_matching_loss`` of Gaussian data whose covariance has these eigenvalues, levels equally likely:
    the mean over levels of ``D - sigma^2 tr (C + sigma^2 I)^-1``."""
    losses = [len(eigenvalues) - sum(s * s / (c + s * s) for c in eigenvalues) for s in levels]
    return sum(losses) / len(losses)


def mixture_velocity(x: Tensor, time: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """``E[e - x_0 | x_t = x]`` ``[B, D]`` of straight lines from noise to a mixture of isotropic Gaussians: the exact
    velocity of ``ccrl.diffusion.flow``.

    Per component ``S = (1 - t)^2 v + t^2`` and ``E[e - x_0 | x, k] = (t - (1 - t) v) (x - (1 - t) m) / S - m``.

    :param time: ``[B]``; :param log_weights: ``[B, K]`` or ``[K]``, -inf leaves a component out.
    :param means: ``[K, D]``; :param variances: ``[K]``.
    """
    t = time.reshape(-1, 1)
    kept = 1.0 - t
    spread = kept.square() * variances + t.square()
    away = x.unsqueeze(-2) - kept.unsqueeze(-1) * means
    log = log_weights - 0.5 * away.square().sum(-1) / spread - 0.5 * x.shape[-1] * spread.log()
    share = log.softmax(-1)
    slope = share * (t - kept * variances) / spread
    return (slope.unsqueeze(-1) * away).sum(-2) - share @ means


def mixture_log_density(x: Tensor, log_weights: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """``[B]`` of ``x`` ``[B, D]`` under a mixture of isotropic Gaussians; shapes as in :func:`mixture_velocity`."""
    squared = (x.unsqueeze(-2) - means).square().sum(-1)
    log = -0.5 * squared / variances - 0.5 * x.shape[-1] * (2.0 * math.pi * variances).log()
    return torch.logsumexp(log_weights + log, -1)
