"""Do the claims' results hold for seeds that nobody has seen?

    python scripts/studies/rerun                 # twelve cells, some CPU minutes; writes docs/figures/rerun.csv and .md
    python scripts/studies/rerun --report        # the table again, from rerun.csv

A cell is one method of one claim at its tuned setting, with the scores of its test seeds in ``docs/figures/claims``.
The commit that last changed these files is the seed of the draw: it did not exist when they were made, so nobody could
choose the cells. Each drawn cell runs once, with a seed of 500 and up that no study and no earlier draw used. Where a
cell's n scores have mean m and deviation s, and runs are normal, a further run is in
``m +- t_{n - 1} s (1 + 1 / n)^(1 / 2)`` with probability .95.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.protocol import check_seeds
from ccrl.packages import ROOT
from ccrl.settings import Count, Settings
from ccrl.stats.student import binomial_tail, t_quantile
from scripts.studies.claims.claim import chosen
from scripts.studies.claims.study import CLAIMS, play

__all__ = ["Options", "cells", "drawn", "fresh", "main", "prediction", "table"]

FRESH = 500
"""Of the seeds; those of the claims are 100 to 119."""
LEVEL = 0.95


@dataclass(frozen=True)
class Options(Settings):
    """What is drawn, and where results go."""

    results: Path = ROOT / "docs" / "figures" / "claims"
    """The claims' cells are in this folder."""
    out: Path = ROOT / "docs" / "figures"
    """rerun.csv and rerun.md are written to this folder."""
    count: Count = 12
    """So many cells are drawn."""
    commit: str | None = None
    """The draw has this commit's hash as seed; unset, it is the last one that changed the results."""
    report: bool = False
    """Nothing runs; the table is made again from rerun.csv."""


def cells(folder: Path) -> dict[tuple[str, str, str], list[float]]:
    """``(claim, method, setting)`` to the scores of its test seeds, of the claims that have all of them."""
    found = {}
    for name, claim in CLAIMS.items():
        path = folder / f"{name}.csv"
        rows = read_rows(path) if path.exists() else []
        settings = chosen(claim, rows)
        for arm, text in settings.items():
            mine = {int(r["seed"]): float(r["score"]) for r in rows
                    if (r["purpose"], r["arm"], r["settings"]) == ("test", arm, text)}  # fmt: skip
            if set(claim.seeds("test")) <= mine.keys():
                found[name, arm, text] = [mine[seed] for seed in claim.seeds("test")]
    return found


def drawn(names: list[tuple[str, str, str]], commit: str, count: int) -> list[tuple[str, str, str]]:
    """``count`` of the sorted ``names`` without repetition; every commit draws its own."""
    if len(names) < count:
        raise ValueError(f"count: expected at most the {len(names)} cells there are, got {count}")
    return random.Random(int(commit, 16)).sample(sorted(names), count)


def prediction(scores: list[float]) -> tuple[float, float]:
    """Where a further run of normal ones is with probability .95."""
    n, mean = len(scores), statistics.fmean(scores)
    half = t_quantile((1 + LEVEL) / 2, n - 1) * statistics.stdev(scores) * math.sqrt(1 + 1 / n)
    return mean - half, mean + half


def main(options: Options) -> str:
    """Draw, run what rerun.csv lacks, write the table and return it."""
    path = options.out / "rerun.csv"
    if not options.report:
        torch.set_num_threads(1)
        commit = options.commit or _last_commit(options.results)
        have = cells(options.results)
        first = fresh(path, commit)
        seeds = range(first, first + options.count)
        check_seeds("test", seeds)
        wanted: list[dict[str, Any]] = []
        for seed, name in zip(seeds, drawn(list(have), commit, options.count)):
            low, high = prediction(have[name])
            claim, arm, settings = name
            wanted.append({
                "claim": claim, "arm": arm, "settings": settings, "seed": seed, "commit": commit,
                "runs": len(have[name]), "mean": statistics.fmean(have[name]), "low": low, "high": high,
            })  # fmt: skip
        complete(path, wanted, play, name="rerun")
    text = table(read_rows(path))
    write_atomic(options.out / "rerun.md", lambda file: file.write(text.encode()))
    print(text, end="")
    return text


def fresh(path: Path, commit: str) -> int:
    """The first seed of ``commit``'s draw: after all seeds of the draws that are before it in ``path``."""
    rows = read_rows(path) if path.exists() else []
    before = itertools.takewhile(lambda row: row["commit"] != commit, rows)
    return max((int(row["seed"]) + 1 for row in before), default=FRESH)


def _last_commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "log", "-1", "--format=%H", "--", "."]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not found:
        raise ValueError(f"commit: expected a hash where {folder} is in no repository, got None")
    return found


def _inside(row: dict[str, str]) -> bool:
    return float(row["low"]) <= float(row["score"]) <= float(row["high"])


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: the cells of the last draw, and how likely as many inside are if 95 % are the truth."""
    everything = [_inside(row) for row in rows]
    rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
    inside = [_inside(row) for row in rows]
    n, k = len(rows), sum(inside)
    fewer = 1.0 - binomial_tail(k + 1, n, LEVEL) if k < n else 1.0
    lines = [
        f"`python scripts/studies/rerun`: {n} cells of `docs/figures/claims`, drawn with the hash of the commit that "
        f"changed them last ({rows[0]['commit'][:12]}) as seed, each run once more with a fresh seed. **{k} of {n}** "
        "are inside the interval that holds a further run with probability .95 (as few or fewer: probability "
        f"{fewer:.2g}); of all draws so far, {sum(everything)} of {len(everything)}.",
        "", "| claim | method | setting | seed | score | of earlier runs: mean, interval for a further one | inside |",
        "|---|---|---|--:|--:|---|---|",
    ]  # fmt: skip
    for row, held in zip(rows, inside):
        score, mean, low, high = (f"{float(row[name]):.4g}" for name in ("score", "mean", "low", "high"))
        setting = ", ".join(f"{k} {v}" for k, v in json.loads(row["settings"]).items()) or "default"
        lines.append(f"| {row['claim']} | {row['arm']} | {setting} | {row['seed']} | {score} | "
                     f"{mean} [{low}, {high}] ({row['runs']} runs) | {'yes' if held else '**no**'} |")  # fmt: skip
    return "\n".join(lines) + "\n"
