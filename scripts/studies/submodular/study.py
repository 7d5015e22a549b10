"""SubPO beside its baselines on coverage tasks (docs/subpo.md).

    python scripts/studies/submodular grid --out results/submodular       # 10 x 10 coverage, 19 moves
    python scripts/studies/submodular items --out results/submodular      # 7 x 15, items of six groups, 39 moves
    python scripts/studies/submodular large --out results/submodular      # 30 x 30 coverage, 79 moves
    python scripts/studies/submodular design --out results/submodular     # 30 x 30, D-optimal design (extra gp)
    python scripts/studies/submodular point --out results/submodular      # a point with inertia, clipped surrogate
    python scripts/studies/submodular ant --out results/submodular        # MuJoCo's Ant: hours

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/submodular_NAME.md``, ``.csv`` and ``.png`` are written.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents.subpo import SubPO
from ccrl.experiment.cells import complete
from envs.coverage import best_path, greedy_path
from scripts.studies import tables
from scripts.studies.tables import Rows

__all__ = ["METHODS", "TASKS", "Study", "main"]


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SubPO-NM": ({}, {"observation": "history"}),
    "SubPO-NM, GRU": ({"recurrent": "gru", "recurrent_size": 32}, {"observation": "scaled"}),
    "SubPO-M": ({}, {}),
    "SubPO-M, no baseline": ({"baseline": "none"}, {}),
    "SubPO-M, greedy credit": ({"credit": "greedy"}, {}),
    "SubPO-M, released credit": ({"credit": "cumulative", "baseline": "none"}, {}),
    "SubPO-NM, released credit": ({"credit": "cumulative", "baseline": "none"}, {"observation": "history"}),
    "ModPO": ({}, {"paid": "modular"}),
}
"""Name -> settings of the agent, options of the task."""

_CLIPPED = {"credit": "gae", "surrogate": "clip", "gamma": 0.99, "normalise_advantage": True}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grid": ("ccrl/GridCoverage-v0", {}, {"num_envs": 200, "n_steps": 19, "learning_rate": 0.01}),
    "items": ("ccrl/GridItems-v0", {}, {"num_envs": 300, "n_steps": 39, "learning_rate": 0.005}),
    "large": (
        "ccrl/GridCoverage-v0", {"size": (30, 30), "start": 34, "max_episode_steps": 79},
        {"num_envs": 500, "n_steps": 79, "learning_rate": 0.01},
    ),
    "design": (
        "ccrl/GridDesign-v0", {"size": (30, 30), "start": 34, "max_episode_steps": 39},
        {"num_envs": 500, "n_steps": 39, "learning_rate": 0.001},
    ),
    "point": (
        "ccrl/PointCoverage-v0", {},
        {"num_envs": 32, "n_steps": 100, "learning_rate": 1e-3, "batch_size": 320, **_CLIPPED},
    ),
    "ant": (
        "ccrl/AntCoverage-v0", {},
        {"num_envs": 15, "n_steps": 400, "learning_rate": 3e-4, "batch_size": 600, "ent_coef": 1e-3, **_CLIPPED},
    ),
}  # fmt: skip
"""Name -> environment, its options, settings of the agent."""


@dataclass(frozen=True)
class Study:
    """One task, several methods and seeds."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that submodular_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    methods: tuple[str, ...] = ("SubPO-NM", "SubPO-M", "ModPO")
    """Some of the methods, by name."""
    seeds: int = 5
    """Runs of each method."""
    iterations: int = 150
    """Batches per run."""
    every: int = 10
    """Iterations between two points of a curve."""
    task: tyro.conf.Suppress[str] = field(default="grid")
    small: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    """Settings of the agent in place of the task's (tests)."""

    def __post_init__(self) -> None:
        if not self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(self.methods) or 'none'}")
        if min(self.jobs, self.seeds, self.iterations, self.every) < 1:
            raise ValueError("expected jobs, seeds, iterations and every >= 1")

    def run(self) -> Rows:
        """Every point of every curve."""
        cells = [
            {"method": m, "seed": seed, "task": self.task, "iterations": self.iterations, "every": self.every,
             "settings": " ".join(f"{k}={v}" for k, v in self.small.items())}
            for seed in range(self.seeds) for m in self.methods
        ]  # fmt: skip
        rows = complete(self.out / f"{self.task}.csv", cells, play, jobs=self.jobs, name=self.task)
        types = {"method": str, "seed": int, "iteration": int, "value": float, "seconds": float, "path": str}
        rows_ = [{name: of(row[name]) for name, of in types.items()} for row in rows]
        return sorted(rows_, key=lambda row: (self.methods.index(row["method"]), row["seed"], row["iteration"]))

    def bounds(self) -> list[tuple[str, float, str]]:
        """Paths of known quality: name, value, cells."""
        if self.task in ("point", "ant"):
            return []
        id, options, _ = TASKS[self.task]
        env: Any = envs.make(id, **options)
        greedy, best = greedy_path(env), best_path(env, width=2_000)
        name = "optimum" if best.exact else "best path of a beam of 2,000"
        return [
            ("greedy path", greedy.value, " ".join(map(str, greedy.cells))),
            (name, best.value, " ".join(map(str, best.cells))),
        ]

    def summary(self, rows: Rows) -> Rows:
        """Mean and deviation of the last batch over seeds, and seconds per run."""
        out = []
        for method in self.methods:
            last = [row for row in rows if row["method"] == method and row["iteration"] == self.iterations]
            values = [row["value"] for row in last]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            out.append({
                "method": method, "mean F": statistics.fmean(values), "sd over seeds": spread,
                "seeds": len(values), "seconds": statistics.fmean(row["seconds"] for row in last),
            })  # fmt: skip
        nan = float("nan")
        fixed = {"sd over seeds": nan, "seeds": 0, "seconds": nan}
        return out + [{"method": name, "mean F": value, **fixed} for name, value, _ in self.bounds()]

    def figure(self, rows: Rows, command: str) -> Figure:
        """Curves, and the most probable path of seed 0 of three methods on the grid."""
        grids = self.task not in ("point", "ant")
        shown = list(self.methods[:3]) if grids else []
        page = Figure(figsize=(5.2 + 2.6 * len(shown), 3.6), layout="constrained")
        axes = page.subplots(1, 1 + len(shown), width_ratios=[2.0, *[1.0] * len(shown)], squeeze=False)[0]
        for i, method in enumerate(self.methods):
            by: dict[int, list[float]] = {}
            for row in rows:
                if row["method"] == method:
                    by.setdefault(row["iteration"], []).append(row["value"])
            axes[0].plot(list(by), [statistics.fmean(v) for v in by.values()], color=f"C{i}", label=method)
            axes[0].fill_between(
                list(by), [min(v) for v in by.values()], [max(v) for v in by.values()], color=f"C{i}", alpha=0.15, lw=0
            )
        for (name, value, _), style in zip(self.bounds(), ("--", "-")):
            axes[0].axhline(value, color="#8A8A8A", lw=0.8, ls=style, label=name)
        axes[0].set_xlabel("batches")
        axes[0].set_ylabel("mean F of a batch")
        axes[0].grid(color="#E6E6E6")
        axes[0].legend(frameon=False, fontsize=7)
        for axis, method in zip(axes[1:], shown):
            id, options, _ = TASKS[self.task]
            env: Any = envs.make(id, **options)
            path = next(r["path"] for r in rows if r["method"] == method and r["seed"] == 0 and r["path"])
            draw(axis, env, [int(c) for c in path.split()])
            axis.set_title(method, fontsize=9)
        page.suptitle(f"{self.task}: mean and range of {self.seeds} seeds", x=0.01, ha="left")
        page.supxlabel(command, x=0.01, ha="left", fontsize=6, color="#5A5A5A")
        return page


