"""Estimates of the Fisher matrix ``G [n, n]`` of scores and of its inverse.

With the second Bayesian-quadrature model (docs/bpg.md) and ``G`` from the same batch, the posterior mean is plain Monte
Carlo, rescaled; whatever the method gains comes from a ``G`` that knows more: analytic, or running over iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["AnalyticFisher", "BatchFisher", "Fisher", "FisherEstimate", "RunningFisher", "symmetric_inverse"]


class FisherEstimate(NamedTuple):
    """``G`` and ``G^-1``, ``[n, n]``."""

    matrix: Tensor
    inverse: Tensor


def symmetric_inverse(matrix: Tensor, rtol: float = 1e-10) -> Tensor:
    """The inverse of a positive semidefinite matrix; the pseudo-inverse where it is singular (eigenvalues up to
    ``rtol`` times the largest count as 0), so that scores outside its range have no kernel instead of an endless one.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(info) == 0 and bool(pivots.min() > 10.0 * rtol * pivots.max()):
        return torch.cholesky_inverse(factor)
    if not bool(matrix.isfinite().all()):
        raise FloatingPointError("Fisher matrix: expected finite entries, got NaN or infinity")
    inverse: Tensor = torch.linalg.pinv(matrix, rtol=rtol, hermitian=True)
    return inverse


class Fisher(nn.Module):
    """Base class: ``estimate(scores, weight)`` is called once per batch of scores ``[n, M]``."""

    def estimate(self, scores: Tensor, weight: Tensor | None = None) -> FisherEstimate:
        """:param weight: ``[M]``, of every sample (discounting); None: ones."""
        raise NotImplementedError


class AnalyticFisher(Fisher):
    """``G`` from a function of no arguments (it closes over the policy), evaluated at every call."""

    def __init__(self, matrix: Callable[[], Tensor]) -> None:
        super().__init__()
        self._matrix = matrix

    def estimate(self, scores: Tensor, weight: Tensor | None = None) -> FisherEstimate:
        matrix = self._matrix().to(scores)
        if matrix.shape != (scores.shape[0],) * 2:
            raise ValueError(f"AnalyticFisher: expected [{scores.shape[0]}, {scores.shape[0]}], got {matrix.shape}")
        return FisherEstimate(matrix, symmetric_inverse(matrix))


class BatchFisher(Fisher):
    """``U diag(w) U^T`` (sum) or the same over ``M`` (mean), plus ``damping I``.

    The sum makes the Fisher kernel about ``n / M`` small: next to a state kernel that is a choice, so it is explicit.
    """

    def __init__(self, reduction: Literal["sum", "mean"] = "mean", damping: float = 1e-6) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"BatchFisher: expected reduction 'sum' or 'mean', got {reduction!r}")
        if damping < 0.0:
            raise ValueError(f"BatchFisher: expected damping >= 0, got {damping}")
        self.reduction, self.damping = reduction, damping

    def estimate(self, scores: Tensor, weight: Tensor | None = None) -> FisherEstimate:
        weighted = scores if weight is None else scores * weight
        matrix = weighted @ scores.T
        if self.reduction == "mean":
            matrix = matrix / max(1, scores.shape[1])
        matrix.diagonal().add_(self.damping)
        return FisherEstimate(matrix, symmetric_inverse(matrix))


class RunningFisher(Fisher):
    """``G <- (1 - z) G + z u u^T`` over every score ever seen, its inverse by Sherman-Morrison, from ``G = I``.

    ``z = max(rate, 1 / (i + 1))`` after ``i`` scores: the identity counts as one sample, and with ``rate > 0`` old
    policies are forgotten. The identity's share stays at least ``damping``: where no score ever points (a softmax has
    such directions) ``G`` would fall to 0 and its inverse overflow. State is buffers: checkpointed.
    """

    matrix: Tensor
    inverse: Tensor
    count: Tensor
    share: Tensor

    def __init__(self, size: int, rate: float = 0.0, damping: float = 1e-6) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"RunningFisher: expected a rate in [0, 1), got {rate}")
        if damping <= 0.0:
            raise ValueError(f"RunningFisher: expected damping > 0, got {damping}")
        self.rate, self.damping = rate, damping
        self.register_buffer("matrix", torch.eye(size, dtype=torch.float64))
        self.register_buffer("inverse", torch.eye(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("share", torch.ones((), dtype=torch.float64))

    def estimate(self, scores: Tensor, weight: Tensor | None = None) -> FisherEstimate:
        if scores.shape[0] != self.matrix.shape[0]:
            raise ValueError(f"RunningFisher: expected scores [{self.matrix.shape[0]}, M], got {tuple(scores.shape)}")
        scaled = scores if weight is None else scores * weight.sqrt()
        for u in scaled.to(self.matrix).unbind(1):
            self._add(u)
        if bool(self.share < self.damping):
            self.matrix.diagonal().add_(self.damping - self.share)
            self.share.fill_(self.damping)
            self.inverse.copy_(symmetric_inverse(self.matrix, rtol=0.0))
        # copies: a covariance multiplies with them later, when the next batch has moved the running ones
        return FisherEstimate(self.matrix.to(scores, copy=True), self.inverse.to(scores, copy=True))

    def _add(self, u: Tensor) -> None:
        self.count += 1.0
        z = (1.0 / (self.count + 1.0)).clamp_min(self.rate)
        v = self.inverse @ u
        self.share.mul_(1.0 - z)
        self.matrix.mul_(1.0 - z).addr_(u, z * u)
        self.inverse.addr_(v, v * (-z / (1.0 - z + z * (u @ v)))).div_(1.0 - z)
