"""Learning curves in one CSV file: those of others beside ours, and ours for others."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ccrl.experiment.csv_table import read_rows

__all__ = ["read_others", "write_runs"]

Array = NDArray[np.float64]
_NAMES = {
    "env": ("env", "env_id", "environment", "task"), "agent": ("agent", "algorithm", "algo", "method"),
    "seed": ("seed", "run"), "step": ("step", "steps", "timesteps"), "return": ("return", "score", "reward"),
}  # fmt: skip
"""What is needed, and the names it may have in the first line of the file."""


def read_others(path: str | os.PathLike[str]) -> Iterator[tuple[str, str, int, Array, Array]]:
    """``env, agent, seed, steps [T], returns [T]`` of every run of a long table: a row per run and step, in any order.

    Columns ``env``, ``agent``, ``seed``, ``step`` and ``return``, or the usual other names of these; others are left
    alone.

    Raises:
        ValueError: a column is missing, or a row has no number where one must be (its line is named), or a step twice.
    """
    rows = read_rows(path, whole=True)
    if not rows:
        raise ValueError(f"{path}: expected a first line with names and rows below it, got no rows")
    have = list(rows[0])
    if len(have) == 1 and (other := next((sign for sign in ";\t" if sign in have[0]), None)):
        raise ValueError(f"{path}: expected commas between the columns, got {other!r}; save it as CSV with commas")
    columns = {}
    for what, names in _NAMES.items():
        found = [name for name in names if name in have]
        if not found:
            raise ValueError(
                f"{path}: expected a column {' or '.join(names)}, got the columns {', '.join(have) or 'none'}; one row "
                "per environment, method, seed and step"
            )
        columns[what] = found[0]
    runs: dict[tuple[str, str, int], dict[float, float]] = {}
    for line, row in enumerate(rows, 2):
        try:
            seed, step, value = int(row[columns["seed"]]), float(row[columns["step"]]), float(row[columns["return"]])
            if not (math.isfinite(step) and math.isfinite(value)):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}:{line}: expected a whole number in {columns['seed']!r} and finite numbers in "
                f"{columns['step']!r} and {columns['return']!r}, got "
                f"{[row[columns[k]] for k in ('seed', 'step', 'return')]}"
            ) from None
        points = runs.setdefault((row[columns["env"]], row[columns["agent"]], seed), {})
        if step in points:
            raise ValueError(f"{path}:{line}: step {step:g} of this run is in the file twice")
        points[step] = value
    for key, points in runs.items():
        steps = np.array(sorted(points))
        yield *key, steps, np.array([points[step] for step in steps])


def write_runs(curves: Iterable[tuple[str, str, int, Array, Array]], points: int = 50) -> str:
    """The table that :func:`read_others` reads, small enough to be kept with a figure: of every run at most ``points``
    rows at even places, the first and the last among them, with four significant digits; steps as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_NAMES)
    for env, agent, seed, steps, returns in curves:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).round().astype(int))
        writer.writerows((env, agent, seed, f"{steps[i]:.12g}", f"{returns[i]:.4g}") for i in kept)
    return text.getvalue()
