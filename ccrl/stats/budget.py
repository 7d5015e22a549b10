"""What a method reaches with how much tuning: a comparison of two tuned methods means little without it.

Sources: Dodge et al., "Show Your Work: Improved Reporting of Experimental Results", EMNLP 2019 (expected best score
against budget); Tang et al., "Showing Your Work Doesn't Always Work", ACL 2020 (the unbiased form, draws without
replacement).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ccrl.stats.aggregates import Array

__all__ = ["score_at_budget"]


def score_at_budget(trials: ArrayLike, test: ArrayLike | None = None, budgets: ArrayLike | None = None) -> Array:
    """Expected score of the best of ``k`` trials of a random search, for each ``k`` of ``budgets``.

    The best is chosen by ``trials`` ``[n]`` (higher is better). What is averaged is ``test`` ``[n]``, the same
    settings on fresh seeds: without it the chosen trials' own scores, which are too high by the luck they were chosen
    for. Of the settings sorted upwards, the i-th is the best of a random set of k with probability
    C(i - 1, k - 1) / C(n, k); settings with equal trials share their probability.

    Returns:
        ``[K]``, for the budgets ``1 .. n`` if none are given.

    Raises:
        ValueError: no trials, shapes that differ, budgets outside 1 .. n, numbers that are not finite.
    """
    chosen = np.asarray(trials, dtype=np.float64)
    shown = chosen if test is None else np.asarray(test, dtype=np.float64)
    n = len(chosen) if chosen.ndim == 1 else 0
    if n == 0 or shown.shape != chosen.shape:
        raise ValueError(f"trials and test: expected [n] with n >= 1, got shapes {chosen.shape} and {shown.shape}")
    if not (np.isfinite(chosen).all() and np.isfinite(shown).all()):
        raise ValueError("trials and test: expected finite numbers; give failed trials the worst score instead.")
    sizes = np.arange(1, n + 1) if budgets is None else np.asarray(budgets)
    if not ((sizes >= 1) & (sizes <= n) & (sizes == np.floor(sizes))).all():
        raise ValueError(f"budgets: expected whole numbers from 1 to {n}, the number of trials; got {budgets!r}")
    values, group = np.unique(chosen, return_inverse=True)
    means = np.array([shown[group == g].mean() for g in range(len(values))])
    upto = np.cumsum(np.bincount(group))  # trials at or below each value
    curve = []
    for k in sizes.astype(int):
        below = np.array([0.0, *(math.comb(int(i), int(k)) / math.comb(n, int(k)) for i in upto)])
        curve.append(float(np.diff(below) @ means))
    return np.array(curve)
