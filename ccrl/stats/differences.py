"""How much better one method is than another: on the same seeds (or tasks, or starts) by the paired differences, on
seeds of their own by Welch's test.

Sources: Student, "The probable error of a mean", Biometrika 6, 1908; Fisher, "The Design of Experiments", 1935 (the
sign-flip test); Welch, "The generalization of Student's problem when several different population variances are
involved", Biometrika 34, 1947; Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6, 1979.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ccrl.stats.aggregates import Array
from ccrl.stats.intervals import t_interval
from ccrl.stats.student import t_cdf, t_quantile

__all__ = ["Difference", "holm", "paired_t", "sign_flip", "welch_t"]

_EXACT = 20
"""Pairs up to which all 2^n sign patterns are counted."""


class Difference(NamedTuple):
    """A difference of means x - y, its interval and the two-sided p value."""

    difference: float
    low: float
    high: float
    p: float


def paired_t(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Difference:
    """Student's test of ``mean(x - y) = 0`` over ``n`` pairs, with its interval. Where all differences are equal and
    not 0, p is 0; where they all are 0, it is 1.

    Raises:
        ValueError: shapes that differ or are not ``[n]``, fewer than two pairs, numbers that are not finite.
    """
    difference = _differences(x, y)
    mean, low, high = (float(v) for v in t_interval(difference, confidence))
    n = len(difference)
    error = difference.std(ddof=1) / math.sqrt(n)
    if error == 0:
        return Difference(mean, low, high, 1.0 if mean == 0 else 0.0)
    return Difference(mean, low, high, 2 * t_cdf(-abs(mean) / error, n - 1))


def welch_t(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Difference:
    """Welch's test of ``mean(x) = mean(y)``, with its interval, for runs ``[n]`` and ``[m]`` that share no seeds and
    whose variances may differ. With ``v_x = s_x^2 / n`` and ``v_y`` alike the error is ``sqrt(v_x + v_y)``, with
    ``(v_x + v_y)^2 / (v_x^2 / (n - 1) + v_y^2 / (m - 1))`` degrees of freedom. Where both sides are constant and
    differ, p is 0; where all values are one, it is 1.

    Raises:
        ValueError: sides that are not ``[n]`` with at least two runs, numbers that are not finite, a confidence
            outside (0, 1).
    """
    sides = [np.asarray(v, dtype=np.float64) for v in (x, y)]
    if any(v.ndim != 1 or len(v) < 2 for v in sides):
        shapes = " and ".join(str(v.shape) for v in sides)
        raise ValueError(f"x and y: expected two lists of at least two runs each, got shapes {shapes}")
    if not all(np.isfinite(v).all() for v in sides):
        raise ValueError("x and y: expected finite numbers; received NaN or inf. Leave such runs out and say so.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    mean = float(sides[0].mean() - sides[1].mean())
    parts = [float(v.var(ddof=1)) / len(v) for v in sides]
    error = math.sqrt(sum(parts))
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    df = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, sides))
    half = t_quantile((1 + confidence) / 2, df) * error
    return Difference(mean, mean - half, mean + half, 2 * t_cdf(-abs(mean) / error, df))


def sign_flip(x: ArrayLike, y: ArrayLike, repetitions: int = 100_000, seed: int = 0) -> float:
    """Two-sided p value of "the signs of the differences are coin flips": the share of the sign patterns whose mean
    difference is at least as far from 0 as the one seen. It assumes no shape, only that under equality x and y could
    be exchanged. All 2^n patterns up to 20 pairs, else ``repetitions`` random ones (and the one seen, so p > 0).

    The smallest p that n pairs can give is 2 / 2^n: five pairs cannot reach .05, six can.

    Raises:
        ValueError: as :func:`paired_t`.
    """
    difference = _differences(x, y)
    n, seen = len(difference), abs(difference.sum())
    seen -= 1e-12 * np.abs(difference).sum()  # patterns that tie but for rounding are ties
    if n > _EXACT:
        signs = np.random.default_rng(seed)
        count = 0
        for start in range(0, repetitions, 10_000):
            flips = signs.integers(0, 2, size=(min(10_000, repetitions - start), n)) * 2 - 1
            count += int((np.abs(flips @ difference) >= seen).sum())
        return (count + 1) / (repetitions + 1)
    sums = np.zeros(1)
    for value in difference:
        sums = np.concatenate((sums - value, sums + value))
    return float((np.abs(sums) >= seen).mean())


def holm(p_values: ArrayLike) -> Array:
    """Holm's adjusted p values ``[m]``: compare each with the level, and the chance of any false rejection among the
    ``m`` comparisons stays below it."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values: expected a list of numbers in [0, 1], got {p_values!r}")
    order = np.argsort(p)
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result


def _differences(x: ArrayLike, y: ArrayLike) -> Array:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"x and y: expected two lists of the same n >= 2 pairs, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("x and y: expected finite numbers; received NaN or inf. Leave such pairs out and say so.")
    return np.asarray(a - b)
