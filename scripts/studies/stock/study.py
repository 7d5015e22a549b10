"""Objectives of the return's distribution (docs/distributional.md, docs/detan.md).

    python scripts/studies/stock pictures                                # exact optima and the rate of value iteration
    python scripts/studies/stock chain --out results/stock --jobs 2      # D-eta-N on four chains
    python scripts/studies/stock tail --out results/stock --jobs 2       # PPO for the mean and for CVaR, execution

Every finished run of ``chain`` and ``tail`` is added to ``OUT/NAME.csv``; the same command again, or one with more
seeds, runs what is missing. Tables are written to ``FIGURES/stock_NAME.md``.
"""

from __future__ import annotations

import itertools
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents import PPO, DetaN
from ccrl.distributional import CVaR, ExactOracle, Expected, Law, Objective, best_stock_free, cvar, law_of
from ccrl.experiment.cells import complete
from ccrl.experiment.csv_table import read_rows
from ccrl.stats import t_interval
from ccrl.wrappers import StockEnv
from scripts.studies import tables
from scripts.studies.stock.pictures import gaps, objectives
from scripts.studies.tables import Rows

__all__ = ["Chain", "Pictures", "Tail", "main"]

LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Pictures:
    """The law of the return under the best policy of every objective, and the gap of value iteration by sweep."""

    figures: Path = Path("docs/figures")
    """Folder that stock_objectives.png and stock_gap.png are written to."""

    def run(self) -> Rows:
        """The values in the pictures."""
        self.figures.mkdir(parents=True, exist_ok=True)
        page, rows = objectives()
        page.savefig(self.figures / "stock_objectives.png", dpi=130)
        page, more = gaps()
        page.savefig(self.figures / "stock_gap.png", dpi=130)
        return rows + more


