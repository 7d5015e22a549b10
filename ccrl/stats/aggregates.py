"""Aggregates of the scores of few runs on many tasks, and their bootstrap intervals.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021 (IQM,
stratified bootstrap, performance profiles, probability of improvement, optimality gap); Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993 (percentile interval).

``scores`` are runs x tasks: an array ``[R, M, ...]``, or a sequence of ``M`` arrays ``[R_m, ...]`` if tasks have
different numbers of runs. Trailing axes (the points of a curve) are handled together. Higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Interval",
    "iqm",
    "median_of_means",
    "optimality_gap",
    "performance_profile",
    "probability_of_improvement",
    "probability_of_improvement_interval",
    "sample_efficiency",
    "stratified_bootstrap",
]

Array = NDArray[np.float64]
Scores = Array | Sequence[ArrayLike]
Statistic = Callable[[Array, int], Array]

_CHUNK = 4_000_000
"""Numbers resampled at a time: bounds the memory of a bootstrap of curves to some 100 MB."""


class Interval(NamedTuple):
    """A statistic and the ends of its interval."""

    point: Array
    low: Array
    high: Array


def iqm(scores: ArrayLike, axis: int = -1) -> Array:
    """Interquartile mean: the mean of what is left after cutting ``floor(n / 4)`` values from each end of ``axis``."""
    x = np.asarray(scores, dtype=np.float64)
    n = x.shape[axis]
    _not_empty(n)
    cut = n // 4
    if cut:
        x = np.partition(x, (cut, n - cut - 1), axis=axis)
    kept: Array = np.take(x, np.arange(cut, n - cut), axis=axis)
    return np.asarray(kept.mean(axis=axis))


def median_of_means(scores: Scores) -> Array:
    """Median over tasks of the mean over runs: the aggregate that IQM replaces, for tables beside older papers."""
    return np.asarray(np.median(np.stack([task.mean(axis=0) for task in _tasks(scores)]), axis=0))


def optimality_gap(scores: ArrayLike, target: float = 1.0, axis: int = -1) -> Array:
    """Mean of ``max(target - score, 0)``: how much is missing to ``target``; runs above it count as at it."""
    x = np.asarray(scores, dtype=np.float64)
    _not_empty(x.shape[axis])
    return np.asarray(np.maximum(target - x, 0.0).mean(axis=axis))


def performance_profile(scores: ArrayLike, thresholds: ArrayLike, axis: int = -1) -> Array:
    """Fraction of the scores on ``axis`` above each of the ``K`` thresholds (strictly); ``K`` is the last axis."""
    x = np.moveaxis(np.asarray(scores, dtype=np.float64), axis, -1)
    _not_empty(x.shape[-1])
    return np.asarray((x[..., None, :] > np.asarray(thresholds, dtype=np.float64)[:, None]).mean(axis=-1))


def probability_of_improvement(x: Scores, y: Scores) -> Array:
    """Probability that a run of X beats a run of Y on a task drawn at random.

    Per task the Mann-Whitney statistic ``U / (R_x R_y)``, ties counting one half, then the mean over tasks. Both need
    the same tasks, in the same order.
    """
    pairs = list(zip(_tasks(x), _tasks(y), strict=True))
    return np.asarray(np.mean([_improvement(a[None], b[None])[0] for a, b in pairs], axis=0))


def stratified_bootstrap(
    scores: Scores,
    statistic: Statistic = iqm,
    repetitions: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``statistic(pooled, axis)``, resampling runs with replacement within each task.

    The scores of all tasks are pooled on one axis before the statistic. A curve's points are resampled together: a
    run is drawn whole.

    Returns:
        Three arrays of the statistic's shape.
    """
    tasks = _tasks(scores)
    point = statistic(np.concatenate(tasks), 0)
    draws = [statistic(np.concatenate(drawn, axis=1), 1) for drawn in _resample(tasks, repetitions, seed)]
    return _percentiles(point, np.concatenate(draws), confidence)


def probability_of_improvement_interval(
    x: Scores, y: Scores, repetitions: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """:func:`probability_of_improvement` with the runs of both sides resampled within each task."""
    point = probability_of_improvement(x, y)
    split = len(_tasks(x))
    draws = [
        np.mean([_improvement(a, b) for a, b in zip(drawn[:split], drawn[split:], strict=True)], axis=0)
        for drawn in _resample([*_tasks(x), *_tasks(y)], repetitions, seed)
    ]
    return _percentiles(point, np.concatenate(draws), confidence)


def sample_efficiency(steps: ArrayLike, curves: ArrayLike, threshold: float) -> Array:
    """First of ``steps`` ``[T]`` at which each curve ``[..., T]`` is at or above ``threshold``; ``inf`` if never."""
    reached = np.asarray(curves, dtype=np.float64) >= threshold
    first = np.asarray(steps, dtype=np.float64)[reached.argmax(axis=-1)]
    return np.where(reached.any(axis=-1), first, np.inf)


def _improvement(x: Array, y: Array) -> Array:
    """``[B, R_x], [B, R_y] -> [B]``."""
    a, b = x[:, :, None], y[:, None, :]
    return np.asarray(((a > b) + 0.5 * (a == b)).mean(axis=(1, 2)))


def _resample(tasks: list[Array], repetitions: int, seed: int) -> Iterator[list[Array]]:
    """Chunks of bootstrap samples: per task ``[B, R_m, ...]``, ``B`` summing up to ``repetitions``."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // sum(task.size for task in tasks))
    for start in range(0, repetitions, chunk):
        size = min(chunk, repetitions - start)
        yield [task[generator.integers(len(task), size=(size, len(task)))] for task in tasks]


def _percentiles(point: Array, draws: Array, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, as 0.95; received {confidence}.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0)
    return Interval(point, low, high)


def _tasks(scores: Scores) -> list[Array]:
    if isinstance(scores, np.ndarray):
        if scores.ndim < 2:
            raise ValueError(
                f"scores: expected [runs, tasks, ...]; received shape {scores.shape}. One task: scores[:, None]."
            )
        tasks = [np.asarray(scores[:, m], dtype=np.float64) for m in range(scores.shape[1])]
    else:
        tasks = [np.asarray(task, dtype=np.float64) for task in scores]
    for m, task in enumerate(tasks):
        _not_empty(len(task) if task.ndim else 0)
        if not np.isfinite(task).all():
            raise ValueError(f"scores of task {m}: expected finite numbers; received NaN or inf. Leave such runs out.")
    _not_empty(len(tasks))
    return tasks


def _not_empty(n: int) -> None:
    if n == 0:
        raise ValueError("scores: expected at least one run of at least one task; received none.")
