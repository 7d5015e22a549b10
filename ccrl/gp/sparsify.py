"""Sparsification by approximate linear dependence (ALD; Engel, Mannor, Meir 2002).

A point joins the dictionary if its feature vector lies further than ``sqrt(nu)`` from the span of those already there:
``delta = k(x, x) - k~^T K~^-1 k~ > nu``. Otherwise its coefficients ``a = K~^-1 k~`` represent it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dictionary", "SparseSet", "ald"]

Column = Callable[[int], Tensor]
"""``column(i)``: the kernel of every point with point ``i``, ``[N]``."""


class Dictionary:
    """Points of a fixed set chosen one by one; the inverse of their kernel matrix grows with them.

    :param column: see ``Column``; called once per point that joins.
    :param diagonal: ``k(x_i, x_i)``, ``[N]``.
    :param nu: threshold, in the unit of the kernel.
    """

    def __init__(self, column: Column, diagonal: Tensor, nu: float) -> None:
        if not nu > 0.0:
            raise ValueError(f"Dictionary: expected a threshold nu > 0, got {nu}")
        self.column, self.diagonal, self.nu = column, diagonal, nu
        self.index: list[int] = []
        self._columns = diagonal.new_zeros(diagonal.shape[0], 16)
        self._inverse = diagonal.new_zeros(16, 16)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def inverse(self) -> Tensor:
        """``K~^-1 [m, m]``."""
        m = len(self.index)
        return self._inverse[:m, :m]

    @property
    def gram(self) -> Tensor:
        """``K~ [m, m]``."""
        return self._columns[self.index, : len(self.index)]

    def kernels(self, i: int) -> Tensor:
        """``k~(x_i) [m]``: of the dictionary with point ``i``."""
        return self._columns[i, : len(self.index)]

    def test(self, i: int) -> tuple[Tensor, bool]:
        """Coefficients ``a [m]`` of point ``i`` on the dictionary as it is, and whether it must join.

        :raises FloatingPointError: kernels that are not finite.
        """
        k = self.kernels(i)
        a = self.inverse @ k
        delta = float(self.diagonal[i] - k @ a)
        if not math.isfinite(delta):  # above no threshold: the point would be left out, silently
            raise FloatingPointError(f"Dictionary: expected finite kernels, got {delta} for point {i}")
        return a, delta > self.nu

    def add(self, i: int, a: Tensor) -> None:
        """Let point ``i`` with coefficients ``a`` join."""
        m = len(self.index)
        if m == self._inverse.shape[0]:  # doubling: growing by one would copy at every step
            self._columns = torch.cat([self._columns, torch.zeros_like(self._columns)], 1)
            grown = self._inverse.new_zeros(2 * m, 2 * m)
            grown[:m, :m] = self._inverse
            self._inverse = grown
        delta = self.diagonal[i] - self.kernels(i) @ a
        inverse = self._inverse[: m + 1, : m + 1]
        inverse[:m, :m].addr_(a, a / delta)
        inverse[:m, m] = inverse[m, :m] = -a / delta
        inverse[m, m] = 1.0 / delta
        self._columns[:, m] = self.column(i)
        self.index.append(i)


@dataclass(frozen=True)
class SparseSet:
    """``K`` of the whole set is near ``A K~ A^T``."""

    index: Tensor
    """Members of the dictionary, ``[m]`` int64."""
    coefficients: Tensor
    """``A [N, m]``: unit rows for members."""
    gram: Tensor
    """``K~ [m, m]``."""


def ald(column: Column, diagonal: Tensor, nu: float) -> SparseSet:
    """The dictionary of all points, in one pass in their order: ``O(N m^2)``. Parameters are those of ``Dictionary``.

    A point seen before the dictionary was complete keeps the coefficients of that time (zeros for later members).
    """
    dictionary = Dictionary(column, diagonal, nu)
    rows = []
    for i in range(diagonal.shape[0]):
        a, joins = dictionary.test(i)
        if joins:
            dictionary.add(i, a)
            a = _unit(len(dictionary), diagonal)
        rows.append(a)
    m = len(dictionary)
    a = diagonal.new_zeros(len(rows), m)
    for i, row in enumerate(rows):
        a[i, : row.shape[0]] = row
    return SparseSet(torch.tensor(dictionary.index, dtype=torch.int64, device=a.device), a, dictionary.gram)


def _unit(m: int, like: Tensor) -> Tensor:
    a = like.new_zeros(m)
    a[-1] = 1.0
    return a
