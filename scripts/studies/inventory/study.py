"""HDPO on inventory networks, measured: gaps to computed optima, data efficiency, other methods, speed.

    python scripts/studies/inventory gaps --out results/inventory --jobs 2
    python scripts/studies/inventory data --out results/inventory --jobs 2
    python scripts/studies/inventory methods --out results/inventory --jobs 2
    python scripts/studies/inventory speed --out results/inventory
    python scripts/studies/inventory clock --purpose tune --out results/inventory     # and then --purpose test
    python scripts/studies/inventory report --out results/inventory --figures docs/figures

Every measurement is a cell (an instance, its settings, a seed), and becomes a row of ``OUT/NAME.csv`` when it is done.
The same command again measures what is left; other settings are other cells. Each cell runs on one torch thread.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.cells import CellsFailed, complete
from scripts.studies.inventory import cells, clock, methods
from scripts.studies.inventory import report as reports

__all__ = ["Data", "Gaps", "Methods", "Report", "Speed", "main", "run_study"]

Cell = dict[str, Any]
MEASURES = {"gaps": cells.gap, "data": cells.data_efficiency, "methods": methods.compare, "speed": cells.speed,
            "clock": clock.to_gap}  # fmt: skip


@dataclass(frozen=True)
class Gaps:
    """Gap of HDPO to the optimum (transshipment: to a lower bound)."""

    out: Path
    """Folder of the CSV files."""
    jobs: int = 1
    """Cells at a time, each a process."""
    only: tuple[str, ...] = ("lost", "serial", "backlog", "transshipment")
    """Kinds of instances."""
    seeds: tuple[int, ...] = ()
    """Agent seeds; none: 0, for transshipment 0 1 2. The report takes the seed with the best development cost."""
    lead_times: tuple[int, ...] = ()
    """Of the instances; none: all there are."""
    underages: tuple[float, ...] = ()
    """Underage costs of the instances; none: all there are."""
    budget: int | None = None
    """Epochs; None: those of the kind, twice as many from lead time 10 on (only the orders of the first periods of a
    training horizon meet demand in it)."""
    learning_rate: float | None = None
    """First step size; None: that of the kind."""
    tests: int | None = None
    """Test scenarios; None: those of the kind."""

    def __post_init__(self) -> None:
        _some("only", self.only, tuple(cells.KINDS))
        _positive(jobs=self.jobs, budget=self.budget, tests=self.tests)
        if not any(self.cells().values()):
            raise ValueError(
                f"lead_times, underages: expected those of some instance of {', '.join(self.only)}, got "
                f"{self.lead_times}, {self.underages}"
            )

    def cells(self) -> dict[str, list[Cell]]:
        return {f"gaps_{name}": list(self._of(cells.KINDS[name])) for name in self.only}

    def _wanted(self, instance: dict[str, Any]) -> bool:
        pairs = (self.lead_times, instance["lead_time"]), (self.underages, instance["underage"])
        return all(not some or value in some for some, value in pairs)

    def _of(self, kind: Any) -> Iterator[Cell]:
        # seeds first: a study that is cut short has every instance once
        for seed, policy, instance in itertools.product(self.seeds or kind.seeds, kind.policies, kind.instances):
            if not self._wanted(instance):
                continue
            epochs = kind.epochs * (2 if instance["lead_time"] >= 10 else 1)
            yield {
                    "env": kind.env, "options": json.dumps(instance), "policy": policy, "seed": seed,
                    "epochs": self.budget or epochs, "batch_size": kind.batch_size, "n_train": kind.n_train,
                    "n_dev": kind.n_dev, "dev_every": 5, "anneal_lr": True, "whole_units": kind.whole_units,
                    "learning_rate": self.learning_rate or kind.learning_rate, "tests": self.tests or kind.tests,
                }  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The GNN and the vanilla network on few and many training scenarios, one warehouse, equal numbers of updates."""

    out: Path
    """Folder of the CSV files."""
    jobs: int = 1
    """Cells at a time, each a process."""
    stores: int = 3
    """Stores of the network."""
    sizes: tuple[int, ...] = (16, 256, 8192)
    """Numbers of training scenarios."""
    policies: tuple[str, ...] = ("gnn", "vanilla")
    """Policies, each with its published step size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Agent seeds: networks and training scenarios."""
    budget: int = 512
    """Updates, a multiple of every size over the batch."""
    batch_size: int = 128
    """Scenarios per update; all of them where there are fewer."""
    n_dev: int = 256
    """Development scenarios that choose the parameters."""
    tests: int = 256
    """Test scenarios."""

    def __post_init__(self) -> None:
        _positive(jobs=self.jobs, budget=self.budget, batch_size=self.batch_size, tests=self.tests)
        for size in self.sizes:
            per_epoch = -(-size // self.batch_size)
            if size < 1 or self.budget % per_epoch:
                raise ValueError(
                    f"budget: expected a multiple of the {per_epoch} updates per epoch of {size} scenarios (all get "
                    f"equally many), got {self.budget}"
                )

    def cells(self) -> dict[str, list[Cell]]:
        return {"data": [self._cell(*x) for x in itertools.product(self.seeds, self.sizes, self.policies)]}

    def _cell(self, seed: int, size: int, policy: str) -> Cell:
        per_epoch = -(-size // self.batch_size)
        epochs = self.budget // per_epoch
        return {
            "env": "ccrl/InventoryOneWarehouseLost-v0", "options": json.dumps({"stores": self.stores}),
            "policy": policy, "seed": seed, "n_train": size, "epochs": epochs, "batch_size": min(size, self.batch_size),
            "n_dev": self.n_dev, "dev_every": max(1, epochs // 16), "anneal_lr": True, "learning_rate": None,
            "tests": self.tests,
        }  # fmt: skip


@dataclass(frozen=True)
class Methods:
    """HDPO, PPO and REINFORCE on four instances, each for a minute or two of one core."""

    out: Path
    """Folder of the CSV files."""
    jobs: int = 1
    """Cells at a time, each a process."""
    methods: tuple[str, ...] = ("hdpo", "ppo", "reinforce")
    """Which of them."""
    only: tuple[str, ...] = ("lost", "backlog", "serial", "transshipment")
    """Kinds of instances."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Agent seeds."""
    hdpo_samples: int = 25_600_000
    """Scenario periods of training."""
    ppo_samples: int = 3_200_000
    """The same for PPO: environment steps."""
    reinforce_samples: int = 12_800_000
    """The same for REINFORCE."""
    hdpo_rates: tuple[float, ...] = ()
    """Step sizes, falling to 0; none: the published one. The report takes the best by mean development cost."""
    ppo_rates: tuple[float, ...] = (3e-4, 1e-3)
    """Step sizes, falling to 0."""
    reinforce_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Step sizes."""
    tests: int = 500
    """Test scenarios."""
    n_train: int = 8192
    """Training scenarios of HDPO; the others see new demand in every episode."""

    def __post_init__(self) -> None:
        _some("methods", self.methods, ("hdpo", "ppo", "reinforce"))
        _some("only", self.only, tuple(cells.KINDS))
        samples = {name: getattr(self, name) for name in ("hdpo_samples", "ppo_samples", "reinforce_samples")}
        _positive(jobs=self.jobs, tests=self.tests, n_train=self.n_train, **samples)

    def cells(self) -> dict[str, list[Cell]]:
        rates = {"hdpo": self.hdpo_rates or (None,), "ppo": self.ppo_rates, "reinforce": self.reinforce_rates}
        alone = {"lead_time": 4, "underage": 9.0}
        several = {"stores": 3, "lead_time": 2, "underage": 4.0, "correlation": 0.5}
        instances = [(cells.KINDS[kind].env, several if kind == "transshipment" else alone) for kind in self.only]
        found = [
            {
                "env": env, "options": json.dumps(options), "method": method, "learning_rate": rate, "seed": seed,
                "samples": getattr(self, f"{method}_samples"),
                "n_train": self.n_train, "n_dev": 512, "scores": 16, "tests": self.tests,
            }
            for seed in self.seeds
            for env, options in instances
            for method in self.methods
            for rate in rates[method]
        ]  # fmt: skip
        return {"methods": found}


@dataclass(frozen=True)
class Speed:
    """Store-periods per second of HDPO's rollouts, forward and backward. One process; leave the machine alone."""

    out: Path
    """Folder of the CSV files."""
    threads: int = 2
    """Torch threads."""
    batches: tuple[int, ...] = (512, 2048, 8192)
    """Scenarios per update of the one-store network."""
    stores: tuple[int, ...] = (3, 5, 10, 20, 30, 50)
    """Stores of the one-warehouse network."""
    store_batch: int = 64
    """Scenarios per update there."""
    compiled: bool = True
    """Also with the compiled period (half a minute for every shape)."""
    rounds: int = 5
    """Measurements; the median counts."""
    jobs: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        _positive(threads=self.threads, rounds=self.rounds, store_batch=self.store_batch)

    def cells(self) -> dict[str, list[Cell]]:
        one = ("ccrl/InventoryOneStoreLost-v0", {"lead_time": 4})
        shapes = [(*one, "vanilla", batch) for batch in self.batches]
        many = "ccrl/InventoryOneWarehouseLost-v0"
        shapes += [(many, {"stores": k}, p, self.store_batch) for p in ("gnn", "vanilla") for k in self.stores]
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        found = [
            {
                "env": env, "options": json.dumps(options), "policy": policy, "batch_size": batch, "device": device,
                "compile": mode, "threads": self.threads, "rounds": self.rounds,
            }
            for device in devices
            for env, options, policy, batch in shapes
            for mode in ("off", *(("period",) if self.compiled and (env, options) == one else ()))
        ]  # fmt: skip
        return {"speed": found}


@dataclass(frozen=True)
class Report:
    """Tables and figures from the CSV files that are there."""

    out: Path
    """Folder of the CSV files."""
    figures: Path
    """Folder of the tables (Markdown) and figures; they are called inventory_*."""


def run_study(study: Any) -> int:
    """Measure the cells that are not in the CSV files yet; returns how many failed."""
    start, failed = time.perf_counter(), 0
    for name, wanted in study.cells().items():
        measure = partial(_measure, name.split("_")[0])
        try:
            rows = complete(study.out / f"{name}.csv", wanted, measure, jobs=study.jobs, name=name)
        except CellsFailed as error:
            failed += error.count
            continue
        if name == "clock_test":
            print(clock.table(rows), flush=True)
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes, {failed} cells failed", flush=True)
    return failed


def _measure(name: str, cell: Cell) -> list[Cell]:
    torch.set_num_threads(1)
    return [MEASURES[name](cell, json.loads(cell["options"]))]


def _some(name: str, got: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not got or set(got) - set(known):
        raise ValueError(f"{name}: expected some of {', '.join(known)}, got {' '.join(got) or 'none'}")


def _positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected >= 1, got {value}")


def main(argv: list[str]) -> int:
    """Run one of the studies, or report; returns the number of cells that failed."""
    commands: dict[str, Callable[..., Any]] = {
        "gaps": Gaps,
        "data": Data,
        "methods": Methods,
        "speed": Speed,
        "clock": clock.Clock,
        "report": Report,
    }
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    if isinstance(study, Report):
        for path in reports.write(study.out, study.figures):
            print(path)
        return 0
    return run_study(study)
