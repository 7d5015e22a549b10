"""The five momentum and Hessian methods side by side (docs/npg_igt.md).

    python scripts/studies/momentum errors --out results/momentum --jobs 2      # random MDP, error of d_t
    python scripts/studies/momentum samples --out results/momentum --jobs 2     # random MDP, equal samples
    python scripts/studies/momentum cartpole --out results/momentum --jobs 2    # per iteration and per step

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/momentum_NAME.md`` and ``.csv`` are written, of cartpole also ``.png`` (``redraw`` draws it again).
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents.harpg import HARPG, HARPGConfig, HARPGEstimator
from agents.npg_igt import NPGIGT, NPGIGTConfig, NPGIGTEstimator
from ccrl.collect import Collector, Request
from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.logger import digits
from ccrl.policies import GibbsPolicy, OneHot
from ccrl.seeding import stream_seed
from ccrl.stats import t_interval
from scripts.studies import tables
from scripts.studies.look import look
from scripts.studies.tables import Rows

__all__ = ["CartPole", "Errors", "Samples", "main"]

METHODS = ("pg", "nmpg", "npg_igt", "nharpg", "harpg")
KNOWN = (*NPGIGTEstimator.rules, *HARPGEstimator.rules)


@dataclass(frozen=True)
class Study:
    """What all studies have."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that momentum_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    methods: tuple[str, ...] = METHODS
    """Variants."""
    seeds: int = 5
    """Runs of each."""

    def __post_init__(self) -> None:
        if not self.methods or set(self.methods) - set(KNOWN):
            raise ValueError(f"methods: expected some of {', '.join(KNOWN)}, got {' '.join(self.methods) or 'none'}")
        if self.jobs < 1 or self.seeds < 1:
            raise ValueError(f"expected jobs >= 1 and seeds >= 1, got {self.jobs} and {self.seeds}")


@dataclass(frozen=True)
class Errors(Study):
    """Relative error of the direction, one trajectory per sample, and the gap to the optimum at the end."""

    methods: tuple[str, ...] = ("normalised", "nmpg", "npg_igt", "nharpg")
    """Variants."""
    seeds: int = 30
    """Runs of each."""
    learning_rate: float = 0.5
    """gamma_0."""
    at: tuple[int, ...] = (50, 100, 200)
    """Iterations at which errors are taken."""

    def run(self) -> Rows:
        """Means per method, and the standard error of the mean gap."""
        at = " ".join(map(str, self.at))
        cells = [
            {"method": method, "gamma_0": self.learning_rate, "seed": seed, "at": at}
            for seed, method in itertools.product(range(self.seeds), self.methods)
        ]
        found = complete(self.out / "errors.csv", cells, play_errors, jobs=self.jobs, name="errors")
        names = (*(f"error at {t}" for t in self.at), "gap")
        table = []
        for method in self.methods:
            values = {n: [float(row[n]) for row in found if row["method"] == method] for n in names}
            gaps = values["gap"]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            table.append({"method": method} | {n: _mean(v) for n, v in values.items()} | {"gap se": error})
        return table


def play_errors(cell: dict[str, Any]) -> Rows:
    """One run of ``Errors``."""
    agent = tabular(cell["method"], cell["seed"], num_envs=1, learning_rate=cell["gamma_0"])
    at, errors = [int(t) for t in cell["at"].split()], dict[str, float]()

    def watch(agent: Any) -> bool:
        t, rule = agent.iteration - 1, agent.learner.direction
        if t in at:  # d_t belongs to theta_t, which by now is the previous one
            truth = agent.env.exact_gradient(agent.policy, rule.prev)
            errors[f"error at {t}"] = float((rule.d - truth).norm() / truth.norm())
        return bool(t < max(at))

    agent.learn(10**9, watch)
    return [errors | {"gap": gap(agent)}]


@dataclass(frozen=True)
class Samples(Study):
    """Gap to the optimum after equal numbers of trajectories, for some step sizes."""

    seeds: int = 20
    """Runs of each."""
    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """gamma_0 tried."""
    trajectories: int = 4000
    """In all."""
    batch: int = 10
    """Per estimate."""

    def run(self) -> Rows:
        """Mean and deviation per method and step size."""
        tried = list(itertools.product(self.methods, self.learning_rates))
        cells = [
            {"method": method, "gamma_0": rate, "seed": seed, "trajectories": self.trajectories, "batch": self.batch}
            for seed, (method, rate) in itertools.product(range(self.seeds), tried)
        ]
        gaps: dict[tuple[str, str], list[float]] = {}
        for row in complete(self.out / "samples.csv", cells, play_samples, jobs=self.jobs, name="samples"):
            gaps.setdefault((row["method"], row["gamma_0"]), []).append(float(row["gap"]))
        return [
            {"method": m, "gamma_0": rate, "gap": _mean(x), "gap sd": statistics.stdev(x) if len(x) > 1 else math.nan}
            for m, rate, x in ((m, rate, gaps[m, str(rate)]) for m, rate in tried)
        ]


