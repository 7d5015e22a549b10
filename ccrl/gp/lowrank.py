"""Randomised decompositions of operators that are only ever multiplied with (Halko, Martinsson, Tropp 2011)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

__all__ = ["Eigen", "Product", "randomised_eigh", "randomised_right_svd"]

Product = Callable[[Tensor], Tensor]
"""A matrix times the columns of a matrix ``[., k]``."""


class Eigen(NamedTuple):
    """Largest eigenvalues (or singular values) first, and their vectors as columns."""

    values: Tensor
    vectors: Tensor


def randomised_right_svd(
    product: Product,
    transposed: Product,
    columns: int,
    rank: int,
    generator: Generator,
    *,
    oversampling: int = 2,
    like: Tensor,
) -> Eigen:
    """Singular values ``s [k]`` and right vectors ``V [N, k]`` of ``U [n, N]``, so that ``U^T U`` is near
    ``V diag(s^2) V^T``, from ``rank + oversampling`` products with ``U`` and as many with ``U^T``.

    :param like: a tensor of the dtype and device of the probes.
    :raises ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"randomised_right_svd: expected rank >= 1, got {rank}")
    probes = _probes(columns, min(rank + oversampling, columns), generator, like)
    basis, _ = torch.linalg.qr(product(probes))
    right, values, _ = torch.linalg.svd(transposed(basis), full_matrices=False)
    return Eigen(values[:rank], right[:, :rank])


def randomised_eigh(
    product: Product, size: int, rank: int, generator: Generator, *, oversampling: int = 2, like: Tensor
) -> Eigen:
    """The ``rank`` largest eigenvalues ``[k]`` and vectors ``[size, k]`` of a positive semidefinite operator."""
    if rank < 1:
        raise ValueError(f"randomised_eigh: expected rank >= 1, got {rank}")
    probes = _probes(size, min(rank + oversampling, size), generator, like)
    basis, _ = torch.linalg.qr(product(probes))
    small = basis.T @ product(basis)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.T))
    values, vectors = values.flip(0)[:rank].clamp_min(0.0), vectors.flip(1)[:, :rank]
    return Eigen(values, basis @ vectors)


def _probes(rows: int, count: int, generator: Generator, like: Tensor) -> Tensor:
    return torch.randn(rows, count, generator=generator, dtype=like.dtype, device=like.device)
