"""``(K + sigma^2 I)^-1 b`` in three ways: exact, conjugate gradients, low rank. Float64, gradients detached by callers.

The tolerance of the conjugate gradients is an argument of the solve. GPyTorch's own default (1.0 in training) put
gradients of 2,000 transitions off by 30 %, so anything above 1e-4 is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CG", "MAX_TOLERANCE", "Cholesky", "LowRank", "Solver", "pivoted_cholesky"]

MAX_TOLERANCE = 1e-4


class Solver(Protocol):
    """A positive definite matrix ``A [N, N]`` that can be solved with."""

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``b [N]`` or ``[N, k]``."""
        ...


def _columns(b: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
    return solve(b.unsqueeze(-1)).squeeze(-1) if b.dim() == 1 else solve(b)


class Cholesky:
    """The exact factor of a dense matrix.

    A matrix that rounding made indefinite gets a jitter of 1e-8 times its mean diagonal, then ten times more, up to
    1e-4 times (``jitter`` tells how much was needed).

    :raises FloatingPointError: a matrix that is not finite, or still indefinite with the largest jitter.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"Cholesky: expected a square matrix [N, N], got {tuple(matrix.shape)}")
        mean = float(matrix.detach().diagonal().mean()) if matrix.shape[0] else 0.0
        for level in (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4):
            self.jitter = level * mean
            shifted = matrix if level == 0.0 else matrix + torch.diag_embed(self.jitter * matrix.new_ones(len(matrix)))
            self.factor, info = torch.linalg.cholesky_ex(shifted)
            if int(info) == 0 and bool(self.factor.diagonal().isfinite().all()):
                return
        raise FloatingPointError(
            f"Cholesky: expected a positive definite matrix, got one of size {len(matrix)} that is indefinite with a "
            f"jitter of {self.jitter:.3g} or not finite; use a larger noise variance"
        )

    def solve(self, b: Tensor) -> Tensor:
        return _columns(b, lambda x: torch.cholesky_solve(x, self.factor))


class LowRank:
    """``R R^T + noise I`` with ``R [N, r]``, by Woodbury: ``O(N r^2)`` and no ``[N, N]`` matrix."""

    def __init__(self, root: Tensor, noise: float | Tensor) -> None:
        if not float(noise) > 0.0:
            raise ValueError(f"LowRank: expected a noise variance > 0, got {float(noise)}")
        self.root, self.noise = root, noise
        inner = root.T @ root
        inner.diagonal().add_(noise)
        self.inner = Cholesky(inner)

    def solve(self, b: Tensor) -> Tensor:
        return (b - self.root @ self.inner.solve(self.root.T @ b)) / self.noise


class CG:
    """Preconditioned conjugate gradients; every column stops at ``|r| <= tolerance |b|``.

    :param matvec: ``A x`` for ``x [N, k]``.
    :param preconditioner: an approximation of ``A`` to solve with, e.g. ``LowRank(pivoted_cholesky(...), noise)``.
    :raises ValueError: a tolerance above 1e-4.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 10_000,
        preconditioner: Solver | None = None,
    ) -> None:
        if not 0.0 < tolerance <= MAX_TOLERANCE:
            raise ValueError(
                f"CG: expected a tolerance in (0, {MAX_TOLERANCE}], got {tolerance}: looser ones give wrong gradients"
            )
        if max_iterations < 1:
            raise ValueError(f"CG: expected max_iterations >= 1, got {max_iterations}")
        self.matvec, self.tolerance, self.max_iterations = matvec, tolerance, max_iterations
        self._precondition = (lambda x: x) if preconditioner is None else preconditioner.solve
        self.iterations = 0
        """Of the last solve."""

    def solve(self, b: Tensor) -> Tensor:
        """:raises FloatingPointError: not converged after ``max_iterations``, or numbers that are not finite."""
        return _columns(b, self._solve)

    def _solve(self, b: Tensor) -> Tensor:
        x, r = torch.zeros_like(b), b.clone()
        limit = self.tolerance * b.norm(dim=0)
        z = self._precondition(r)
        p, rz = z, (r * z).sum(0)
        self.iterations = 0
        # not "while some residual is above": NaN is above nothing, and 0 would be the solution
        while not bool((r.norm(dim=0) <= limit).all()):
            if self.iterations == self.max_iterations or not bool(r.isfinite().all()):
                worst = float((r.norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)).max())
                raise FloatingPointError(
                    f"CG: expected a relative residual of {self.tolerance:g}, got {worst:.2g} after {self.iterations} "
                    "iterations; use a preconditioner, more noise or the exact solver"
                )
            product = self.matvec(p)
            curvature = (p * product).sum(0)
            # a column that is solved exactly has p = 0: it stays where it is
            step = torch.where(curvature > 0, rz / curvature.clamp_min(1e-300), 0.0)
            x, r = x + step * p, r - step * product
            z = self._precondition(r)
            new = (r * z).sum(0)
            p, rz = z + torch.where(rz > 0, new / rz.clamp_min(1e-300), 0.0) * p, new
            self.iterations += 1
        return x


def pivoted_cholesky(column: Callable[[int], Tensor], diagonal: Tensor, rank: int, tolerance: float = 0.0) -> Tensor:
    """``R [N, r]`` with ``R R^T`` near ``K``: greedy on the largest remaining diagonal, ``r <= rank``.

    :param column: ``K[:, i]``.
    :param diagonal: of ``K``, ``[N]``.
    :param tolerance: stop once the trace of the rest is below this share of the trace of ``K``.
    """
    rest = diagonal.clone()
    total = float(rest.sum())
    root = diagonal.new_zeros(diagonal.shape[0], min(rank, diagonal.shape[0]))
    for j in range(root.shape[1]):
        best = int(rest.argmax())
        # below rounding a further column would be noise divided by noise
        if float(rest.sum()) <= max(tolerance, 1e-14) * total or float(rest[best]) <= 1e-14 * total:
            return root[:, :j]
        new = (column(best) - root[:, :j] @ root[best, :j]) / rest[best].sqrt()
        root[:, j] = new
        rest = (rest - new.square()).clamp_min(0.0)
    return root
