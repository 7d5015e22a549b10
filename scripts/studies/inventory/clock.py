"""Processor seconds until the gap to the optimum is 1 %: HDPO's kernel beside the authors' way of unrolling.

Both sides train the same network from the same parameters on the same scenarios; the arithmetic is the same to
rounding (a test), so they need about as many updates. Step sizes and batches are chosen on tuning seeds, for each side
by its own seconds: a tuning cell trains once, with the kernel, and gives the other side that many updates at its
measured seconds per update. What is reported are runs of both on other seeds, each at its own choice, and at the
published settings.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.protocol import check_seeds
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.inventory.policies import OrderPolicy
from ccrl.native import library
from envs.inventory import InventoryEnv
from envs.inventory.oracle import oracle_cost
from scripts.bench.hdpo import INSTANCES, Config, Sides
from scripts.studies.inventory.cells import adjusted, control_policy

__all__ = ["Clock", "chosen", "table", "to_gap"]

Cell = dict[str, Any]
PUBLISHED = 1024, 3e-3
"""Batch and step size of the authors' settings for one store (a batch of 8,192, or of 1,024)."""
SIDES = ("ours", "theirs")


@dataclass(frozen=True)
class Clock:
    """Seconds to a gap of 1 %: first ``--purpose tune``, then ``--purpose test``, which reads its choice."""

    out: Path
    """Folder of the CSV files."""
    purpose: Literal["tune", "test"]
    """tune: a grid of batches and step sizes; test: what it chose for each side, and the published settings."""
    only: tuple[str, ...] = tuple(INSTANCES)
    """Instances: one store, lost sales (lead time 2) or backlogged (lead time 4), underage 9."""
    seeds: tuple[int, ...] = ()
    """Of networks and scenarios; none: 1000 1001 to tune, 100 to 104 to test."""
    batches: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Of the grid."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Step sizes of the grid."""
    most: int = 2000
    """Updates before a run gives up."""
    tests: int = 1000
    """Test scenarios of 200 periods, after a warm-up of 100."""
    jobs: int = 1
    """Cells at a time, each a process of one torch thread."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.only) - set(INSTANCES)):
            raise ValueError(f"only: expected some of {', '.join(INSTANCES)}, got {unknown}")
        check_seeds(self.purpose, self._seeds())

    def _seeds(self) -> tuple[int, ...]:
        return self.seeds or ((1000, 1001) if self.purpose == "tune" else (100, 101, 102, 103, 104))

    def cells(self) -> dict[str, list[Cell]]:
        def cell(name: str, side: str, batch: int, rate: float, seed: int) -> Cell:
            return {
                "options": json.dumps(INSTANCES[name][1]), "instance": name, "side": side, "batch_size": batch,
                "learning_rate": rate, "seed": seed, "most": self.most, "tests": self.tests,
            }  # fmt: skip

        if self.purpose == "tune":
            grid = itertools.product(self._seeds(), self.only, self.batches, self.rates)
            return {"clock_tune": [cell(name, "ours", batch, rate, seed) for seed, name, batch, rate in grid]}
        best = chosen(read_rows(self.out / "clock_tune.csv"))
        found = [
            cell(name, side, *setting, seed)
            for seed, name in itertools.product(self._seeds(), self.only)
            for side in SIDES
            for setting in dict.fromkeys((best[name, side], PUBLISHED))
        ]
        return {"clock_test": found}


def chosen(rows: list[dict[str, str]]) -> dict[tuple[str, str], tuple[int, float]]:
    """Batch and step size by instance and side: the fewest mean seconds among the settings that always got there."""
    best: dict[tuple[str, str], tuple[int, float]] = {}
    for name, side in itertools.product(dict.fromkeys(row["instance"] for row in rows), SIDES):
        seconds: dict[tuple[int, float], list[float]] = {}
        for row in rows:
            if row["instance"] == name:
                key = int(row["batch_size"]), float(row["learning_rate"])
                seconds.setdefault(key, []).append(
                    float(row[f"{side}, s"]) if row["reached"] == "True" else float("inf")
                )
        best[name, side] = min(seconds, key=lambda key: statistics.mean(seconds[key]))
    return best


def to_gap(cell: Cell, options: dict[str, Any]) -> Cell:
    """Train until a test finds a gap of at most 1 %; tests are not on the clock, compiling is."""
    config = Config(
        batch_size=cell["batch_size"], learning_rate=cell["learning_rate"], compile=("kernel",), seed=cell["seed"]
    )
    library.cache_clear()
    torch.manual_seed(cell["seed"])
    sides = Sides(config, cell["instance"], "kernel")
    gap_of = _gap_test(sides, cell["tests"])
    ours = cell["side"] == "ours"
    every = max(1, 12_800 // cell["batch_size"])
    updates, spent, gap, since = 0, 0.0, float("inf"), _processor()

    def after() -> bool:
        nonlocal updates, spent, gap, since
        updates += 1
        if updates % every == 0:
            spent += _processor() - since
            gap = gap_of(sides.policy(ours))
            since = _processor()
        return gap <= 1.0 or updates >= cell["most"]

    epoch = sides.epoch_of_ours if ours else sides.theirs.epoch
    while not epoch(after):
        pass
    row: Cell = {"updates": updates, "gap %": gap, "reached": gap <= 1.0, f"{cell['side']}, s": spent}
    if cell["side"] == "ours":
        row["theirs, s"] = updates * _seconds_per_update(sides)
    return row


def _processor() -> float:
    """CPU seconds of this process and of the compiler that it has called."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _seconds_per_update(sides: Sides, count: int = 16) -> float:
    """Of the authors' way, the loader included."""
    done, start = [0], time.process_time()

    def after() -> bool:
        done[0] += 1
        return done[0] >= count

    while not sides.theirs.epoch(after):
        pass
    return (time.process_time() - start) / done[0]


