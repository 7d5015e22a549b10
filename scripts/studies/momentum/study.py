"""The five momentum and Hessian methods side by side (docs/npg_igt.md).

    python scripts/studies/momentum errors --out results/momentum --jobs 2      # random MDP, error of d_t
    python scripts/studies/momentum samples --out results/momentum --jobs 2     # random MDP, equal samples
    python scripts/studies/momentum cartpole --out results/momentum --jobs 2    # per iteration and per step

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/momentum_NAME.md`` and ``.csv`` are written, of cartpole also ``.png``.
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
from ccrl.experiment.logger import digits
from ccrl.policies import GibbsPolicy, OneHot
from scripts.studies import tables
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
        """Means per method."""
        at = " ".join(map(str, self.at))
        cells = [
            {"method": method, "gamma_0": self.learning_rate, "seed": seed, "at": at}
            for seed, method in itertools.product(range(self.seeds), self.methods)
        ]
        found = complete(self.out / "errors.csv", cells, play_errors, jobs=self.jobs, name="errors")
        names = (*(f"error at {t}" for t in self.at), "gap")
        return [
            {"method": method} | {n: _mean([float(row[n]) for row in found if row["method"] == method]) for n in names}
            for method in self.methods
        ]


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
        types = {"method": str, "gamma_0": float, "seed": int, "iteration": int, "steps": int, "return": float}
        return [{name: of(row[name]) for name, of in types.items()} for row in rows]

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

    def figure(self, rows: Rows, command: str) -> Figure:
        """Mean over seeds against iterations and against steps, with every run in the background."""
        page = Figure(figsize=(9.0, 3.6), layout="constrained")
        rows = [row | {"steps": row["steps"] / 1000} for row in rows]
        labels = ("iterations", "environment steps, thousands")
        for axis, x, label in zip(page.subplots(1, 2), ("iteration", "steps"), labels):
            for i, method in enumerate(self.methods):
                mine = [row for row in rows if row["method"] == method]
                by: dict[int, Rows] = {}
                for row in mine:
                    by.setdefault(row["iteration"], []).append(row)
                for seed in {row["seed"] for row in mine}:
                    run = [row for row in mine if row["seed"] == seed]
                    axis.plot([r[x] for r in run], [r["return"] for r in run], color=f"C{i}", alpha=0.15, linewidth=0.7)
                xs = [_mean([row[x] for row in group]) for group in by.values()]
                ys = [_mean([row["return"] for row in group]) for group in by.values()]
                axis.plot(xs, ys, color=f"C{i}", label=f"{method} ({mine[0]['gamma_0']:g})")
            axis.axhline(self.target, color="#8A8A8A", linewidth=0.8, linestyle="--")
            axis.set_xlabel(label)
            axis.set_ylabel("mean return of 20 episodes")
            axis.grid(color="#E6E6E6")
        page.legend(*page.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        page.suptitle(f"CartPole, at most 200 steps: {self.seeds} seeds (thin) and their mean", x=0.01, ha="left")
        page.supxlabel(command, x=0.01, ha="left", fontsize=6, color="#5A5A5A")
        return page


def play_cartpole(cell: dict[str, Any]) -> Rows:
    """One run of ``CartPole``: iteration, environment steps and mean return."""
    cls, config = agent_of(cell["method"])
    config = config(
        variant=cell["method"], num_envs=5, n_steps=200, min_steps=cell["min_steps"], learning_rate=cell["gamma_0"],
        baseline="linear", discount_from_start=cell["discount_from_start"],
    )  # fmt: skip
    agent = cls("CartPole-v1", config, seed=cell["seed"], env_kwargs={"max_episode_steps": 200})
    env = envs.make("CartPole-v1", 20, max_episode_steps=200)
    judge = Collector(env, seed=cell["seed"] + 1000, make_env=lambda n: env)
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
    commands: dict[str, Callable[..., Any]] = {"errors": Errors, "samples": Samples, "cartpole": CartPole}
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    rows: Rows = study.run()
    stem = study.figures / f"momentum_{argv[0]}"
    command = "python scripts/studies/momentum " + shlex.join(argv)
    tables.write(stem, command, study.summary(rows) if isinstance(study, CartPole) else rows, rows)
    if isinstance(study, CartPole):
        study.figure(rows, command).savefig(stem.with_suffix(".png"), dpi=150)
    return rows
