"""Flow policies: proxy and gold rewards, steps to a reward, students and their teachers, control (docs/flow.md).

    python scripts/studies/flow guard --out results/flow        # a proxy that can be hacked: with and without Guard
    python scripts/studies/flow guard_grid --out results/flow   # clip ranges, on seeds from 1000 on (docs/protocol.md)
    python scripts/studies/flow guard_test --out results/flow   # the best of each, on seeds from 100 on
    python scripts/studies/flow awm --out results/flow          # AWM, Flow-GRPO and rivals at equal samples and updates
    python scripts/studies/flow opd --out results/flow          # students, joint training and a cascade
    python scripts/studies/flow opd_scales --out results/flow   # the same with rewards of three sizes
    python scripts/studies/flow gridworld --out results/flow    # several right actions
    python scripts/studies/flow maze --out results/flow         # fine-tuning of a cloned flow actor
    python scripts/studies/flow hopper --out results/flow       # the same on Hopper, from middling episodes of PPO
    python scripts/studies/flow variance                        # of gradients, by how conditions and times are drawn
    python scripts/studies/flow pictures --figures docs/figures # samples over training, trajectories

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/flow_NAME.md``, ``.csv`` and ``.png`` are written.
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.protocol import SEEDS, Purpose, check_seeds
from ccrl.stats import paired_t, t_interval
from scripts.studies import tables
from scripts.studies.command import choose
from scripts.studies.flow.cells import CONTROL, METHODS, play
from scripts.studies.flow.pictures import Pictures
from scripts.studies.flow.variance import Variance
from scripts.studies.look import look
from scripts.studies.tables import Rows

__all__ = ["Study", "chosen", "gold_at", "main", "steps_to"]

GOLD = ("largest gold", "gold at proxy 0.5", "gold at proxy 0.8")
"""What is asked of runs on a proxy."""
DATA = 0.15 * math.sqrt(math.pi / 2.0)
"""Mean distance of normal samples of deviation .15 in the plane to their mode."""
BAND = 5
"""Runs from which on a band is drawn: Student's of three leaves every scale, and the runs say more."""
PURPOSES: dict[str, Purpose] = {"guard_grid": "tune", "guard_test": "test"}


@dataclass(frozen=True)
class Plan:
    """What a study is on its page."""

    iterations: int
    every: int
    """Iterations between measurements."""
    seeds: int
    shown: tuple[str, ...]
    """Columns of its table and its picture."""


WORDS = {"reward": "mean reward", "gold": "gold reward", "distance": "distance to the data",
         "lowest": "reward of the worst task", "both": "smaller share of two right moves"}  # fmt: skip
