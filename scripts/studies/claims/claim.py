"""What a claim is, how it is tested, and what the test says."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ccrl.experiment.cells import complete
from ccrl.experiment.protocol import SEEDS, check_seeds
from ccrl.stats import Difference, holm, paired_t

__all__ = ["Arm", "Claim", "Result", "chosen", "edge", "judge", "run"]

Rows = list[dict[str, str]]
Verdict = Literal["supported", "not supported", "contradicted"]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison."""

    name: str
    play: Callable[..., float] | None
    """``play(seed, **settings) -> score`` of one run; higher is better. None where a run needs more than that: its
    study plays it."""
    grid: tuple[dict[str, Any], ...]
    """Settings among which the tuning seeds choose."""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper as a difference of scores.

    Raises:
        ValueError: pairs of unknown arms, arms with grids of different size (the sides' tuning budgets must be equal),
            seeds outside their ranges.
    """

    name: str
    """``PAPER`` or ``PAPER.what``: the file of its results."""
    text: str
    """The claim, as this study tests it."""
    setting: str
    """Task, budget, what is equal on both sides."""
    score: str
    """What ``Arm.play`` returns, with its unit."""
    arms: tuple[Arm, ...]
    pairs: tuple[tuple[str, str], ...]
    """The first is claimed to score higher than the second."""
    tuning_seeds: int = 3
    test_seeds: int = 10

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if unknown := {name for pair in self.pairs for name in pair} - set(names):
            raise ValueError(f"{self.name}: expected pairs of {names}, got {sorted(unknown)}")
        if len({len(arm.grid) for arm in self.arms}) > 1:
            sizes = {arm.name: len(arm.grid) for arm in self.arms}
            raise ValueError(f"{self.name}: expected as many settings for every arm, got {sizes}; equal tuning budgets")
        check_seeds("tune", self.seeds("tune"))
        check_seeds("test", self.seeds("test"))

    @property
    def paper(self) -> str:
        return self.name.partition(".")[0]

    def seeds(self, purpose: Literal["tune", "test"]) -> range:
        """As many as the claim has, from the start of their range."""
        count = self.tuning_seeds if purpose == "tune" else self.test_seeds
        start = SEEDS[purpose].start
        return range(start, start + count)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Result:
    """One comparison."""

    better: str
    worse: str
    settings: tuple[str, str]
    """The tuned ones, as JSON."""
    scores: tuple[float, float]
    """Means over the test seeds."""
    difference: Difference
    adjusted: float
    """Holm's p value over the comparisons of the claim."""

    @property
    def verdict(self) -> Verdict:
        """At the level .05, two-sided."""
        if self.adjusted >= 0.05:
            return "not supported"
        return "supported" if self.difference.difference > 0 else "contradicted"


def run(claim: Claim, path: Path, play: Callable[[dict[str, Any]], Any], jobs: int = 1) -> Rows:
    """All cells of the claim into ``path``: every setting on the tuning seeds, then each arm's best on the test seeds.

    ``play(cell)`` runs a cell (a function of a module, so that other processes find it)."""
    tuned = [
        _cell(claim, "tune", arm, settings, seed)
        for seed in claim.seeds("tune") for arm in claim.arms for settings in arm.grid
        if len(arm.grid) > 1
    ]  # fmt: skip
    rows = complete(path, tuned, play, jobs=jobs, name=claim.name) if tuned else []
    tests = [
        _cell(claim, "test", arm, best(claim, arm, rows), seed) for seed in claim.seeds("test") for arm in claim.arms
    ]
    return rows + complete(path, tests, play, jobs=jobs, name=claim.name)


def _cell(claim: Claim, purpose: str, arm: Arm, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        "claim": claim.name, "purpose": purpose, "arm": arm.name, "settings": json.dumps(settings, sort_keys=True),
        "seed": seed, "torch": torch.__version__.partition("+")[0], "threads": 1,
    }  # fmt: skip


def best(claim: Claim, arm: Arm, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The setting with the highest mean over the tuning seeds (the first of equals)."""

    def mean(settings: dict[str, Any]) -> float:
        text = json.dumps(settings, sort_keys=True)
        mine = [float(row["score"]) for row in rows
                if (row["purpose"], row["arm"], row["settings"]) == ("tune", arm.name, text)]  # fmt: skip
        return statistics.fmean(mine) if mine else -math.inf

    return arm.grid[0] if len(arm.grid) == 1 else max(arm.grid, key=mean)


def chosen(claim: Claim, rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """The best settings of every arm, as JSON."""
    return {arm.name: json.dumps(best(claim, arm, rows), sort_keys=True) for arm in claim.arms}


def edge(arm: Arm, settings: str) -> str:
    """A best value at the end of its grid says that the grid was too short for this arm; of two values one always is,
    which is said as well: the other side may have tried larger ones."""
    chosen, ends = json.loads(settings), []
    for name, value in chosen.items():
        tried = {setting[name] for setting in arm.grid if isinstance(setting[name], float)}
        if len(tried) == 2:
            ends.append(f"{name} is the {'smaller' if value == min(tried) else 'larger'} of two tried")
        elif len(tried) > 2 and value in (min(tried), max(tried)):
            ends.append(f"{name} is the {'smallest' if value == min(tried) else 'largest'} of its grid")
    return f" ({', '.join(ends)})" if ends else ""


def judge(claim: Claim, rows: Sequence[dict[str, str]]) -> list[Result]:
    """The paired differences of the test seeds, with Holm's correction over the claim's comparisons. Rows of other
    settings than the best of today's grid are those of an earlier grid, and are left alone."""
    settings = chosen(claim, rows)
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["purpose"] == "test" and row["settings"] == settings[row["arm"]]:
            scores.setdefault(row["arm"], {})[int(row["seed"])] = float(row["score"])
    lists = {name: [found[seed] for seed in claim.seeds("test")] for name, found in scores.items()}
    pairs = [paired_t(lists[a], lists[b]) for a, b in claim.pairs]
    adjusted = holm([pair.p for pair in pairs])
    return [
        Result(a, b, (settings[a], settings[b]), (statistics.fmean(lists[a]), statistics.fmean(lists[b])), pair, p)
        for (a, b), pair, p in zip(claim.pairs, pairs, adjusted.tolist())
    ]
