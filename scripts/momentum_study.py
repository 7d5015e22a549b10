"""The five momentum and Hessian methods side by side (npg_igt_harpg sheet, section 6).

    python scripts/momentum_study.py errors --out docs/figures/momentum_errors          # random MDP, error of d_t
    python scripts/momentum_study.py samples --out docs/figures/momentum_samples        # random MDP, equal samples
    python scripts/momentum_study.py cartpole --out docs/figures/momentum_cartpole      # per iteration and per step

Writes ``OUT.md`` and ``OUT.csv``; cartpole also ``OUT.png``.
"""

from __future__ import annotations

import csv
import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings()

import envs
from agents.harpg import HARPG, HARPGConfig, HARPGEstimator
from agents.npg_igt import NPGIGT, NPGIGTConfig
from ccrl.collect import Collector, Request
from ccrl.policies import GibbsPolicy, OneHot

__all__ = ["CartPole", "Errors", "Samples", "main"]

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Errors:
    """Relative error of the direction, one trajectory per sample, and the gap to the optimum at the end."""

    out: Path
    """Path and first part of the names of the files to write."""
    methods: tuple[str, ...] = ("normalised", "nmpg", "npg_igt", "nharpg")
    """Variants."""
    seeds: int = 30
    """Runs of each."""
    learning_rate: float = 0.5
    """gamma_0."""
    at: tuple[int, ...] = (50, 100, 200)
    """Iterations at which errors are taken."""

    def run(self) -> Rows:
        rows = []
        for method in self.methods:
            errors: dict[int, list[float]] = {t: [] for t in self.at}
            gaps = []
            for seed in range(self.seeds):
                agent = tabular(method, seed, num_envs=1, learning_rate=self.learning_rate)

                def watch(agent: Any, errors: Any = errors) -> bool:
                    t, rule = agent.iteration - 1, agent.direction
                    if t in errors:  # d_t belongs to theta_t, which by now is the previous one
                        truth = agent.env.exact_gradient(agent.policy, rule.prev)
                        errors[t].append(float((rule.d - truth).norm() / truth.norm()))
                    return t < max(self.at)

                agent.learn(10**9, watch)
                gaps.append(agent.env.optimal_return() - float(agent.env.exact_return(agent.policy)))
            row = {"method": method, **{f"error at {t}": _mean(errors[t]) for t in self.at}, "gap": _mean(gaps)}
            rows.append(row)
            print(row, flush=True)
        return rows


@dataclass(frozen=True)
class Samples:
    """Gap to the optimum after equal numbers of trajectories, best of some step sizes."""

    out: Path
    """Path and first part of the names of the files to write."""
    methods: tuple[str, ...] = ("pg", "nmpg", "npg_igt", "nharpg", "harpg")
    """Variants."""
    seeds: int = 5
    """Runs of each."""
    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """gamma_0 tried."""
    trajectories: int = 4000
    """In all."""
    batch: int = 10
    """Per estimate."""

    def run(self) -> Rows:
        rows = []
        for method in self.methods:
            for rate in self.learning_rates:
                gaps = []
                for seed in range(self.seeds):
                    agent = tabular(method, seed, num_envs=self.batch, learning_rate=rate)
                    agent.learn(self.trajectories * agent.config.n_steps)
                    gaps.append(agent.env.optimal_return() - float(agent.env.exact_return(agent.policy)))
                rows.append({"method": method, "gamma_0": rate, "gap": _mean(gaps), "gap sd": statistics.stdev(gaps)})
                print(rows[-1], flush=True)
        return rows


@dataclass(frozen=True)
class CartPole:
    """CartPole with at most 200 steps: iterations and environment steps until the policy returns ``target``."""

    out: Path
    """Path and first part of the names of the files to write."""
    methods: tuple[str, ...] = ("pg", "nmpg", "npg_igt", "harpg", "nharpg")
    """Variants."""
    seeds: int = 5
    """Runs with the chosen step size."""
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
        rows = []
        for method in self.methods:
            normalised = agent_of(method)[0].Direction.rules[method].normalised
            rates = self.learning_rates if normalised else self.plain_rates
            tried = {rate: self._curve(method, rate, 0) for rate in rates}
            best = max(tried, key=lambda rate: statistics.fmean(r for *_, r in tried[rate]))
            for rate, curve in tried.items():
                print(method, rate, f"mean return {statistics.fmean(r for *_, r in curve):.1f}", flush=True)
            curves = [tried[best], *(self._curve(method, best, seed) for seed in range(1, self.seeds))]
            for seed, curve in enumerate(curves):
                rows += [
                    {"method": method, "gamma_0": best, "seed": seed, "iteration": k, "steps": steps, "return": r}
                    for k, steps, r in curve
                ]
        return rows

    def _curve(self, method: str, rate: float, seed: int) -> list[tuple[int, int, float]]:
        """(iteration, environment steps, mean return)."""
        cls, config = agent_of(method)
        config = config(
            variant=method, num_envs=5, n_steps=200, min_steps=self.min_steps, learning_rate=rate, baseline="linear",
            discount_from_start=self.discount_from_start,
        )  # fmt: skip
        agent = cls("CartPole-v1", config, seed=seed, env_kwargs={"max_episode_steps": 200})
        env = envs.make("CartPole-v1", 20, max_episode_steps=200)
        judge = Collector(env, seed=seed + 1000, make_env=lambda n: env)
        curve = []

        def watch(agent: Any) -> bool:
            if agent.iteration % 2 == 0:
                judge.collect(Request(episodes=20, horizon=200), agent.policy)
                curve.append((agent.iteration, agent.num_timesteps, float(judge.stats.returns.mean())))
            return agent.iteration < self.iterations

        agent.learn(10**9, watch)
        return curve

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
                by = {}
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


def agent_of(method: str) -> tuple[Any, Any]:
    """Agent and config class of a variant."""
    return (HARPG, HARPGConfig) if method in HARPGEstimator.rules else (NPGIGT, NPGIGTConfig)


def tabular(method: str, seed: int, **options: Any) -> Any:
    """A softmax table on the five states of the sheet."""
    cls, config = agent_of(method)

    class Tabular(cls):  # type: ignore[misc,valid-type]
        def make_policy(self, heads: Any) -> Any:
            space = self.env.single_observation_space, self.env.single_action_space
            return GibbsPolicy(*space, features=OneHot(5)).double()

    return Tabular("ccrl/RandomMDP-v0", config(variant=method, n_steps=15, gamma=0.9, **options), seed=seed)


def _mean(x: list[float] | Tensor) -> float:
    return float(statistics.fmean(x))


def _table(rows: Rows) -> str:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    text = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)  # noqa: E731
    return "\n".join([*lines, *("| " + " | ".join(text(row[n]) for n in names) + " |" for row in rows)]) + "\n"


def main(argv: list[str]) -> Rows:
    """Run one of the studies and write its files."""
    torch.set_num_threads(1)
    commands = {"errors": Errors, "samples": Samples, "cartpole": CartPole}
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    rows = study.run()
    study.out.parent.mkdir(parents=True, exist_ok=True)
    command = "python scripts/momentum_study.py " + shlex.join(argv)
    text = _table(study.summary(rows) if isinstance(study, CartPole) else rows)
    print(text)
    study.out.with_suffix(".md").write_text(f"`{command}`\n\n{text}", encoding="utf-8")
    with study.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if isinstance(study, CartPole):
        study.figure(rows, command).savefig(study.out.with_suffix(".png"), dpi=150)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
