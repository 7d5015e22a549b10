"""What 95 % intervals cover when there are few runs (docs/statistics.md).

    python scripts/studies/coverage --out docs/figures

Draws many data sets of ``n`` runs from a known distribution and counts how often each interval holds the true value.
Writes ``interval_coverage.csv`` and ``interval_coverage.md``; a minute on one core.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import numpy as np
import tyro
from numpy.typing import NDArray

from ccrl.seeding import stream_seed
from ccrl.stats import iqm, t_interval, tolerance_interval, tolerance_runs, trimmed_t_interval

__all__ = ["DISTRIBUTIONS", "Options", "main", "rows"]

Array = NDArray[np.float64]
Bounds = tuple[Array, Array]


def _bimodal(generator: np.random.Generator, shape: tuple[int, int]) -> Array:
    """Most seeds solve the task, 3 of 10 do not: 1 +- .1 and 0 +- .1."""
    return (generator.random(shape) < 0.7) + 0.1 * generator.normal(size=shape)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape),
    "bimodal": _bimodal,
}
"""Normal; exponential; a mixture of solved and failed runs."""


@dataclass(frozen=True)
class Options:
    """The simulation."""

    out: Path = Path("docs/figures")
    """Folder that interval_coverage.csv and .md are written to."""
    runs: tuple[int, ...] = (3, 5, 8, 10, 20)
    """Runs per data set."""
    data_sets: int = 4000
    """Data sets per distribution and number of runs: the standard error of a coverage of .95 is .0034."""
    repetitions: int = 1000
    """Bootstrap repetitions per data set."""
    seed: int = 0
    """Seeds the draws."""

    def __post_init__(self) -> None:
        if min(*self.runs, 99) < 2 or self.data_sets < 1 or self.repetitions < 1:
            raise ValueError(f"expected runs >= 2, data_sets >= 1 and repetitions >= 1, got {self}")


def bootstrap(
    x: Array, statistic: Callable[[Array], Array], repetitions: int, generator: np.random.Generator
) -> Bounds:
    """The percentile interval of ``ccrl.stats.stratified_bootstrap`` for one task, of every row of ``x [D, n]``."""
    low, high = np.empty(len(x)), np.empty(len(x))
    chunk = max(1, 4_000_000 // (repetitions * x.shape[1]))
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk]
        index = generator.integers(x.shape[1], size=(len(part), repetitions, x.shape[1]))
        drawn = statistic(part[np.arange(len(part))[:, None, None], index])
        low[start : start + chunk], high[start : start + chunk] = np.quantile(drawn, (0.025, 0.975), axis=1)
    return low, high


def rows(options: Options) -> Iterator[dict[str, object]]:
    """One per distribution, number of runs and interval: its coverage and mean width. Truths are those of a sample of
    a million; an IQM of fewer than four runs is their mean and is judged as one."""
    for name, draw in DISTRIBUTIONS.items():
        large = draw(np.random.default_rng(stream_seed(options.seed, "truth")), (1, 1_000_000))[0]
        mean, middle, ordered = float(large.mean()), float(iqm(large)), np.sort(large)
        for n in options.runs:
            generator = np.random.default_rng([options.seed, n])
            x = draw(generator, (options.data_sets, n))
            trimmed = mean if n < 4 else middle
            intervals: dict[str, tuple[float, Bounds]] = {
                "IQM, percentile bootstrap": (trimmed, bootstrap(x, iqm, options.repetitions, generator)),
                "IQM, trimmed t": (trimmed, trimmed_t_interval(x)[1:]),
                "mean, percentile bootstrap": (
                    mean, bootstrap(x, lambda v: v.mean(axis=-1), options.repetitions, generator),
                ),
                "mean, t": (mean, t_interval(x)[1:]),
            }  # fmt: skip
            for interval, (truth, (low, high)) in intervals.items():
                held = ((low <= truth) & (truth <= high)).astype(np.float64)
                yield _row(name, n, interval, held, high - low)
            if n >= tolerance_runs():
                _, low, high = tolerance_interval(x)
                share = (np.searchsorted(ordered, high) - np.searchsorted(ordered, low)) / len(ordered)
                yield _row(name, n, "half of all runs, tolerance", (share >= 0.5).astype(np.float64), high - low)


def _row(distribution: str, n: int, interval: str, held: Array, width: Array) -> dict[str, object]:
    return {"distribution": distribution, "runs": n, "interval": interval,
            "coverage": round(float(held.mean()), 4), "width": round(float(width.mean()), 4)}  # fmt: skip


def table(found: list[dict[str, object]], options: Options) -> str:
    """Coverage in per cent, a column per number of runs."""
    cells = {(r["distribution"], r["interval"], r["runs"]): r["coverage"] for r in found}
    lines = [
        f"Coverage in per cent of nominal 95 % intervals, {options.data_sets:,} data sets each "
        f"(`python scripts/studies/coverage`).",
        "",
        "| distribution | interval | " + " | ".join(f"n = {n}" for n in options.runs) + " |",
        "|---|---|" + "--:|" * len(options.runs),
    ]
    for distribution, interval in dict.fromkeys((r["distribution"], r["interval"]) for r in found):
        values = [cells.get((distribution, interval, n)) for n in options.runs]
        shown = ["" if v is None else f"{100 * float(str(v)):.1f}" for v in values]
        lines.append(f"| {distribution} | {interval} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(options: Options) -> str:
    """Simulate, write both files, and return the table."""
    found = list(rows(options))
    options.out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, found[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    (options.out / "interval_coverage.csv").write_text(text.getvalue())
    shown = table(found, options)
    (options.out / "interval_coverage.md").write_text(shown)
    print(shown, end="")
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
