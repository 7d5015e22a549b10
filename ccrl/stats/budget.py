"""What a method reaches with how much tuning: a comparison of two tuned methods means little without it.

Sources: Dodge et al., "Show Your Work: Improved Reporting of Experimental Results", EMNLP 2019 (expected best score
against budget); Tang et al., "Showing Your Work Doesn't Always Work", ACL 2020 (the unbiased form, draws without
replacement); Jackson et al., "A Clean Slate for Offline Reinforcement Learning", 2025, arXiv 2504.11453 (settings of
offline methods chosen by a bandit that evaluates trained policies online).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ccrl.stats.aggregates import Array

__all__ = ["score_after_evaluations", "score_at_budget"]


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


def score_after_evaluations(
    returns: ArrayLike, evaluations: int, *, scale: float = 100.0, repeats: int = 1_000, seed: int = 0
) -> Array:
    """Expected score of the policy that is chosen after 1, 2, ... episodes in the environment.

    ``returns`` ``[policies, episodes]`` holds what policies trained offline, with different settings, return
    online. A bandit (UCB1: Auer, Cesa-Bianchi and Fischer 2002) spends one episode at a time on one of them: on each
    once, in random order, then on the largest ``mean + scale sqrt(2 ln t / n)``. An episode is a draw, with
    replacement, from the policy's returns. After each one the policy of the highest mean so far is chosen, and what
    counts is the mean of all its returns: the first number is a policy chosen blindly, the last ones approach the best.

    Args:
        returns: scores, higher is better.
        evaluations: episodes that are spent.
        scale: width of the scores, which UCB1 expects in [0, 1].
        repeats: simulated choices that are averaged.
        seed: of the simulation.

    Returns:
        ``[evaluations]``.

    Raises:
        ValueError: no policies or episodes, numbers that are not finite, or sizes below 1.
    """
    table = np.asarray(returns, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"returns: expected finite numbers [policies, episodes], got shape {table.shape}")
    if evaluations < 1 or repeats < 1 or not 0.0 < scale < math.inf:
        raise ValueError(
            f"expected evaluations >= 1, repeats >= 1 and a scale > 0, got {evaluations}, {repeats}, {scale}"
        )
    rng, (policies, episodes) = np.random.default_rng(seed), table.shape
    order = rng.permuted(np.tile(np.arange(policies), (repeats, 1)), axis=1)
    run, truth = np.arange(repeats), table.mean(1)
    count, total = np.zeros((repeats, policies)), np.zeros((repeats, policies))
    curve = []
    for t in range(evaluations):
        if t < policies:
            arm = order[:, t]
        else:
            arm = (total / count + scale * np.sqrt(2.0 * math.log(t) / count)).argmax(1)
        total[run, arm] += table[arm, rng.integers(episodes, size=repeats)]
        count[run, arm] += 1
        mean = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
        curve.append(float(truth[mean.argmax(1)].mean()))
    return np.array(curve)
