"""Bayesian quadrature of the policy gradient over whole paths (docs/bpg.md derives it).

``grad eta = int R(xi) u(xi) Pr(xi) dxi`` with path scores ``u``. Model 1 puts a Gaussian process on ``R u`` (known:
``Pr``), model 2 on ``R`` (known: ``u Pr``). Kernels are chosen so that the integrals are closed form::

             kernel k                       b                  b0            mean       covariance
    model 1  s (1 + u_i^T G^-1 u_j)^2 + c   s (1 + u_i^T G^-1 u_i) + c   s (1 + n) + c   U y C b    (b0 - b^T C b) I
    model 2  s u_i^T G^-1 u_j + c           s U                s G           s U C y    s G - s^2 U C U^T

with ``C = (K + sigma^2 I)^-1``. The constant ``c`` learns the mean return: ``int grad Pr = 0``, so model 2's ``b`` does
not see it, and equal returns no longer look like a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ccrl.gp.fisher import FisherEstimate
from ccrl.gp.posterior import Covariance, Posterior
from ccrl.gp.solve import Cholesky, LowRank, Solver
from ccrl.gp.sparsify import ald

__all__ = ["ZERO_SCORE", "model1", "model2"]

ZERO_SCORE = 1e-12
"""Paths whose score is shorter say nothing about the gradient (a saturated policy) and are dropped."""


def model1(
    scores: Tensor,
    returns: Tensor,
    fisher: FisherEstimate,
    noise: float,
    *,
    amplitude: float = 1.0,
    constant: float = 0.0,
    sparsity: float | None = None,
) -> Posterior:
    """Posterior under model 1 from scores ``[n, M]`` and returns ``[M]``.

    :param noise: variance ``sigma^2`` of the observation noise.
    :param sparsity: threshold of the approximate linear dependence test; None: all paths.
    :raises ValueError: shapes or numbers that do not fit.
    """
    from ccrl.gp.kernels import QuadraticFisherKernel

    _check(scores, returns, fisher, noise, amplitude, constant)
    scores, returns = _informative(scores, returns)
    n = scores.shape[0]
    solver, project = _system(QuadraticFisherKernel(fisher.inverse), scores, noise, amplitude, constant, sparsity)
    b = project(amplitude * (1.0 + (scores * (fisher.inverse @ scores)).sum(0)) + constant)
    weights = solver.solve(b)
    variance = amplitude * (1.0 + n) + constant - b @ weights
    mean = scores @ (returns * weights)
    return Posterior(mean, Covariance(n, lambda v: variance * v, mean))


def model2(
    scores: Tensor,
    returns: Tensor,
    fisher: FisherEstimate,
    noise: float,
    *,
    amplitude: float = 1.0,
    constant: float = 0.0,
    sparsity: float | None = None,
) -> Posterior:
    """Posterior under model 2; parameters as of :func:`model1`."""
    from ccrl.gp.kernels import FisherKernel

    _check(scores, returns, fisher, noise, amplitude, constant)
    scores, returns = _informative(scores, returns)
    solver, project = _system(FisherKernel(fisher.inverse), scores, noise, amplitude, constant, sparsity)
    b = amplitude * project(scores)

    def product(v: Tensor) -> Tensor:
        return amplitude * (fisher.matrix @ v) - b @ solver.solve(b.T @ v)

    mean = b @ solver.solve(returns)
    return Posterior(mean, Covariance(scores.shape[0], product, mean))


def _system(
    kernel: Any, scores: Tensor, noise: float, amplitude: float, constant: float, sparsity: float | None
) -> tuple[Solver, Callable[[Tensor], Tensor]]:
    """``K + sigma^2 I`` and what the kernel's integrals ``[..., M]`` become on the dictionary.

    With a dictionary ``K`` is ``A K~ A^T`` and ``b`` is ``A b~``: matrices of the size of the dictionary only.
    """
    x = scores.T
    if sparsity is None:
        gram = amplitude * kernel(x).to_dense() + constant
        gram.diagonal().add_(noise)
        return Cholesky(gram), lambda b: b
    diagonal = amplitude * kernel(x, diag=True) + constant
    dictionary = ald(lambda i: amplitude * kernel(x, x[i : i + 1]).to_dense()[:, 0] + constant, diagonal, sparsity)
    a, index = dictionary.coefficients, dictionary.index
    return LowRank(a @ Cholesky(dictionary.gram).factor, noise), lambda b: b[..., index] @ a.T


def _informative(scores: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    keep = scores.norm(dim=0) >= ZERO_SCORE
    return scores[:, keep], returns[keep].to(scores)


def _check(
    scores: Tensor, returns: Tensor, fisher: FisherEstimate, noise: float, amplitude: float, constant: float
) -> None:
    if scores.dim() != 2 or returns.shape != scores.shape[1:]:
        raise ValueError(
            f"quadrature: expected scores [n, M] and returns [M], got {tuple(scores.shape)}, {tuple(returns.shape)}"
        )
    if fisher.inverse.shape != (scores.shape[0],) * 2:
        raise ValueError(f"quadrature: expected G^-1 of size {scores.shape[0]}, got {tuple(fisher.inverse.shape)}")
    if noise <= 0.0 or amplitude <= 0.0 or constant < 0.0:
        raise ValueError(
            f"quadrature: expected noise > 0, amplitude > 0, constant >= 0, got {noise}, {amplitude}, {constant}"
        )
