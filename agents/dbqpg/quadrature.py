"""The linear algebra of deep Bayesian quadrature, through products with the scores alone.

With scores ``U [n, N]``, ``G = U U^T / N`` and ``W = (c1 K_s + c2 K_F + sigma^2 I)^-1``, the gradient is ``c2 U W A``
for targets ``A [N]`` and its covariance ``S = c2 G - c2^2 U W U^T``.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ccrl.gp.lowrank import Product
from ccrl.gp.solve import CG, MAX_TOLERANCE, Cholesky, LowRank, Solver, pivoted_cholesky

__all__ = ["GradientSystem", "StateGram"]

NYSTROEM_RANK = 300
"""Largest rank of the state kernel's factor in the low-rank solver."""
PRECONDITIONER_RANK = 50
EXACT_ALWAYS, EXACT_UP_TO = 500, 4000
"""Points up to which ``auto`` takes Cholesky without a look at the kernel, and where the kernel has no low rank."""


class StateGram:
    """``K_s [N, N]`` of fixed points ``[N, d]`` under a GPyTorch kernel; nothing is evaluated that nobody asks for."""

    def __init__(self, kernel: Any, points: Tensor) -> None:
        self._kernel, self.points = kernel, points

    @property
    def size(self) -> int:
        return self.points.shape[0]

    @cached_property
    def dense(self) -> Tensor:
        matrix: Tensor = self._kernel(self.points).to_dense()
        return matrix

    @property
    def diagonal(self) -> Tensor:
        diagonal: Tensor = self._kernel(self.points, diag=True)
        return diagonal

    def column(self, i: int) -> Tensor:
        """``K_s[:, i]``."""
        column: Tensor = self._kernel(self.points, self.points[i : i + 1]).to_dense()
        return column.squeeze(-1)


class GradientSystem:
    """One batch's gradient, its covariance and the inverse covariance of its natural gradient.

    :param up, down: ``U w`` for ``w [N, k]`` and ``U^T v`` for ``v [n, k]``.
    :param right: leading right singular vectors of U, ``[N, r]``; ``K_F = N V V^T``.
    :param c1, c2, noise: amplitudes of the kernels and noise variance.
    :param solver: ``exact``; ``cg``, preconditioned with a factor of the state kernel of rank 50; ``low_rank``, with a
        factor of rank up to 300 and no ``[N, N]`` matrix; ``auto``: low_rank if that factor misses so little that the
        relative error of a solve stays below 1e-4 (what it misses, over the noise variance, bounds it), else exact up
        to 4,000 points, else cg.
    """

    def __init__(
        self,
        up: Product,
        down: Product,
        gram: StateGram,
        right: Tensor,
        *,
        c1: float,
        c2: float,
        noise: float,
        solver: str = "exact",
        tolerance: float = 1e-6,
    ) -> None:
        if solver not in ("auto", "exact", "cg", "low_rank"):
            raise ValueError(f"GradientSystem: expected solver auto, exact, cg or low_rank, got {solver!r}")
        self.up, self.down, self.c1, self.c2, self.noise = up, down, c1, c2, noise
        self.gram, self.tolerance = gram, tolerance
        self.kind = self._choose() if solver == "auto" else solver
        self.fisher_root = right * math.sqrt(c2 * gram.size)
        self.solver = self._solver(self.fisher_root)

    def weights(self, targets: Tensor) -> Tensor:
        """``c2 W A [N]``: what takes the place of the advantages (over N)."""
        return self.c2 * self.solver.solve(targets)

    def covariance(self, v: Tensor) -> Tensor:
        """``S v`` for ``v [n, k]``; positive semidefinite and below the prior ``c2 G``."""
        along = self.down(v)
        return self.up(self.c2 / self.gram.size * along - self.c2**2 * self.solver.solve(along))

    def natural_precision(self, v: Tensor) -> Tensor:
        """``(G^-1 S G^-1)^-1 v = (G + c2 U (c1 K_s + sigma^2 I)^-1 U^T) v / c2`` for ``v [n, k]``."""
        along = self.down(v)
        return self.up(along / (self.c2 * self.gram.size) + self._state_solver.solve(along))

    @cached_property
    def _state_solver(self) -> Solver:
        return self._solver(self.fisher_root[:, :0])

    def _choose(self) -> str:
        if self.gram.size <= EXACT_ALWAYS:
            return "exact"
        missed = self.c1 * self.gram.diagonal.sum() - self._nystroem.square().sum()
        if bool(missed <= MAX_TOLERANCE * self.noise):
            return "low_rank"
        return "exact" if self.gram.size <= EXACT_UP_TO else "cg"

    def _solver(self, fisher_root: Tensor) -> Solver:
        """Of ``c1 K_s + R R^T + sigma^2 I``."""
        if self.kind == "exact":
            matrix = self.c1 * self.gram.dense + fisher_root @ fisher_root.T
            matrix.diagonal().add_(self.noise)
            return Cholesky(matrix)
        if self.kind == "low_rank":
            return LowRank(torch.cat([self._nystroem, fisher_root], 1), self.noise)
        dense = self.gram.dense

        def matvec(x: Tensor) -> Tensor:
            return self.c1 * (dense @ x) + fisher_root @ (fisher_root.T @ x) + self.noise * x

        root = pivoted_cholesky(lambda i: dense[:, i], dense.diagonal(), PRECONDITIONER_RANK)
        preconditioner = LowRank(torch.cat([math.sqrt(self.c1) * root, fisher_root], 1), self.noise)
        return CG(matvec, tolerance=self.tolerance, preconditioner=preconditioner)

    @cached_property
    def _nystroem(self) -> Tensor:
        """``R [N, r]`` with ``R R^T`` near ``c1 K_s``."""
        diagonal = self.gram.diagonal
        # half of what may be missed: the difference of two sums is rounded
        enough = 0.5 * MAX_TOLERANCE * self.noise / max(self.c1 * float(diagonal.sum()), 1e-300)
        return math.sqrt(self.c1) * pivoted_cholesky(self.gram.column, diagonal, NYSTROEM_RANK, enough)
