"""Normalised scores: 0 is the random policy, 100 the expert of the data set's authors."""

from __future__ import annotations

import re
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["D4RL_SCORES", "normalised_score", "reference_scores", "tail_mean", "value_at_risk"]

Number = TypeVar("Number", float, NDArray[np.float64])

D4RL_SCORES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.662856),
    "maze2d-medium-dense": (44.264742, 297.455255),
    "maze2d-large-dense": (30.569041, 303.485738),
    "antmaze": (0.0, 1.0),
}
"""Task -> returns of the random policy and of the expert, on the environments of D4RL's time (MuJoCo 2, old Gym).
Gymnasium's v5 environments pay otherwise: data of your own has reference scores of its own."""


def reference_scores(name: str) -> tuple[float, float] | None:
    """D4RL's pair for a task, a data set's name (``hopper-medium-v2``) or that of its file (``hopper_medium-v2``,
    ``maze2d-umaze-sparse-v1``, ``Ant_maze_big-maze_...``); None: not in the table."""
    name = re.sub(r"-v\d+$", "", name.lower()).replace("_", "-").replace("-sparse", "")
    if name.startswith("ant-maze"):
        return D4RL_SCORES["antmaze"]
    if re.fullmatch(r"maze2d-(umaze|medium|large)(-dense)?", name):
        return D4RL_SCORES[name]
    return D4RL_SCORES.get(name.partition("-")[0])


def normalised_score(returns: Number, scores: tuple[float, float] | str) -> Number:
    """``100 (R - random) / (expert - random)`` of undiscounted returns.

    :param scores: the pair, or D4RL's name of the task.
    :raises ValueError: a name that D4RL's table does not have, or an expert no better than random.
    """
    if isinstance(scores, str):
        known = reference_scores(scores)
        if known is None:
            raise ValueError(f"normalised_score: expected one of {sorted(D4RL_SCORES)}, got {scores!r}; pass the pair")
        scores = known
    low, high = scores
    if not high > low:
        raise ValueError(f"normalised_score: expected the expert's return above the random one, got {low} and {high}")
    return 100.0 * (returns - low) / (high - low)


def value_at_risk(returns: NDArray[np.float64], q: float) -> float:
    """The lower ``q``-quantile of returns, one of them (no interpolation); higher is better.

    :raises ValueError: ``q`` outside [0, 1], no returns, or some that are not finite.
    """
    rows = np.asarray(returns, dtype=np.float64)
    if not 0.0 <= q <= 1.0 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(f"value_at_risk: expected q in [0, 1] and finite returns, got {q} and {rows}")
    # .29 of 100 is 28.999999999999996
    return float(np.sort(rows)[int(q * (len(rows) - 1) + 1e-9)])


def tail_mean(returns: NDArray[np.float64], q: float) -> float:
    """CVaR: the mean of the worst ``ceil(q M)`` of ``M`` returns; higher is better.

    :raises ValueError: ``q`` outside (0, 1], no returns, or some that are not finite.
    """
    rows = np.sort(np.asarray(returns, dtype=np.float64))
    if not 0.0 < q <= 1.0 or not len(rows) or not np.isfinite(rows).all():
        raise ValueError(f"tail_mean: expected q in (0, 1] and finite returns, got {q} and {rows}")
    # .07 of 100 is 7.000000000000001, and an eighth return would count; of hardly any share it is still one
    return float(rows[: max(1, int(np.ceil(q * len(rows) - 1e-9)))].mean())