def play_samples(cell: dict[str, Any]) -> Rows:
    """One run of ``Samples``."""
    agent = tabular(cell["method"], cell["seed"], num_envs=cell["batch"], learning_rate=cell["gamma_0"])
    agent.learn(cell["trajectories"] * agent.config.n_steps)
    return [{"gap": gap(agent)}]


@dataclass(frozen=True)
class CartPole(Study):
    """CartPole with at most 200 steps: iterations and environment steps until the policy returns ``target``."""

    methods: tuple[str, ...] = ("pg", "nmpg", "npg_igt", "harpg", "nharpg")
    """Variants."""
    learning_rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    """gamma_0 tried for normalised methods; the one with the best average return of seed 0 is used for all seeds."""
    plain_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The same for methods that are not normalised: g is a sum over steps, of length 100 and more here."""
    iterations: int = 50
    """Updates per run."""
    min_steps: int = 1000
    """Environment steps per estimate."""
    target: float = 180.0
    """Mean return of 20 episodes (sampled actions) at theta, every second iteration."""
    discount_from_start: bool = False
    """Weight step t with gamma^t."""

    def run(self) -> Rows:
        """The curves of the best step sizes."""
        normalised = {m: agent_of(m)[0].Direction.rules[m].normalised for m in self.methods}
        rates = {m: self.learning_rates if normalised[m] else self.plain_rates for m in self.methods}
        scores: dict[tuple[str, float], list[float]] = {}
        for row in self._complete([(m, rate, 0) for m in self.methods for rate in rates[m]]):
            scores.setdefault((row["method"], row["gamma_0"]), []).append(row["return"])
        for (method, rate), returns in scores.items():
            print(method, rate, f"mean return {digits(_mean(returns))}", flush=True)
        best = {m: max((_mean(scores[m, rate]), -i, rate) for i, rate in enumerate(rates[m]))[2] for m in self.methods}
        # seeds first, so that a study that is cut short has as many of every method; the rows are by method
        rows = self._complete([(m, best[m], seed) for seed in range(self.seeds) for m in self.methods])
        return sorted(rows, key=lambda row: self.methods.index(row["method"]))

    def _complete(self, wanted: list[tuple[str, float, int]]) -> Rows:
        settings = {
            "iterations": self.iterations, "min_steps": self.min_steps, "discount_from_start": self.discount_from_start,
        }  # fmt: skip
        cells = [{"method": m, "gamma_0": rate, "seed": seed, **settings} for m, rate, seed in wanted]
        rows = complete(self.out / "cartpole.csv", cells, play_cartpole, jobs=self.jobs, name="cartpole")
        return typed(rows)

    def summary(self, rows: Rows) -> Rows:
        """Per method: runs that reached the target, and the median iteration and step at which they did."""
        out = []
        for method in self.methods:
            mine = [row for row in rows if row["method"] == method]
            reached = []
            for seed in sorted({row["seed"] for row in mine}):
                hits = [row for row in mine if row["seed"] == seed and row["return"] >= self.target]
                reached.append((hits[0]["iteration"], hits[0]["steps"]) if hits else (math.inf, math.inf))
            last = [row["return"] for row in mine if row["iteration"] == max(r["iteration"] for r in mine)]
            count = f"{sum(k < math.inf for k, _ in reached)} of {len(reached)}"
            iteration, step = (statistics.median(x) for x in zip(*reached))
            row = {"method": method, "gamma_0": mine[0]["gamma_0"], "reached": count, "median iteration": iteration}
            out.append(row | {"median steps": step, "last return": _mean(last)})
        return out


def figure(rows: Rows, target: float) -> Figure:
    """Mean return of a method's runs and its 95 % interval, against iterations and against steps."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    page = Figure(figsize=(6.0, 6.4), layout="constrained")
    upper, lower = page.subplots(2, 1, sharey=True)
    for i, method in enumerate(methods):
        by: dict[int, Rows] = {}
        for row in rows:
            if row["method"] == method:
                by.setdefault(row["iteration"], []).append(row)
        values = np.array([[row["return"] for row in group] for group in by.values()])
        mean, low, high = t_interval(values) if seeds > 1 else (values[:, 0],) * 3
        rate = next(iter(by.values()))[0]["gamma_0"]
        steps = [_mean([row["steps"] for row in group]) / 1000 for group in by.values()]
        for axis, x in ((upper, list(by)), (lower, steps)):
            axis.plot(x, mean, label=f"{method}, step {rate:g}", **look(i))
            # returns lie in [0, 200]; with few runs Student's interval does not know that
            axis.fill_between(x, np.clip(low, 0, 200), np.clip(high, 0, 200), color=look(i)["color"], alpha=0.15, lw=0)
    for axis, label in ((upper, "iterations"), (lower, "environment steps, thousands (mean of the runs)")):
        axis.axhline(target, color="#5A5A5A", linewidth=1, linestyle=":", label=f"target, {target:g}")
        axis.set(xlabel=label, ylabel="return of 20 episodes, at most 200", ylim=(0, 205))
        axis.grid(color="#E6E6E6")
    entries = upper.get_legend_handles_labels()
    page.legend(*entries, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    upper.set_title(f"CartPole: mean of {seeds} runs and its 95 % interval (Student's t)", fontsize=10)
    return page


@dataclass(frozen=True)
class Redraw:
    """The table and the figure of CartPole again, from FIGURES/momentum_cartpole.csv."""

    figures: Path = Path("docs/figures")
    """Folder of momentum_cartpole.csv, .md and .png."""
    target: float = 180.0
    """As of ``cartpole``."""

    def run(self) -> Rows:
        """The rows of the CSV file."""
        rows = typed(read_rows(self.figures / "momentum_cartpole.csv"))
        figure(rows, self.target).savefig(self.figures / "momentum_cartpole.png", dpi=100)
        return rows


def typed(rows: list[dict[str, str]]) -> Rows:
    """Rows of CartPole with numbers in the place of text."""
    types = {"method": str, "gamma_0": float, "seed": int, "iteration": int, "steps": int, "return": float}
    return [{name: of(row[name]) for name, of in types.items()} for row in rows]


def play_cartpole(cell: dict[str, Any]) -> Rows:
    """One run of ``CartPole``: iteration, environment steps and mean return."""
    cls, config = agent_of(cell["method"])
    config = config(
        variant=cell["method"], num_envs=5, n_steps=200, min_steps=cell["min_steps"], learning_rate=cell["gamma_0"],
        baseline="linear", discount_from_start=cell["discount_from_start"],
    )  # fmt: skip
    agent = cls("CartPole-v1", config, seed=cell["seed"], env_kwargs={"max_episode_steps": 200})
    env = envs.make("CartPole-v1", 20, max_episode_steps=200)
    judge = Collector(env, seed=stream_seed(cell["seed"], "evaluation"), make_env=lambda n: env)
    curve = []

    def watch(agent: Any) -> bool:
        if agent.iteration % 2 == 0:
            judge.collect(Request(episodes=20, horizon=200), agent.policy)
            mean = float(judge.stats.returns.mean())
            curve.append({"iteration": agent.iteration, "steps": agent.num_timesteps, "return": mean})
        return bool(agent.iteration < cell["iterations"])

    agent.learn(10**9, watch)
    return curve


def agent_of(method: str) -> tuple[Any, Any]:
    """Agent and config class of a variant."""
    return (HARPG, HARPGConfig) if method in HARPGEstimator.rules else (NPGIGT, NPGIGTConfig)


def tabular(method: str, seed: int, **options: Any) -> Any:
    """A softmax table on the five states of the random MDP."""
    cls, config = agent_of(method)

    class Tabular(cls):  # type: ignore[misc,valid-type]
        def make_policy(self, heads: Any) -> Any:
            space = self.env.single_observation_space, self.env.single_action_space
            return GibbsPolicy(*space, features=OneHot(5)).double()

    return Tabular("ccrl/RandomMDP-v0", config(variant=method, n_steps=15, gamma=0.9, **options), seed=seed)


def gap(agent: Any) -> float:
    """How much less the policy returns than the best one."""
    return float(agent.env.optimal_return() - agent.env.exact_return(agent.policy))


def _mean(x: list[float]) -> float:
    return float(statistics.fmean(x))


def main(argv: list[str]) -> Rows:
    """Run one of the studies and write its files."""
    torch.set_num_threads(1)
    commands: dict[str, Callable[..., Any]] = {
        "errors": Errors, "samples": Samples, "cartpole": CartPole, "redraw": Redraw,
    }  # fmt: skip
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    rows: Rows = study.run()
    if isinstance(study, Redraw):
        return rows
    stem = study.figures / f"momentum_{argv[0]}"
    command = "python scripts/studies/momentum " + shlex.join(argv)
    # every run, so that the table can be checked without running any again
    runs: Rows = rows if isinstance(study, CartPole) else list(read_rows(study.out / f"{argv[0]}.csv"))
    tables.write(stem, command, study.summary(rows) if isinstance(study, CartPole) else rows, runs)
    if isinstance(study, CartPole):
        figure(rows, study.target).savefig(stem.with_suffix(".png"), dpi=100)
    return rows
