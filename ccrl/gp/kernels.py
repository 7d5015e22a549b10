"""Kernels on scores, as GPyTorch kernels. Importing this module needs GPyTorch.

With ``u = grad log pi`` and the Fisher matrix ``G`` (docs/bpg.md, docs/bac.md)::

    Fisher            k(u, u')     = u^T G^-1 u'
    quadratic Fisher  k(u, u')     = (1 + u^T G^-1 u')^2
    state x Fisher    k((x,u), .)  = c_x k_x(x, x') + c_F u^T G^-1 u'

Amplitudes are constants, not learnt: a learnable one silently rescales the gradient (GPyTorch's LinearKernel starts at
a variance of 0.693).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccrl.packages import require

kernels = require("gpytorch.kernels", "gp")
operators = require("linear_operator.operators", "gp")
Kernel: Any = kernels.Kernel

__all__ = ["AdditiveRBFKernel", "FisherKernel", "QuadraticFisherKernel", "StateFisherKernel", "rbf"]


class FisherKernel(Kernel):  # type: ignore[misc]  # GPyTorch is optional, so its classes are untyped
    """``u^T G^-1 u'`` on scores ``[..., M, n]``.

    :param inverse: ``G^-1`` ``[..., n, n]``; None: the scores are whitened already (``L^T u`` with ``L L^T = G^-1``).
    """

    inverse: Tensor | None

    def __init__(self, inverse: Tensor | None = None, **options: Any) -> None:
        super().__init__(**options)
        if inverse is not None and (inverse.dim() < 2 or inverse.shape[-1] != inverse.shape[-2]):
            raise ValueError(f"FisherKernel: expected a square inverse [..., n, n], got {tuple(inverse.shape)}")
        self.register_buffer("inverse", inverse)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Any:
        self._check(x1)
        left = x1 if self.inverse is None else x1 @ self.inverse.to(x1)
        if diag:
            return (left * x2).sum(-1)
        # lazy: a product with it costs M n, where the matrix would cost M^2
        return operators.MatmulLinearOperator(left, x2.mT)

    def _check(self, x: Tensor) -> None:
        if self.inverse is not None and x.shape[-1] != self.inverse.shape[-1]:
            raise ValueError(f"FisherKernel: expected scores [..., M, {self.inverse.shape[-1]}], got {tuple(x.shape)}")


class QuadraticFisherKernel(FisherKernel):
    """``(1 + u^T G^-1 u')^2``; of rank at most ``(n + 1)(n + 2) / 2``."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Any:
        product = super().forward(x1, x2, diag=diag)
        return ((product if diag else product.to_dense()) + 1.0).square()


class StateFisherKernel(Kernel):  # type: ignore[misc]
    """``c_x k_x(x, x') + c_F u^T G^-1 u'`` on rows ``[..., M, d + n]``: state features first, then scores.

    :param state: a GPyTorch kernel on the first ``state_dim`` columns.
    :param inverse: see :class:`FisherKernel`.
    """

    def __init__(
        self,
        state: Any,
        state_dim: int,
        inverse: Tensor | None = None,
        *,
        state_scale: float = 1.0,
        fisher_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if state_dim < 1:
            raise ValueError(f"StateFisherKernel: expected state_dim >= 1, got {state_dim}")
        if state_scale < 0.0 or fisher_scale < 0.0:
            raise ValueError(f"StateFisherKernel: expected scales >= 0, got {state_scale}, {fisher_scale}")
        self.state, self.fisher = state, FisherKernel(inverse)
        self.state_dim, self.state_scale, self.fisher_scale = state_dim, state_scale, fisher_scale

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Any:
        d = self.state_dim
        states = self.state(x1[..., :d], x2[..., :d], diag=diag)
        scores = self.fisher.forward(x1[..., d:], x2[..., d:], diag=diag)
        if diag:
            return self.state_scale * states + self.fisher_scale * scores
        return states.evaluate_kernel() * self.state_scale + scores * self.fisher_scale


class AdditiveRBFKernel(Kernel):  # type: ignore[misc]
    """``sum_i exp(-(x_i - x'_i)^2 / (2 l_i^2))`` with learnt length scales ``[d]``: DBQPG's kernel on deep features."""

    is_stationary = True
    has_lengthscale = True

    def __init__(self, features: int, **options: Any) -> None:
        super().__init__(ard_num_dims=features, **options)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Tensor:
        a, b = x1 / self.lengthscale, x2 / self.lengthscale
        if diag:
            return torch.exp(-0.5 * (a - b).square()).sum(-1)
        # feature by feature: all at once would hold d matrices
        total = torch.zeros((), dtype=a.dtype, device=a.device)
        for i in range(a.shape[-1]):
            total = total + (-0.5 * (a[..., :, None, i] - b[..., None, :, i]).square()).exp()
        return total


def rbf(lengthscale: float) -> Any:
    """GPyTorch's Gaussian kernel ``exp(-|x - x'|^2 / (2 l^2))`` with a fixed length scale, in float64."""
    if lengthscale <= 0.0:
        raise ValueError(f"rbf: expected a length scale > 0, got {lengthscale}")
    kernel = kernels.RBFKernel().double().requires_grad_(False)
    kernel.lengthscale = lengthscale
    return kernel
