"""Gradients with a posterior against Monte-Carlo gradients: BAC at equal episodes, DBQPG and UAPG at equal samples.

    python scripts/studies/bayesian mountaincar --out results/bayesian --jobs 2
    python scripts/studies/bayesian dbqpg --out results/bayesian --jobs 2
    python scripts/studies/bayesian report --out results/bayesian --figures docs/figures

Every finished run is added to ``OUT/mountaincar.csv``, ``OUT/mountaincar_search.csv`` or ``OUT/dbqpg.csv``; the same
command again runs what is missing. ``report`` writes ``FIGURES/bayesian_*`` from what is there.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment import plots
from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.curves import Curve, Study
from scripts.studies.bayesian import runs

__all__ = ["DBQPG", "MountainCar", "Report", "main"]

Rows = list[dict[str, Any]]
NAMES = ("env", "method", "seed")
"""What tells runs apart; a run is never repeated with other settings in one file."""
SETTINGS = ("rate", "updates", "evaluate_every", "start_speed", "timesteps", "batch", "update", "targets")
"""All the others."""


@dataclass(frozen=True)
class MountainCar:
    """BAC against Monte Carlo and PPO, 5 episodes per update. Step sizes that the literature does not give are those
    with the highest mean return over the whole curve on the search seeds."""

    out: Path
    """Folder of the CSV files."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds that are reported."""
    search_seeds: tuple[int, ...] = (1000, 1001)
    """Seeds that step sizes are chosen on."""
    methods: tuple[str, ...] = tuple(runs.RATES)
    """bac, mc, mc-baseline (a linear baseline from the previous update's episodes), ppo."""
    updates: int = 200
    """Policy updates per run."""
    evaluate_every: int = 10
    """Updates between evaluations."""
    start_speed: float = 1.0
    """Episodes begin with a velocity within this share of the speed limit; 0: at rest."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""

    def __post_init__(self) -> None:
        _check(self, "methods", runs.RATES)
        if common := set(self.seeds) & set(self.search_seeds):
            raise ValueError(f"search_seeds: expected other seeds than the reported ones, got {sorted(common)} in both")
        if self.updates < 1 or self.evaluate_every < 1 or not 0.0 <= self.start_speed <= 1.0:
            got = (self.updates, self.evaluate_every, self.start_speed)
            raise ValueError(f"expected updates, evaluate_every >= 1 and start_speed in [0, 1], got {got}")

    def run(self) -> Rows:
        """Search, then the reported runs; the rows of the latter."""
        search = self.out / "mountaincar_search.csv"
        open_rates = {m: runs.RATES[m] for m in self.methods if len(runs.RATES[m]) > 1}
        tries = [
            self._run(f"{method} rate={rate:g}", rate, seed)
            for seed in self.search_seeds
            for method, rates in open_rates.items()
            for rate in rates
        ]
        rows = _complete(search, tries, self.jobs)
        best = {m: runs.RATES[m][0] for m in self.methods}
        for method, rates in open_rates.items():
            scores = {rate: _mean(rows, "return", method=f"{method} rate={rate:g}") for rate in rates}
            best[method] = max(scores, key=lambda rate: scores[rate])
            print(f"[bayesian] {method}: step size {best[method]:g} of {scores}", flush=True)
        final = [self._run(m, best[m], seed) for seed in self.seeds for m in self.methods]
        return _complete(self.out / "mountaincar.csv", final, self.jobs)

    def _run(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        return {
            "env": runs.CAR, "method": method, "seed": seed, "rate": rate, "updates": self.updates,
            "evaluate_every": self.evaluate_every, "start_speed": self.start_speed,
        }  # fmt: skip


@dataclass(frozen=True)
class DBQPG:
    """DBQPG and UAPG against the same agent without state kernel, whose direction is the Monte-Carlo gradient's."""

    out: Path
    """Folder of the CSV file."""
    envs: tuple[str, ...] = ("InvertedPendulum-v5", "Swimmer-v5")
    """Environment ids."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    methods: tuple[str, ...] = tuple(runs.GRADIENTS)
    """mc, dbqpg, uapg."""
    timesteps: tuple[int, ...] = (30_000, 150_000)
    """Environment steps of a run, per environment id."""
    batch: tuple[int, ...] = (1_000, 3_000)
    """Transitions per iteration, per environment id (the paper: 15,000)."""
    update: str = "trpo"
    """vanilla, natural or trpo."""
    targets: str = "returns"
    """returns (the paper on these tasks) or gae."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""

    def __post_init__(self) -> None:
        _check(self, "methods", runs.GRADIENTS)
        if not len(self.envs) == len(self.timesteps) == len(self.batch):
            got = (len(self.envs), len(self.timesteps), len(self.batch))
            raise ValueError(f"envs, timesteps, batch: expected one entry each per environment, got {got}")
        for name in ("timesteps", "batch"):
            if wrong := [x for x in getattr(self, name) if x < runs.STREAMS]:
                raise ValueError(f"{name}: expected at least {runs.STREAMS}, one per parallel environment, got {wrong}")

    def run(self) -> Rows:
        """All rows."""
        tasks = list(zip(self.envs, self.timesteps, self.batch))
        wanted = [
            {
                "env": env, "method": method, "seed": seed, "timesteps": steps, "batch": size,
                "update": self.update, "targets": self.targets,
            }
            for seed, (env, steps, size), method in itertools.product(self.seeds, tasks, self.methods)
        ]  # fmt: skip
        return _complete(self.out / "dbqpg.csv", wanted, self.jobs)


