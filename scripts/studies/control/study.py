"""Control methods compared in one setting.

    python scripts/studies/control                      # everything, about 4 CPU hours, and the page
    python scripts/studies/control CartPole-v1          # one task
    python scripts/studies/control --page-only          # the page and the figure again, from the runs there are

Finished runs are lines of ``OUT/control.csv``: the same command goes on where it stopped, task by task. On each task
every method's step size is chosen on the seeds 1000 and 1001 and reported on 100, 101, ... (docs/protocol.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.protocol import SEEDS, Purpose, check_seeds
from ccrl.packages import ROOT
from scripts.studies.control import report
from scripts.studies.control.runs import ARMS, play
from scripts.studies.control.tasks import TASKS, TUNING_SEEDS, Task

__all__ = ["Options", "best", "cells", "main"]

FIGURES = ROOT / "docs" / "figures"
NAMES = ("task", "arm", "purpose", "value", "seed")


@dataclass(frozen=True)
class Options:
    """What is run, and where results go."""

    tasks: tyro.conf.Positional[tuple[str, ...]] = ()
    """These tasks are run, in the order of the page; none named: all."""
    out: Path = FIGURES
    """control.csv and control_steps.png are written to this folder."""
    page: Path | None = None
    """The page is written here; by default docs/control.md, or into OUT if that is another folder."""
    page_only: bool = False
    """Nothing runs; the page is made from the runs there are."""
    jobs: int = 1
    """So many runs go at a time, each a process with one thread."""

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")


def cells(task: Task, purpose: Purpose, values: Mapping[str, tuple[float, ...]]) -> list[dict[str, Any]]:
    """One per seed, method and value; the methods of a seed follow each other, so that what is there of a killed study
    is a comparison."""
    count = TUNING_SEEDS if purpose == "tune" else task.seeds
    seeds = range(SEEDS[purpose].start, SEEDS[purpose].start + count)
    check_seeds(purpose, seeds)
    steps, points = (task.tuning_steps, 10) if purpose == "tune" else (task.steps, 20)
    return [
        {"task": task.id, "arm": arm, "purpose": purpose, "setting": ARMS[arm].setting, "value": value, "seed": seed,
         "num_envs": 16, "steps": steps, "points": points}
        for seed in seeds for arm in values for value in values[arm]
    ]  # fmt: skip


def best(rows: list[dict[str, str]], arm: str) -> float:
    """The value with the highest return on the tuning seeds, as a mean over seeds and evaluations (the smallest of
    equals): what learns fast and stays."""

    def mean(value: float) -> float:
        mine = [report.area(row) for row in rows if row["arm"] == arm and float(row["value"]) == value]
        return float(np.mean(mine))

    return max(ARMS[arm].values, key=mean)


def main(options: Options) -> str:
    """Run what is missing, and write page and figure; returns the page."""
    path = options.out / "control.csv"
    for name, task in TASKS.items():
        if options.page_only or (options.tasks and name not in options.tasks):
            continue
        tuning = cells(task, "tune", {arm: ARMS[arm].values for arm in ARMS})
        rows = complete(path, tuning, play, jobs=options.jobs, name=f"{name} tune", names=NAMES)
        chosen = {arm: (best(rows, arm),) for arm in ARMS}
        complete(path, cells(task, "test", chosen), play, jobs=options.jobs, name=name, names=NAMES)
        _write(options, path)
    return _write(options, path)


def _write(options: Options, path: Path) -> str:
    rows = read_rows(path) if path.exists() else []
    usual = ROOT / "docs" / "control.md" if options.out.resolve() == FIGURES else options.out / "control.md"
    text = report.page(rows)
    write_atomic(options.page or usual, lambda file: file.write(text.encode()))
    report.figure(rows, options.out / "control_steps.png")
    return text
