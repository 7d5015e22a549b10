"""Student's t distribution and the binomial tail, without SciPy (which is no dependency of the core).

Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4 (the distribution function of t
with whole degrees of freedom, as a finite sum), 26.7.1 and 26.5.8 (with any, as Welch's test needs: by the continued
fraction of the incomplete beta function).
"""

from __future__ import annotations

import math

__all__ = ["binomial_tail", "t_cdf", "t_quantile"]


def t_cdf(t: float, df: float) -> float:
    """Probability that Student's t with ``df`` > 0 degrees of freedom is at most ``t``."""
    if df != int(df):
        tail = 0.5 * _beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5)
        return tail if t < 0 else 1 - tail
    theta = math.atan(t / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    odd = int(df) % 2
    term, total = (cos, cos if df > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, int(df) - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    inside = 2 / math.pi * (theta + sin * total) if odd else sin * total
    if abs(inside) > 0.999:  # 1 - inside would be what rounding leaves of it, and below 0 at times
        tail = 0.5 * _beta(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5)
        return tail if t < 0 else 1 - tail
    return 0.5 * (1 + inside)


def t_quantile(probability: float, df: float) -> float:
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


def _beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function at ``x``; ``rest`` is 1 - x, without its rounding."""
    if x == 0 or rest == 0:
        return float(rest == 0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, and at the mirrored point fast
        return 1 - _beta(rest, x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    # by the recurrence of numerators and denominators, kept near 1
    h, c, d = 1.0, 1.0, 0.0
    for m in range(1000):
        k = m // 2
        if m == 0:
            term = 1.0
        elif m % 2:
            term = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        else:
            term = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        h *= c * d
        if m and abs(c * d - 1) < 1e-16:
            break
    return front * (h - 1) / a
