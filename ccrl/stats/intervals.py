"""Intervals for few runs that do not resample: for a mean, for a trimmed mean, and for the runs themselves.

Sources: Tukey and McLaughlin, "Less vulnerable confidence and significance procedures for location based on a single
sample", Sankhya A 25, 1963 (the trimmed mean's interval); Wilks, "Determination of sample sizes for setting tolerance
limits", Annals of Mathematical Statistics 12, 1941; Patterson et al., "Empirical Design in Reinforcement Learning",
JMLR 2024 (why runs deserve tolerance intervals).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ccrl.stats.aggregates import Array, Interval, iqm, stratified_bootstrap
from ccrl.stats.student import binomial_tail, t_quantile

__all__ = ["iqm_interval", "t_interval", "tolerance_interval", "tolerance_runs", "trimmed_t_interval"]


def t_interval(x: ArrayLike, confidence: float = 0.95, axis: int = -1) -> Interval:
    """Mean over ``axis`` (``n`` independent runs) with Student's interval, mean +- t s / sqrt(n).

    Raises:
        ValueError: fewer than two runs, numbers that are not finite, a confidence outside (0, 1).
    """
    values = _runs(x, axis, 2, confidence)
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    half = t_quantile((1 + confidence) / 2, n - 1) * values.std(axis=-1, ddof=1) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def trimmed_t_interval(x: ArrayLike, confidence: float = 0.95, axis: int = -1) -> Interval:
    """IQM over ``axis`` with Tukey and McLaughlin's interval: ``g = floor(n / 4)`` values are cut from each end,
    ``s_w`` is the standard deviation after each of them is set to its nearest kept value, and with ``h = n - 2 g`` kept
    values the half width is ``t_{h - 1} s_w sqrt(n - 1) / sqrt(h (h - 1))``. With n < 4 it is :func:`t_interval`.

    Raises:
        ValueError: as :func:`t_interval`.
    """
    values = np.sort(_runs(x, axis, 2, confidence), axis=-1)
    n = values.shape[-1]
    cut = n // 4
    kept = n - 2 * cut
    winsorised = np.clip(values, values[..., cut, None], values[..., n - cut - 1, None])
    error = winsorised.std(axis=-1, ddof=1) * math.sqrt((n - 1) / (kept * (kept - 1)))
    point = iqm(values)
    half = t_quantile((1 + confidence) / 2, kept - 1) * error
    return Interval(point, point - half, point + half)


def iqm_interval(x: ArrayLike, axis: int = -1) -> Interval:
    """IQM over ``axis`` with the nominal 95 % interval that covers best for so many runs: :func:`trimmed_t_interval`
    below ten, where the bootstrap is far too short (74 % with three normal runs), the percentile bootstrap from ten on,
    which also suits runs that either solve the task or fail. One run has no interval: both ends are the run.

    Raises:
        ValueError: no run, or numbers that are not finite.
    """
    values = _runs(x, axis, 1, 0.95)
    n = values.shape[-1]
    if n == 1:
        return Interval(values[..., 0], values[..., 0], values[..., 0])
    return trimmed_t_interval(values) if n < 10 else stratified_bootstrap([np.moveaxis(values, -1, 0)], iqm)


def tolerance_interval(x: ArrayLike, content: float = 0.5, confidence: float = 0.95, axis: int = -1) -> Interval:
    """Bounds that hold, with probability at least ``confidence``, a share ``content`` of all runs that could be made:
    what the next run may look like, where a confidence interval says where their mean is. ``point`` is the median.

    Order statistics, so no shape is assumed. The ends ``x_(1 + i)`` and ``x_(n - j)`` leave out as many runs as they
    can (``i`` and ``j`` differ by at most one, the lower end inwards first); the share between them is at least
    ``content`` with the probability that at most ``n - 2 - i - j`` of ``n`` trials of probability ``content`` succeed.

    Raises:
        ValueError: too few runs for any such bounds (:func:`tolerance_runs` says how many it takes), or as
            :func:`t_interval`.
    """
    values = np.sort(_runs(x, axis, 2, confidence), axis=-1)
    _fraction("content", content)
    n = values.shape[-1]
    if _holds(n, 0, content) < confidence:
        raise ValueError(
            f"x: expected at least {tolerance_runs(content, confidence)} runs for bounds on a share of {content:g} "
            f"with confidence {confidence:g}, got {n}; make more runs, or ask for less"
        )
    out = 0
    while n - out > 2 and _holds(n, out + 1, content) >= confidence:
        out += 1
    low, high = (out + 1) // 2, out // 2
    return Interval(np.median(values, axis=-1), values[..., low], values[..., n - 1 - high])


def tolerance_runs(content: float = 0.5, confidence: float = 0.95) -> int:
    """The fewest runs whose smallest and largest hold a share ``content`` with this confidence: the smallest ``n`` with
    ``1 - n content^(n - 1) + (n - 1) content^n >= confidence`` (Wilks)."""
    _fraction("content", content)
    _fraction("confidence", confidence)
    n = 2
    while 1 - n * content ** (n - 1) + (n - 1) * content**n < confidence:
        n += 1
    return n


def _holds(n: int, out: int, content: float) -> float:
    """Probability that ``n - 1 - out`` neighbouring gaps of ``n`` ordered uniform numbers sum up to ``content``."""
    return 1 - binomial_tail(n - 1 - out, n, content)


def _fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, as 0.95; received {value}.")


def _runs(x: ArrayLike, axis: int, least: int, confidence: float) -> Array:
    _fraction("confidence", confidence)
    values = np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1)
    if values.shape[-1] < least:
        raise ValueError(f"x: expected at least {least} runs on axis {axis}, got {values.shape[-1]}")
    if not np.isfinite(values).all():
        raise ValueError("x: expected finite numbers; received NaN or inf. Leave such runs out and say so.")
    return values