@dataclass(frozen=True)
class Chain:
    """D-eta-N on chains: one network per chain and seed, its greedy policy's exact CVaR at every level."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder of the table."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    tasks: tuple[tuple[float, int], ...] = ((1.0, 4), (1.0, 3), (0.9, 4), (0.5, 3))
    """Discount and steps of an episode of every chain."""
    seeds: int = 5
    """Runs of each."""
    first_seed: int = 100
    """The first of their seeds; those up to 99 are for looking."""
    updates: int = 4000
    """Gradient steps of a run."""
    batch_size: int = 512
    """Transitions of a gradient step."""

    def run(self) -> Rows:
        """Per chain and level: optimum, D-eta-N, and the baselines that see no stock."""
        cells = [
            {"gamma": g, "horizon": h, "updates": self.updates, "batch_size": self.batch_size, "seed": seed}
            for seed, (g, h) in itertools.product(_seeds(self), self.tasks)
        ]
        play = partial(_traced, play=play_chain, made=tables.made())
        found = complete(self.out / "chain.csv", cells, play, jobs=self.jobs, name="chain")
        rows = []
        for (g, h), tau in itertools.product(self.tasks, LEVELS):
            mine = [r for r in found if (float(r["gamma"]), int(r["horizon"]), float(r["tau"])) == (g, h, tau)]
            values = sorted(float(r["value"]) for r in mine)
            optimum = float(mine[0]["optimum"])
            near = sum(v >= optimum - 0.05 * abs(optimum) - 1e-9 for v in values)
            rows.append({
                "gamma": g, "steps": h, "tau": tau, "optimum": optimum, "median": statistics.median(values),
                "worst": values[0], "best": values[-1], "largest gap": round(optimum - values[0], 9),
                "within 5 %": f"{near} of {len(values)}",
                "by its own c_0": statistics.median(float(r["by estimate"]) for r in mine),
                "no stock": float(mine[0]["no stock"]), "mean-optimal": float(mine[0]["mean-optimal"]),
            })  # fmt: skip
        return rows


def play_chain(cell: dict[str, Any]) -> Rows:
    """One run of ``Chain``: a row per level.

    ``value`` is the exact CVaR of the greedy policy from the best of 37 starts, each judged by the exact law of its
    returns (validation with unlimited episodes); ``by estimate`` is that from the start of the network's own estimate.
    """
    gamma, horizon, steps = float(cell["gamma"]), int(cell["horizon"]), int(cell["updates"])
    low, high = -3.0 * horizon - 2.0, 2.0 * horizon - 4.0
    agent = DetaN(
        "ccrl/SABChain-v0", seed=int(cell["seed"]), env_kwargs={"horizon": horizon}, gamma=gamma, stock_low=(low,),
        stock_high=(high,), num_envs=8, n_steps=8, updates=8, rounds=10, learning_starts=2048, exploration_end=1.0,
        batch_size=int(cell["batch_size"]), compile="off",
    )  # fmt: skip
    agent.learn(2048 + steps * 8)
    mdp = agent.env.env.mdp  # type: ignore[attr-defined]

    def value(start: float, objective: Objective) -> float:
        return float(objective.value(*law_of(mdp, greedy(agent, horizon), horizon, gamma, 0, start)))

    oracle = ExactOracle(mdp, horizon, CVaR(1.0), gamma)
    rows: Rows = []
    for tau in LEVELS:
        objective = CVaR(tau)
        own = float(agent.start_for(objective))  # type: ignore[arg-type]
        starts = [*torch.linspace(low, high, 37).tolist(), own]
        plain = law_of(mdp, lambda t, s, c: 2, horizon, gamma)
        rows.append({
            "tau": tau, "optimum": oracle.solve(0, objective).value, "by estimate": value(own, objective),
            "value": max(value(start, objective) for start in starts),
            "no stock": best_stock_free(mdp, horizon, objective, gamma)[0],
            "mean-optimal": float(objective.value(*plain)),
        })  # fmt: skip
    return rows


def greedy(agent: DetaN, horizon: int) -> Callable[[int, int, Any], int]:
    """The agent's policy on the chain, as ``law_of`` takes it; one forward pass per step and stock."""
    known: dict[tuple[int, float], int] = {}

    def act(t: int, s: int, c: Any) -> int:
        if (t, c) not in known:
            obs = {
                "obs": torch.eye(horizon + 1)[t][None],
                "stock": torch.tensor([c], dtype=torch.float64),
                "time": torch.tensor([[float(t)]]),
            }
            known[t, c] = int(agent.act(obs, deterministic=True)[0])
        return known[t, c]

    return act


@dataclass(frozen=True)
class Tail:
    """PPO on the execution of an order: for the mean, and for CVaR at .1 with shaped rewards."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder of the table."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    seeds: int = 10
    """Runs of each."""
    first_seed: int = 100
    """The first of their seeds; those up to 99 are for looking."""
    steps: int = 200_000
    """Environment steps of a run."""
    tau: float = 0.1
    """The level."""
    episodes: int = 4000
    """Episodes of the final evaluation."""

    def run(self) -> Rows:
        """Mean and CVaR of both with Student's 95 % interval, their paired differences, and the optima."""
        cells = [
            {"trained for": name, "tau": self.tau, "steps": self.steps, "episodes": self.episodes, "seed": seed}
            for seed, name in itertools.product(_seeds(self), ("mean", "cvar"))
        ]
        play = partial(_traced, play=play_tail, made=tables.made())
        found = complete(self.out / "tail.csv", cells, play, jobs=self.jobs, name="tail")
        env: Any = envs.make("ccrl/OrderExecution-v0", 1)
        fine = {"inventory": 61, "stocks": 961}
        optima = {"mean": env.optimum(Expected(), **fine).value, "cvar": env.optimum(CVaR(self.tau), **fine).value}
        # the two runs of a seed follow one another
        values = {
            (name, measure): [float(r[measure]) for r in found if r["trained for"] == name]
            for name in ("mean", "cvar") for measure in ("mean", "cvar")
        }  # fmt: skip
        rows: Rows = [
            {"trained for": name} | {k: v for measure in ("mean", "cvar") for k, v in _spread(
                measure, values[name, measure]).items()}
            for name in ("mean", "cvar")
        ]  # fmt: skip
        less = {k: [a - b for a, b in zip(values["cvar", k], values["mean", k])] for k in ("mean", "cvar")}
        rows.append({"trained for": "cvar less mean"} | _spread("mean", less["mean"]) | _spread("cvar", less["cvar"]))
        return [*rows, {"trained for": "optimum of each", "mean": optima["mean"], "cvar": optima["cvar"]}]