def _gap_test(sides: Sides, count: int) -> Callable[[OrderPolicy], float]:
    """Per cent above the optimum, with a policy of known cost as control variate."""
    task = sides.env.task
    env = InventoryEnv(task, periods=300, ignore=100)
    best, (control, expected) = oracle_cost(task), control_policy(env)
    assert best is not None
    scenarios = env.sample(count, torch.Generator().manual_seed(65))
    known = average_cost(Unrolled(env, control), scenarios)

    def gap(policy: OrderPolicy) -> float:
        costs = average_cost(Unrolled(env, policy), scenarios, whole_units=task.lost)
        return 100.0 * (adjusted(costs, known, expected)[0] / best - 1.0)

    return gap


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: seconds of both sides by instance, each at its own choice and both at the published settings; ratios of
    the medians, and the range of all pairs of equal seed."""
    lines = [
        "| instance | settings | ours: batch, rate, updates, s | theirs | theirs over ours |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["instance"] for row in rows):
        of = [row for row in rows if row["instance"] == name]
        for label, published in (("own", False), ("published", True)):
            sides = []
            for side in SIDES:
                mine = [r for r in of if r["side"] == side]
                same = {(int(r["batch_size"]), float(r["learning_rate"])) for r in mine}
                pick = PUBLISHED if published else next(iter(same - {PUBLISHED}), PUBLISHED)
                sides.append([r for r in mine if (int(r["batch_size"]), float(r["learning_rate"])) == pick])
            if not all(sides):
                continue
            pairs = sorted(
                float(b["theirs, s"]) / float(a["ours, s"])
                for a, b in itertools.product(*sides)
                if a["seed"] == b["seed"]
            )
            text = [_described(side, mine) for side, mine in zip(SIDES, sides)]
            ratio = f"{statistics.median(pairs):.1f} ({pairs[0]:.1f} to {pairs[-1]:.1f})"
            lines.append(f"| {name} | {label} | {text[0]} | {text[1]} | {ratio} |")
    return "\n".join(lines)


def _described(side: str, rows: list[dict[str, str]]) -> str:
    """Settings, median of updates, median and range of seconds."""
    seconds, updates = [float(r[f"{side}, s"]) for r in rows], statistics.median(int(r["updates"]) for r in rows)
    late = sum(r["reached"] != "True" for r in rows)
    return (
        f"{rows[0]['batch_size']}, {rows[0]['learning_rate']}, {updates:.0f}, {statistics.median(seconds):.2f} "
        f"({min(seconds):.2f} to {max(seconds):.2f})" + (f", {late} of {len(rows)} not there" if late else "")
    )
