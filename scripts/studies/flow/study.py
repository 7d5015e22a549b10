"""Flow policies: proxy and gold rewards, steps to a reward, students and their teachers, control (docs/flow.md).

    python scripts/studies/flow guard --out results/flow        # a proxy that can be hacked: with and without Guard
    python scripts/studies/flow guard_grid --first 100 --out results/flow   # clip ranges, on seeds of their own
    python scripts/studies/flow guard_test --first 10 --out results/flow    # the best of each, on others
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

import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.cells import complete
from ccrl.stats import paired_t, t_interval
from scripts.studies import tables
from scripts.studies.flow.cells import CONTROL, METHODS, play
from scripts.studies.flow.pictures import Pictures
from scripts.studies.flow.variance import Variance
from scripts.studies.tables import Rows

__all__ = ["Study", "gold_at", "main", "steps_to"]

GOLD = ("largest gold", "gold at proxy 0.5", "gold at proxy 0.8")
"""What is asked of runs on a proxy."""


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
    "guard": Plan(60, 5, 5, HACKED), "guard_grid": Plan(60, 5, 2, HACKED), "guard_test": Plan(60, 5, 5, HACKED),
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
    first: int = 0
    """The first of their seeds: settings are chosen on others than they are compared on."""
    iterations: int = 0
    """Iterations of each run; 0: as many as on the page."""
    every: int = 0
    """Iterations between measurements; 0: as on the page."""
    name: tyro.conf.Suppress[str] = "guard"

    @property
    def guards(self) -> bool:
        """Whether a proxy is trained on."""
        return self.name.startswith("guard")

    def run(self) -> Rows:
        """Every point of every curve."""
        plan = PLANS[self.name]
        cells = [
            {"study": self.name, "method": method, "seed": seed, "iterations": self.iterations or plan.iterations,
             "every": self.every or plan.every}
            for seed in range(self.first, self.first + (self.seeds or plan.seeds))
            for method in METHODS[self.name]
        ]  # fmt: skip
        run = partial(play, out=self.out)
        rows = complete(self.out / f"{self.name}.csv", cells, run, jobs=self.jobs, name=f"flow {self.name}")
        texts = ("study", "method")
        return [{k: v if k in texts else float(v or "nan") for k, v in row.items()} for row in rows]

    def table(self, rows: Rows) -> list[Rows]:
        """Last points, mean and 95 % interval over seeds; what a study asks for beside them."""
        out = Rows()
        for method in METHODS[self.name]:
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
        asked = {
            "guard": [("grpo_guard", "flow_grpo, eps 2e-2", "gold at proxy 0.5"),
                      ("grpo_guard, eps 2e-4", "flow_grpo", "gold at proxy 0.5"),
                      ("grpo_guard", "flow_grpo", "gold at proxy 0.5")],
            "guard_test": [("grpo_guard, eps 0.0006", "flow_grpo, eps 0.002", column) for column in GOLD],
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

    def figure(self, rows: Rows, command: str) -> Figure:
        """Curves over iterations, seeds thin and their mean thick; of proxies also gold against proxy."""
        shown = PLANS[self.name].shown
        page = Figure(figsize=(max(5.5, 4.2 * (len(shown) + self.guards)), 3.8), layout="constrained")
        axes = page.subplots(1, len(shown) + self.guards, squeeze=False)[0]
        for i, method in enumerate(METHODS[self.name]):
            runs, style = _runs(rows, method), "--" if "KL" in method else "-"
            for axis, column in zip(axes, shown):
                x = [p["iteration"] for p in runs[0]]
                for run in runs:
                    axis.plot(x, [p[column] for p in run], color=f"C{i}", alpha=0.25, linewidth=0.8)
                mean = [statistics.fmean(run[k][column] for run in runs) for k in range(len(x))]
                axis.plot(x, mean, style, color=f"C{i}", label=method)
                axis.set(xlabel="iterations", ylabel="return of an episode" if self.name in CONTROL else WORDS[column])
            if self.guards:
                for run in runs:
                    proxy, gold = ([p[column] for p in run] for column in ("reward", "gold"))
                    axes[-1].plot(proxy, gold, style, color=f"C{i}", alpha=0.6)
                axes[-1].set(xlabel="proxy reward", ylabel="gold reward")
        handles, names = axes[0].get_legend_handles_labels()
        page.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), fontsize=8)
        page.supxlabel(command, x=0.005, ha="left", fontsize=6, color="0.4")  # the layout keeps room for it
        return page


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
    if argv[:1] == ["pictures"]:
        return tyro.cli(Pictures, args=argv[1:], description=__doc__).run()
    if argv[:1] == ["variance"]:
        return tyro.cli(Variance, args=argv[1:], description=__doc__).run()
    if not argv or argv[0] not in METHODS:
        raise ValueError(
            f"expected one of {', '.join(METHODS)}, pictures, variance and options, got {argv[:1] or 'nothing'}"
        )
    study = tyro.cli(Study, args=argv[1:], description=__doc__, default=Study(tyro.MISSING))
    study = replace(study, name=argv[0])
    rows = study.run()
    found = study.table(rows)
    stem, command = study.figures / f"flow_{argv[0]}", "python scripts/studies/flow " + shlex.join(argv)
    tables.write(stem, command, found[0], rows, *found[1:])
    study.figure(rows, command).savefig(stem.with_suffix(".png"), dpi=110)
    return found
