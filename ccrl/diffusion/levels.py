"""Noise levels: where a sampler stops, and where a denoiser is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.settings import Nonnegative, Positive, Settings

__all__ = ["Churn", "geometric_levels", "karras_levels", "lognormal_levels"]


def karras_levels(n: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> list[float]:
    """``n`` levels from ``high`` to ``low``, dense where there is little noise, and 0 (Karras et al. 2022, eq. 5)."""
    _check(n, low, high)
    ends = high ** (1.0 / rho), low ** (1.0 / rho)
    step = (ends[1] - ends[0]) / (n - 1)
    return [*((ends[0] + i * step) ** rho for i in range(n)), 0.0]


def geometric_levels(n: int, low: float = 0.05, high: float = 1.0) -> list[float]:
    """``n`` levels from ``high`` to ``low`` with equal ratios (Song and Ermon 2019)."""
    _check(n, low, high)
    return [high * (low / high) ** (i / (n - 1)) for i in range(n)]


def lognormal_levels(
    n: int, generator: torch.Generator | None, device: torch.device | str = "cpu", mean: float = -1.2, std: float = 1.2
) -> Tensor:
    """``exp(mean + std N(0, 1))``, ``[n]``: the levels that EDM trains at (Karras et al. 2022, table 1)."""
    return (mean + std * torch.randn(n, generator=generator, device=device)).exp()


@dataclass(frozen=True)
class Churn(Settings):
    """Noise that a sampler adds before its steps (Karras et al. 2022, algorithm 2); the amount 0 adds none."""

    amount: Nonnegative = 80.0
    """Levels rise by at most this number over the number of steps."""
    low: Nonnegative = 0.05
    """Below this level nothing is added."""
    high: Positive = 50.0
    """Above this level nothing is added."""
    noise: Positive = 1.003
    """The added noise has this standard deviation."""

    def gamma(self, sigma: float, n: int) -> float:
        """By which share the level ``sigma`` rises in a sampler of ``n`` steps."""
        return min(self.amount / n, math.sqrt(2.0) - 1.0) if self.low <= sigma <= self.high else 0.0


def _check(n: int, low: float, high: float) -> None:
    if n < 2 or not 0.0 < low < high < math.inf:
        raise ValueError(f"levels: expected n >= 2 and 0 < low < high, got n = {n}, low = {low}, high = {high}")