@dataclass(frozen=True)
class Report:
    """Tables and figures of the runs that are there."""

    out: Path
    """Folder of the CSV files."""
    figures: Path = Path("docs/figures")
    """Folder that bayesian_* is written to."""

    def run(self) -> Rows:
        """The rows that were reported."""
        found: Rows = []
        for name, (unit, metric, title, panels) in REPORTS.items():
            path = self.out / f"{name}.csv"
            if not path.exists():
                continue
            rows = read_rows(path)
            found += rows
            # beside the figure, so that it can be drawn again without training
            self.figures.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.figures / f"bayesian_{name}_runs.csv")
            command = (self.out / f"{name.removesuffix('_search')}.command").read_text(encoding="utf-8")
            parts = [curves(path, rows, column, label) for column, label in panels.items()]
            study = Study(metric, tuple(itertools.chain(*parts)), unit=unit)
            stem = self.figures / f"bayesian_{name}"
            plots.save(plots.learning_curves(study, title, command), stem)
            # one table per panel: the same runs from another start are no further task
            tables = [Study(metric, part, unit=unit).table() for part in parts]
            text = "\n".join(text for text, _ in tables)
            if "gp_seconds" in rows[0]:
                text += f"\n{costs(rows)}"
            text = f"`{command}`\n\n{text}\nSettings:\n\n{settings(rows)}"
            stem.with_suffix(".md").write_text(text, encoding="utf-8")
            lines = [line for _, table in tables for line in table.splitlines()]
            stem.with_suffix(".csv").write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
            print(text)
        if not found:
            names = ", ".join(f"{name}.csv" for name in REPORTS)
            raise ValueError(f"out: expected a folder with {names}, received {self.out} with none of them")
        return found


TRAINED: dict[str, str | None] = {"return": "starts as in training"}
REPORTS: dict[str, tuple[str, str, str, dict[str, str | None]]] = {
    "mountaincar": (
        "episode", "return of 100 episodes", "Two-action mountain car, at most 200 steps",
        TRAINED | {"rest_return": "starts near rest"},
    ),
    "mountaincar_search": ("episode", "return of 100 episodes", "Mountain car: search for step sizes", {**TRAINED}),
    "dbqpg": ("step", "training return", "Bayesian quadrature and Monte Carlo, the same agent", {"return": None}),
}  # fmt: skip
"""Name -> what curves are drawn against, what they show, title, columns and what they are called (None: as the env)."""


def _complete(path: Path, wanted: Rows, jobs: int) -> Rows:
    return complete(path, wanted, runs.play, jobs=jobs, name="bayesian", names=NAMES)


def _check(study: Any, name: str, known: Any) -> None:
    if wrong := [x for x in getattr(study, name) if x not in known]:
        raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(wrong)}")
    if study.jobs < 1 or not study.seeds:
        raise ValueError(f"expected jobs >= 1 and at least one seed, got {study.jobs} and {study.seeds}")


def _mean(rows: Rows, column: str, **which: str) -> float:
    return statistics.fmean(float(row[column]) for row in rows if all(row[k] == v for k, v in which.items()))


# -- tables -----------------------------------------------------------------------------------------------------------


def curves(path: Path, rows: Rows, column: str, label: str | None) -> tuple[Curve, ...]:
    """One learning curve per run, of a column, against episodes where they are counted, else against steps."""
    found, x = [], "episodes" if "episodes" in rows[0] else "steps"
    # in the order of the seeds: intervals must not depend on which run was ready first
    for env, method, seed in sorted({(row["env"], row["method"], int(row["seed"])) for row in rows}):
        mine = [row for row in rows if (row["env"], row["method"], int(row["seed"])) == (env, method, seed)]
        xs, ys = (np.array([float(row[name]) for row in mine]) for name in (x, column))
        found.append(Curve(path, label or env, method, seed, xs, ys))
    return tuple(found)


def costs(rows: Rows) -> str:
    """Processor seconds per 1,000 transitions: mean over runs of the medians over their iterations."""
    lines = [
        "Processor seconds per 1,000 transitions, one thread (mean over runs of the median iteration): kernel = its "
        "training step and the Fisher kernel's decomposition, solve = weights and gradient, step = the rest of the "
        "update; all = with the simulator. GP: kernel and solve.",
        "",
        "| env | method | kernel | solve | GP | step | all |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    columns = ("kernel_seconds", "solve_seconds", "gp_seconds", "step_seconds", "all_seconds")
    for env, method in dict.fromkeys((row["env"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["env"], row["method"]) == (env, method)]
        seeds = {row["seed"] for row in mine}
        cells = [
            statistics.fmean(statistics.median(float(r[c]) for r in mine if r["seed"] == seed) for seed in seeds)
            for c in columns
        ]
        lines.append(f"| {env} | {method} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(lines) + "\n"


def settings(rows: Rows) -> str:
    """One line per env and method."""
    words = [(row, " ".join(f"{k}={row[k]}" for k in SETTINGS if k in row)) for row in rows]
    return "\n".join(dict.fromkeys(f"* {row['method']} on {row['env']}: {text}" for row, text in words)) + "\n"


def main(argv: list[str]) -> Rows:
    """Run one of the commands; its rows."""
    torch.set_num_threads(1)
    commands: dict[str, Callable[..., Any]] = {"mountaincar": MountainCar, "dbqpg": DBQPG, "report": Report}
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    if not isinstance(study, Report):
        study.out.mkdir(parents=True, exist_ok=True)
        command = "python scripts/studies/bayesian " + shlex.join(argv)
        (study.out / f"{argv[0]}.command").write_text(command, encoding="utf-8")
    rows: Rows = study.run()
    return rows
