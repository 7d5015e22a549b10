"""SubPO beside its baselines on coverage tasks (docs/subpo.md).

    python scripts/studies/submodular grid --out results/submodular       # 10 x 10 coverage, 19 moves
    python scripts/studies/submodular items --out results/submodular      # 7 x 15, items of six groups, 39 moves
    python scripts/studies/submodular large --out results/submodular      # 30 x 30 coverage, 79 moves
    python scripts/studies/submodular design --out results/submodular     # 10 x 10, D-optimal design (extra gp)
    python scripts/studies/submodular design30 --out results/submodular   # the same on 30 x 30, 39 moves
    python scripts/studies/submodular facility --out results/submodular   # 10 x 10, a bipartite graph of customers
    python scripts/studies/submodular rooms --out results/submodular      # two rooms of 7 x 4 and a corridor, 39 moves
    python scripts/studies/submodular point --out results/submodular      # a point with inertia, clipped surrogate
    python scripts/studies/submodular ant --out results/submodular        # MuJoCo's Ant, clipped surrogate

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/submodular_NAME.md``, ``.csv``, ``.png`` and ``_paths.png`` are written.
"""

from __future__ import annotations

import functools
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents.subpo import SubPO
from ccrl.experiment.cells import complete
from envs.coverage import best_path, greedy_path
from scripts.studies import tables
from scripts.studies.command import choose
from scripts.studies.submodular import pictures
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
    "design": ("ccrl/GridDesign-v0", {}, {"num_envs": 200, "n_steps": 19, "learning_rate": 0.01}),
    "design30": (
        "ccrl/GridDesign-v0", {"size": (30, 30), "start": 34, "max_episode_steps": 39},
        {"num_envs": 500, "n_steps": 39, "learning_rate": 0.001},
    ),
    "facility": ("ccrl/GridFacility-v0", {}, {"num_envs": 200, "n_steps": 19, "learning_rate": 0.01}),
    "rooms": ("ccrl/TwoRooms-v0", {}, {"num_envs": 500, "n_steps": 39, "learning_rate": 0.02}),
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
CONTINUOUS = ("point", "ant")
NAN = float("nan")


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
        hidden = [m for m in self.methods if "observation" in METHODS[m][1]]
        if self.task in CONTINUOUS and hidden:
            raise ValueError(
                f"methods: {self.task} has no observation of the history, so that {', '.join(hidden)} would be "
                "SubPO-M; expected other methods"
            )
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

    @functools.cached_property
    def env(self) -> Any:
        """One copy of the task."""
        id, options, _ = TASKS[self.task]
        return envs.make(id, **options)

    @functools.cached_property
    def bounds(self) -> list[tuple[str, float, str]]:
        """Paths of known quality: name, value, cells."""
        if self.task in CONTINUOUS:
            return []
        # the keys of large sets are wide: a beam of 2,000 would take minutes there
        width = 200 if self.env.env.cells > 500 else 2_000
        greedy, best = greedy_path(self.env), best_path(self.env, width=width)
        name = "optimum" if best.exact else f"best path of a beam of {width:,}"
        return [
            ("greedy path", greedy.value, " ".join(map(str, greedy.cells))),
            (name, best.value, " ".join(map(str, best.cells))),
        ]

    def value(self, path: str) -> float:
        """F of a path."""
        found: Any = self.env.function.value(torch.tensor([[int(c) for c in path.split()]]))
        return float(found[0])

    def summary(self, rows: Rows) -> Rows:
        """Mean of the last batch over seeds with its interval, the same of the most probable paths, seconds per run."""
        out = []
        best = self.bounds[-1][1] if self.bounds else NAN
        for method in self.methods:
            last = [row for row in rows if row["method"] == method and row["iteration"] == self.iterations]
            mean, low, high = pictures.interval([row["value"] for row in last])
            out.append({
                "method": method, "mean F": mean, "95 % from": low, "to": high, "of the best path": mean / best,
                "most probable path": statistics.fmean(self.value(row["path"]) for row in last), "seeds": len(last),
                "seconds": statistics.fmean(row["seconds"] for row in last),
            })  # fmt: skip
        if not self.bounds:
            out = [{k: v for k, v in row.items() if k != "of the best path"} for row in out]
        return out + [{"method": name, "mean F": value} for name, value, _ in self.bounds]

    def shown(self, rows: Rows) -> list[tuple[str, str, float]]:
        """Title, cells and value of the most probable paths of seed 0, and of the known ones."""
        found = [(r["method"], r["path"], self.value(r["path"])) for r in rows if r["seed"] == 0 and r["path"]]
        return found + [(name, cells, value) for name, value, cells in self.bounds]


def play(cell: dict[str, Any]) -> Rows:
    """One run: points of the curve, and in the last row an episode of most probable actions."""
    id, options, settings = TASKS[cell["task"]]
    own, more = METHODS[cell["method"]]
    if cell["task"] in CONTINUOUS:
        more = {k: v for k, v in more.items() if k == "paid"}  # they have one observation
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
    curve[-1]["path"] = " ".join(map(str, most_probable_path(agent, id, options | more)))
    return curve


@torch.no_grad()
def most_probable_path(agent: Any, id: str, options: dict[str, Any]) -> list[int]:
    """Cells of an episode in which every action is the policy's mode."""
    env: Any = envs.make(id, 1, autoreset_mode="Disabled", **options)
    obs, act, cells = env.reset(seed=0), agent.acting(), []
    for _ in range(env.max_episode_steps):
        cells.append(int(env.element(obs)))
        result = env.step(act(obs, True))
        obs = result.obs
        if bool(result.terminated):
            break
    env.close()
    return [*cells, int(env.element(obs))]


def main(argv: list[str], small: dict[str, Any] | None = None) -> Rows:
    """Run the study of one task and write its files; its table."""
    torch.set_num_threads(1)
    name = choose(argv, TASKS, __doc__)
    start: dict[str, Any] = {"task": name, "small": small or {}}
    if name == "grid":
        start["methods"] = tuple(METHODS)
    if name in CONTINUOUS:
        start["methods"] = ("SubPO-M", "ModPO")
    iterations = {"items": 100, "large": 50, "rooms": 100, "point": 60, "ant": 150}.get(name, 150)
    default = Study(out=tyro.MISSING, iterations=iterations, **start)
    study = tyro.cli(Study, args=argv[1:], default=default, description=__doc__, prog=f"submodular {name}")
    rows = study.run()
    stem = study.figures / f"submodular_{study.task}"
    command = "python scripts/studies/submodular " + shlex.join(argv)
    table = study.summary(rows)
    tables.write(stem, command, table, rows)
    title = f"{study.task}: means of {study.seeds} seeds; bands: 95 % (Student's t)"
    pictures.curves(rows, study.methods, study.bounds, title).savefig(stem.with_suffix(".png"), dpi=100)
    page = pictures.paths(study.env, study.shown(rows), command)
    page.savefig(stem.with_name(f"{stem.name}_paths.png"), dpi=120)
    return table