HACKED, TASKS = ("reward", "gold", "distance"), ("reward", "lowest")
PLANS = {
    "guard": Plan(60, 5, 5, HACKED), "guard_grid": Plan(60, 5, 3, HACKED), "guard_test": Plan(60, 5, 10, HACKED),
    "awm": Plan(200, 10, 5, ("reward", "distance")), "opd": Plan(150, 25, 3, TASKS),
    "opd_scales": Plan(600, 50, 3, TASKS), "gridworld": Plan(150, 25, 3, ("reward", "gold", "both")),
    "maze": Plan(60, 10, 3, ("reward",)), "hopper": Plan(500, 50, 3, ("reward",)),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One of the studies."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that flow_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    seeds: int = 0
    """Runs of each method; 0: as many as on the page."""
    first: int | None = None
    """The first of their seeds; unset, that of the study: 1000 where settings are chosen, 100 where the chosen ones
    are compared, else 0."""
    iterations: int = 0
    """Iterations of each run; 0: as many as on the page."""
    every: int = 0
    """Iterations between measurements; 0: as on the page."""
    name: tyro.conf.Suppress[str] = "guard"

    @property
    def guards(self) -> bool:
        """Whether a proxy is trained on."""
        return self.name.startswith("guard")

    @property
    def methods(self) -> tuple[str, ...]:
        """What runs."""
        if self.name != "guard_test":
            return tuple(METHODS[self.name])
        path = self.out / "guard_grid.csv"
        if not path.exists():
            raise ValueError(f"out: expected the runs of guard_grid in {path}, got none; run guard_grid first")
        return chosen(_typed(read_rows(path)))

    def run(self) -> Rows:
        """Every point of every curve."""
        plan, purpose = PLANS[self.name], PURPOSES.get(self.name)
        first = self.first if self.first is not None else SEEDS[purpose].start if purpose else 0
        seeds = range(first, first + (self.seeds or plan.seeds))
        if purpose:
            check_seeds(purpose, seeds)
        cells = [
            {"study": self.name, "method": method, "seed": seed, "iterations": self.iterations or plan.iterations,
             "every": self.every or plan.every}
            for seed in seeds
            for method in self.methods
        ]  # fmt: skip
        run = partial(play, out=self.out)
        rows = complete(self.out / f"{self.name}.csv", cells, run, jobs=self.jobs, name=f"flow {self.name}")
        return _typed(rows)

    def table(self, rows: Rows) -> list[Rows]:
        """Last points, mean and 95 % interval over seeds; what a study asks for beside them."""
        out = Rows()
        for method in _methods(rows):
            runs = _runs(rows, method)
            row: dict[str, Any] = {"method": method, "seeds": len(runs)}
            for column in PLANS[self.name].shown:
                row |= _interval(column, [run[-1][column] for run in runs])
                row |= {f"{column} at the start": statistics.fmean(run[0][column] for run in runs)}
            if self.name == "awm":
                best = max(r["reward"] for r in rows)
                found = [steps_to(run, 0.9 * best) for run in runs]
                row |= {f"iterations to {0.9 * best:.3g} (median)": statistics.median(found),
                        "runs that reach it": sum(math.isfinite(x) for x in found)}  # fmt: skip
            for column in GOLD if self.guards else ():
                row |= _interval(column, [_number(run, column) for run in runs])
            out.append(row)
        return [out, *self.pairs(rows)]

    def pairs(self, rows: Rows) -> list[Rows]:
        """Paired differences over seeds of the page's questions."""
        methods = _methods(rows)
        asked = {
            "guard": [("grpo_guard", "flow_grpo, eps 2e-2", "gold at proxy 0.5"),
                      ("grpo_guard, eps 2e-4", "flow_grpo", "gold at proxy 0.5"),
                      ("grpo_guard", "flow_grpo", "gold at proxy 0.5")],
            "guard_test": [(methods[-1], methods[0], column) for column in GOLD],
            "awm": [("awm", "flow_grpo", "reward"), ("awm", "diffusion_nft", "reward")],
            "opd": [("closed", "policy gradient", "reward"), ("closed", "joint awm", "lowest"),
                    ("closed", "cascade awm", "lowest")],
            "opd_scales": [("student", "joint", "lowest"), ("student", "joint, deviation of the group", "lowest"),
                           ("student", "cascade", "lowest")],
        }.get(self.name, [])  # fmt: skip
        found = Rows()
        for a, b, column in asked:
            pairs = [[_number(run, column) for run in _runs(rows, method)] for method in (a, b)]
            if len(pairs[0]) > 1 and all(map(math.isfinite, [*pairs[0], *pairs[1]])):
                mean, low, high = paired_t(pairs[0], pairs[1])[:3]
                found.append({"difference": f"{a} less {b}", "of": column, "mean": float(mean),
                              "95 % from": float(low), "to": float(high)})  # fmt: skip
        return [found] if found else []

    def figure(self, rows: Rows) -> Figure:
        """Mean over seeds by iteration and its 95 % interval; of proxies also every run's gold against its proxy."""
        shown, methods = PLANS[self.name].shown, _methods(rows)
        panels = len(shown) + self.guards
        columns = 2 if panels > 1 else 1
        lines = -(-panels // columns)
        page = Figure(figsize=(6.0, 2.6 * lines + 0.25 * (3 + len(methods) // 2)), layout="constrained")
        axes = page.subplots(lines, columns, squeeze=False).flatten()
        for axis in axes[panels:]:
            axis.remove()
        for i, method in enumerate(methods):
            runs = _runs(rows, method)
            x = [p["iteration"] for p in runs[0]]
            for axis, column in zip(axes, shown):
                values = np.array([[p[column] for p in run] for run in runs])
                if len(runs) >= BAND:
                    _, low, high = t_interval(values.T)
                    axis.fill_between(x, low, high, color=look(i)["color"], alpha=0.12, linewidth=0)
                for run in values if 1 < len(runs) < BAND else ():
                    axis.plot(x, run, linewidth=0.6, **look(i))
                # thinner and thinner: curves that coincide all show
                axis.plot(x, values.mean(0), label=method, linewidth=3.0 - 0.3 * i, **look(i))
                # a method that leaves the data soon would hide the others
                axis.set(xlabel="iterations", ylabel="return of an episode" if self.name in CONTROL else WORDS[column],
                         yscale="log" if self.guards and column == "distance" else "linear")  # fmt: skip
            if self.guards:
                for run in runs:
                    axes[panels - 1].plot(
                        [p["reward"] for p in run], [p["gold"] for p in run], linewidth=0.9, **look(i)
                    )
        if self.guards:
            ticks = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
            axes[panels - 1].set(xlabel="proxy reward (every run)", ylabel="gold reward", xscale="log")
            axes[panels - 1].set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes[panels - 1].minorticks_off()
            axes[panels - 1].set_xlim(0.13, 1.1 * max(row["reward"] for row in rows))
            axes[panels - 1].axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
            axes[panels - 1].set_title("dotted: where gold is compared", fontsize=9)
        if self.name == "awm":
            axes[1].axhline(DATA, color="0.3", linewidth=0.8, linestyle=":")
            axes[1].set(ylim=(0.0, None))
            axes[1].set_title("dotted: of the data, .188", fontsize=9)
        for axis in axes[:panels]:
            axis.grid(color="0.92")
        handles, names = axes[0].get_legend_handles_labels()
        page.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
        seeds = len({row["seed"] for row in rows})
        kind = "band: 95 % (Student's t)" if seeds >= BAND else "thin: each"
        page.suptitle(f"{self.name}: mean of {seeds} seeds; {kind}", fontsize=10)
        return page


def chosen(rows: Rows) -> tuple[str, ...]:
    """Of each method the clip range whose runs have the largest gold reward on their way, on average."""
    best: dict[str, tuple[float, str]] = {}
    for method in _methods(rows):
        score = statistics.fmean(_number(run, "largest gold") for run in _runs(rows, method))
        name = method.partition(",")[0]
        best[name] = max(best.get(name, (-math.inf, "")), (score, method))
    return tuple(method for _, method in best.values())


def steps_to(run: Rows, reward: float) -> float:
    """The first measured iteration with at least this reward; infinite if there is none."""
    return next((p["iteration"] for p in run if p["reward"] >= reward), math.inf)


def gold_at(run: Rows, proxy: float) -> float:
    """The gold reward where the proxy passes ``proxy``, between the two measurements around it; NaN if it never
    does."""
    for before, after in itertools.pairwise(run):
        if before["reward"] < proxy <= after["reward"]:
            share = (proxy - before["reward"]) / (after["reward"] - before["reward"])
            return float(before["gold"] + share * (after["gold"] - before["gold"]))
    return math.nan


def _number(run: Rows, column: str) -> float:
    """A column's last value, or one of ``GOLD``."""
    if column == "largest gold":
        return float(max(p["gold"] for p in run))
    if column.startswith("gold at proxy"):
        return gold_at(run, float(column.split()[-1]))
    return float(run[-1][column])


def _typed(rows: list[dict[str, str]]) -> Rows:
    texts = ("study", "method")
    return [{k: v if k in texts else float(v or "nan") for k, v in row.items()} for row in rows]


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _runs(rows: Rows, method: str) -> list[Rows]:
    own = [row for row in rows if row["method"] == method]
    return [[row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})]


def _interval(name: str, values: list[float]) -> dict[str, float]:
    kept = [v for v in values if math.isfinite(v)]
    if len(kept) < 2:
        return {name: kept[0] if kept else math.nan}
    mean, low, high = (float(x) for x in t_interval(kept))
    return {name: mean, f"{name} 95 % from": low, f"{name} to": high}


def main(argv: list[str]) -> list[Rows]:
    """Run one of the studies and write its files; its tables."""
    torch.set_num_threads(1)
    name = choose(argv, (*METHODS, "variance", "pictures"), __doc__)
    if name in ("variance", "pictures"):
        kind: Any = {"variance": Variance, "pictures": Pictures}[name]
        rows: list[Rows] = tyro.cli(kind, args=argv[1:], description=__doc__, prog=f"flow {name}").run()
        return rows
    study = tyro.cli(Study, args=argv[1:], description=__doc__, default=Study(tyro.MISSING), prog=f"flow {name}")
    study = replace(study, name=name)
    runs = study.run()
    found = study.table(runs)
    stem, command = study.figures / f"flow_{name}", "python scripts/studies/flow " + shlex.join(argv)
    tables.write(stem, command, found[0], runs, *found[1:])
    study.figure(runs).savefig(stem.with_suffix(".png"), dpi=100)
    return found
