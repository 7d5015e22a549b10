"""Student's t distribution and the binomial tail, without SciPy (which is no dependency of the core).

Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4 (the distribution function of t
with whole degrees of freedom, as a finite sum).
"""

from __future__ import annotations

import math

__all__ = ["binomial_tail", "t_cdf", "t_quantile"]


def t_cdf(t: float, df: int) -> float:
    """Probability that Student's t with ``df`` >= 1 degrees of freedom is at most ``t``."""
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    term, total = (cos, cos if df > 1 else 0.0) if df % 2 else (1.0, 1.0)
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sin * total) if df % 2 else sin * total
    return 0.5 * (1 + inside)


def t_quantile(probability: float, df: int) -> float:
    """Where :func:`t_cdf` is ``probability``, by bisection to the last bit."""
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, df) < probability else (low, middle)
    return high


def binomial_tail(k: int, n: int, p: float) -> float:
    """Probability that at least ``k`` of ``n`` trials of probability ``p`` succeed."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(max(k, 0), n + 1))