def _spread(name: str, values: list[float]) -> dict[str, Any]:
    """Mean, Student's 95 % interval, worst."""
    if len(values) < 2:
        return {name: values[0], f"{name}, 95 %": "", f"{name}, least": values[0]}
    mean, low, high = (float(x) for x in t_interval(values))
    return {name: mean, f"{name}, 95 %": f"[{low:.4g}, {high:.4g}]", f"{name}, least": min(values)}


def _seeds(study: Chain | Tail) -> range:
    return range(study.first_seed, study.first_seed + study.seeds)


def _traced(cell: dict[str, Any], play: Callable[[dict[str, Any]], Rows], made: dict[str, Any]) -> Rows:
    return [row | {"compile": "off"} | made for row in play(cell)]


def play_tail(cell: dict[str, Any]) -> Rows:
    """One run of ``Tail``. For CVaR, ``c_0`` is drawn uniformly in training; the one that is reported is the best of 17
    by 1,000 episodes each, and is judged by others."""
    risky, tau, seed = cell["trained for"] == "cvar", float(cell["tau"]), int(cell["seed"])
    low, high = -1.0, 2.0

    def uniform(generator: torch.Generator, n: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    def made(n: int, start: Any, objective: Objective | None) -> Any:
        env = envs.make("ccrl/OrderExecution-v0", n)
        # f(x) = min(x, 0): the policy of a stock is that of every level
        return StockEnv(env, 1.0, start, objective=objective) if risky else env

    agent = PPO(
        made(256, uniform, CVaR(1.0)), num_envs=256, n_steps=20, gamma=1.0, gae_lambda=1.0, batch_size=1280, n_epochs=4,
        seed=seed, learning_rate=3e-4, squash=True, log_std_init=-1.0, compile="off",
    )  # fmt: skip
    agent.learn(int(cell["steps"]))

    def returns(start: float, episodes: int, seed: int) -> torch.Tensor:
        env = made(episodes, start, None)
        obs, total = env.reset(seed=seed), torch.zeros(episodes, dtype=torch.float64)
        for _ in range(5):  # every episode has five steps
            result = env.step(agent.act(obs, deterministic=True))
            total += result.reward.double()
            obs = result.obs
        return total

    start = 0.0
    if risky:
        grid = torch.linspace(low, high, 17).tolist()
        scores = [
            float(CVaR(tau).from_start(torch.tensor(c), CVaR(tau).utility(c + returns(c, 1000, 1)).mean()))
            for c in grid
        ]
        start = grid[max(range(17), key=lambda i: scores[i])]
    final = returns(start, int(cell["episodes"]), 2)
    law = Law(final, torch.full_like(final, 1.0 / len(final)))
    return [{"start": start, "mean": float(final.mean()), "cvar": float(cvar(law, tau))}]


def main(argv: list[str]) -> Rows:
    """Run one of the studies and write its files."""
    torch.set_num_threads(1)
    commands: dict[str, Callable[..., Any]] = {"pictures": Pictures, "chain": Chain, "tail": Tail}
    study: Any = tyro.extras.subcommand_cli_from_dict(commands, args=argv, description=__doc__)
    rows: Rows = study.run()
    stem = study.figures / f"stock_{argv[0]}"
    # every run, so that the table can be checked without running any again; pictures are formulas
    runs = None if isinstance(study, Pictures) else list(read_rows(study.out / f"{argv[0]}.csv"))
    tables.write(stem, "python scripts/studies/stock " + shlex.join(argv), rows, runs)
    return rows
