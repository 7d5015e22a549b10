"""Gaussian-process priors of grid tasks: densities to cover, covariances to design for. Needs gpytorch (extra gp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.packages import require
from envs.coverage.grid import coordinates

__all__ = ["gp_covariance", "gp_density"]

_SCALE, _NOISE = 0.6931471805599453, 1e-3
"""gpytorch's initial output scale, softplus(0), and the observation noise of the released settings."""


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Matern-5/2 of length scale 1."""
    kernels = require("gpytorch.kernels", "gp")
    kernel = kernels.ScaleKernel(kernels.MaternKernel(nu=2.5)).double()
    kernel.base_kernel.lengthscale, kernel.outputscale = 1.0, _SCALE
    with torch.no_grad():
        found: Tensor = kernel(a, b).to_dense()
    return found


def gp_covariance(size: tuple[int, int], instance: int, given: int = 5) -> Tensor:
    """``[n, n]`` float64: the prior covariance of the cells at ``1 + 0.1 (x, y)``, given noisy observations at
    ``given`` points drawn uniformly from ``[0, 10]^2`` by the seed ``instance`` (their values do not matter)."""
    cells = 1.0 + 0.1 * coordinates(size).double()
    covariance = _kernel(cells, cells)
    if given:
        points = 10.0 * torch.rand(given, 2, generator=torch.Generator().manual_seed(instance), dtype=torch.float64)
        seen = _kernel(points, points) + _NOISE * torch.eye(given, dtype=torch.float64)
        cross = _kernel(points, cells)
        covariance = covariance - cross.T @ torch.linalg.solve(seen, cross)
    return 0.5 * (covariance + covariance.T)


def gp_density(size: tuple[int, int], instance: int) -> Tensor:
    """``[n]`` weights above 0: a sample of the posterior given one observation of 0 at a random point, shifted by 3, or
    as far as it needs to be not negative."""
    generator = torch.Generator().manual_seed(instance)
    cells = 1.0 + 0.1 * coordinates(size).double()
    point = 10.0 * torch.rand(1, 2, generator=generator, dtype=torch.float64)
    cross = _kernel(point, cells)
    covariance = _kernel(cells, cells) - cross.T @ cross / (_kernel(point, point) + _NOISE)
    jitter = 1e-8 * torch.eye(len(cells), dtype=torch.float64)
    noise = torch.randn(len(cells), generator=generator, dtype=torch.float64)
    sample = torch.linalg.cholesky(covariance + jitter) @ noise
    # adding the negative minimum, as the released code does below -3, would push the density further down
    shift = torch.clamp_min(-sample.min(), 3.0)
    density: Tensor = (sample + shift).float()
    return density
