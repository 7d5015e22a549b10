"""What Bayesian estimates of a gradient give back: a mean and a covariance that is only ever multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Covariance", "Posterior"]


@dataclass(frozen=True)
class Covariance:
    """A symmetric ``[n, n]`` linear operator: call it with ``v [n]`` or ``[n, k]`` for a product of that shape.

    ``dense [n, n]``, ``diagonal [n]`` and ``trace`` (0-d) multiply with the identity: for small ``n``.

    :raises ValueError: vectors of another size.
    """

    size: int
    product: Callable[[Tensor], Tensor]
    like: Tensor
    """Any tensor of its dtype and device."""

    def __call__(self, v: Tensor) -> Tensor:
        if v.shape[0] != self.size:
            raise ValueError(f"Covariance: expected vectors [{self.size}] or [{self.size}, k], got {tuple(v.shape)}")
        return self.product(v.to(self.like))

    def dense(self) -> Tensor:
        matrix = self(torch.eye(self.size, dtype=self.like.dtype, device=self.like.device))
        return 0.5 * (matrix + matrix.T)

    def diagonal(self) -> Tensor:
        return self.dense().diagonal()

    def trace(self) -> Tensor:
        return self.diagonal().sum()


@dataclass(frozen=True)
class Posterior:
    """Posterior of a gradient: ``mean [n]`` and ``covariance [n, n]``."""

    mean: Tensor
    covariance: Covariance

    def natural(self, inverse: Tensor) -> Posterior:
        """Of the natural gradient ``G^-1 g``: mean ``G^-1 m``, covariance ``G^-1 C G^-1``, from ``G^-1 [n, n]``."""
        cov = self.covariance
        product = lambda v: inverse @ cov(inverse @ v)  # noqa: E731
        return Posterior(inverse @ self.mean, Covariance(cov.size, product, cov.like))
