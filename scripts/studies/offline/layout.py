"""What the pages of the offline studies have in common: a value per seed, lines of acceptance, what made the runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ccrl.stats import t_interval
from scripts.studies.tables import Rows

__all__ = ["Page", "groups", "line", "made_by", "mean", "seeds", "spread", "undecided"]


@dataclass(frozen=True)
class Page:
    """What is shown of a study's rows."""

    tables: Callable[[Rows], list[Rows]]
    figure: Callable[[Rows], Figure] | None = None
    title: str = "means of {n} seeds; a thin line is one seed"
    """Of the figure; ``{n}`` is the number of seeds."""


def groups(rows: Rows, *names: str) -> dict[tuple[Any, ...], Rows]:
    """Rows by the values of these columns, in order of appearance."""
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[n] for n in names), []).append(row)
    return found


def seeds(rows: Rows, column: str) -> str:
    """Values, one per run."""
    return " / ".join(f"{row[column]:.4g}" for row in rows)


def mean(rows: Iterable[dict[str, Any]], column: str) -> float:
    """Over rows."""
    return statistics.fmean(row[column] for row in rows)


def line(text: str, holds: Iterable[bool], found: str) -> dict[str, Any]:
    """A row of the table of acceptance."""
    flags = list(holds)
    some = f" ({sum(flags)} of {len(flags)})" if len(flags) > 1 else ""
    verdict = "open" if not flags else "yes" if all(flags) else f"no{some}"
    return {"expected": text, "holds": verdict, "found": found}


def undecided(table: Rows, done: int, runs: int) -> Rows:
    """A table while runs are missing: nothing is decided by those there are."""
    if done >= runs:
        return table
    return [row | {k: f"open ({done} of {runs} runs)" for k in ("holds", "verdict") if k in row} for row in table]


def made_by(rows: Rows, done: int, runs: int) -> str:
    """How many of the runs are there and what made them, in a line."""
    count = f"All {runs} runs." if done >= runs else f"**{done} of {runs} runs are there.**"
    commits = sorted({str(row.get("commit", "")) for row in rows} - {""})
    unknown = any(not row.get("commit") for row in rows)
    names = [*commits, *(["of older rows unknown"] if unknown else [])]
    versions = sorted({str(row["torch"]) for row in rows if row.get("torch")})
    return f"{count} Commit: {', '.join(names)}; PyTorch {', '.join(versions) or 'of a version not kept'}, one thread."


def spread(rows: Rows, column: str) -> str:
    """Mean and Student's 95 % interval."""
    values = [row[column] for row in rows]
    if len(values) < 2:
        return f"{values[0]:.4g}"
    middle, low, high = (float(x) for x in t_interval(values))
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"