def draw(axis: Any, env: Any, path: list[int]) -> None:
    """A path on its grid; cells are shaded by what they are worth alone."""
    size, function = env.env.size, env.function
    cells = torch.arange(function.n)
    worth = function.gain(function.initial(function.n), cells).view(size)
    axis.imshow(worth.T, origin="lower", cmap="Greys", alpha=0.4)
    xs, ys = [c // size[1] for c in path], [c % size[1] for c in path]
    axis.plot(xs, ys, "-o", color="C3", markersize=2.5, lw=1.2)
    axis.plot(xs[0], ys[0], "s", color="black", markersize=5)
    axis.set_xticks([])
    axis.set_yticks([])


def play(cell: dict[str, Any]) -> Rows:
    """One run: points of the curve, and in the last row the most probable path."""
    id, options, settings = TASKS[cell["task"]]
    own, more = METHODS[cell["method"]]
    if cell["task"] in ("point", "ant"):
        more = {k: v for k, v in more.items() if k == "paid"}
    override = dict(pair.split("=") for pair in cell["settings"].split())
    settings = settings | own | {k: int(v) for k, v in override.items()}
    agent = SubPO(id, seed=cell["seed"], env_kwargs=options | more, compile="off", **settings)
    curve: Rows = []

    def watch(agent: Any) -> bool:
        if agent.iteration % cell["every"] == 0 or agent.iteration == cell["iterations"]:
            value = float(agent.scalars["rollout/set_value"])
            curve.append({"iteration": agent.iteration, "value": value, "path": ""})
        return bool(agent.iteration < cell["iterations"])

    agent.learn(10**9, watch)
    if cell["task"] not in ("point", "ant"):
        curve[-1]["path"] = " ".join(map(str, most_probable_path(agent, id, options | more)))
    return curve


@torch.no_grad()
def most_probable_path(agent: Any, id: str, options: dict[str, Any]) -> list[int]:
    """Cells of an episode in which every action is the policy's mode."""
    env: Any = envs.make(id, 1, autoreset_mode="Disabled", **options)
    obs, act, cells = env.reset(seed=0), agent.acting(), []
    for _ in range(env.max_episode_steps):
        cells.append(int(env.element(obs)))
        obs = env.step(act(obs, True)).obs
    return [*cells, int(env.element(obs))]


def main(argv: list[str], small: dict[str, Any] | None = None) -> Rows:
    """Run the study of one task and write its files; its table."""
    torch.set_num_threads(1)
    if not argv or argv[0] not in TASKS:
        raise ValueError(f"expected one of {', '.join(TASKS)} and its options, got {argv[:1] or 'nothing'}\n{__doc__}")
    start: dict[str, Any] = {"task": argv[0], "small": small or {}}
    if argv[0] == "grid":
        start["methods"] = tuple(METHODS)
    iterations = {"items": 100, "large": 50, "point": 100, "ant": 2000}.get(argv[0], 150)
    default = Study(out=tyro.MISSING, iterations=iterations, **start)
    study = tyro.cli(Study, args=argv[1:], default=default, description=__doc__)
    rows = study.run()
    stem = study.figures / f"submodular_{study.task}"
    command = "python scripts/studies/submodular " + shlex.join(argv)
    table = study.summary(rows)
    tables.write(stem, command, table, rows)
    study.figure(rows, command).savefig(stem.with_suffix(".png"), dpi=120)
    return table
