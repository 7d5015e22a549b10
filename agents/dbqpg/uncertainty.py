"""UAPG: a step shaped by how certain the gradient is (Akella et al. 2021)."""

from __future__ import annotations

from torch import Tensor

from ccrl.gp.lowrank import Eigen

__all__ = ["shrink", "stretch"]

TINY = 1e-300


def shrink(mean: Tensor, covariance: Eigen) -> Tensor:
    """``L - sum_i (1 - sqrt(h_min / h_i)) v_i v_i^T L``: uncertain directions are shortened.

    :param covariance: leading eigenpairs of the covariance of ``mean [n]``. Eigenvalues of 0 (a direction that is
        certain) have no say in the smallest one, which would otherwise stop every other direction.
    """
    positive = covariance.values > 1e-12 * covariance.values.max().clamp_min(TINY)
    lowest = covariance.values.masked_fill(~positive, float("inf")).min()
    ratio = (lowest / covariance.values.clamp_min(TINY)).sqrt()
    factor = (1.0 - ratio).masked_fill(~positive, 0.0)
    return mean - covariance.vectors @ (factor * (covariance.vectors.T @ mean))


def stretch(step: Tensor, precision: Eigen, limit: float = 3.0) -> Tensor:
    """``step + sum_i (min(sqrt(h_i / h_min), limit) - 1) v_i v_i^T step``: certain directions are lengthened.

    :param precision: leading eigenpairs of the inverse covariance of ``step [n]``.
    :raises ValueError: a limit below 1.
    """
    if limit < 1.0:
        raise ValueError(f"stretch: expected a limit >= 1, got {limit}")
    positive = precision.values > 1e-12 * precision.values.max().clamp_min(TINY)
    lowest = precision.values.masked_fill(~positive, float("inf")).min()
    ratio = (precision.values / lowest).sqrt().clamp(1.0, limit)
    factor = (ratio - 1.0).masked_fill(~positive, 0.0)
    return step + precision.vectors @ (factor * (precision.vectors.T @ step))
