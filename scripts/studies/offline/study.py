"""Offline agents side by side (docs/offline.md, docs/cdsa.md, docs/pgd.md).

    python scripts/studies/offline baselines --out results/offline --jobs 2   # maze, pendulum: four agents
    python scripts/studies/offline cdsa --out results/offline --jobs 2        # hazard corridor: strengths, VaR, CVaR
    python scripts/studies/offline guidance --out results/offline             # point maze: likelihood, dynamics error
    python scripts/studies/offline pgd --out results/offline --jobs 2         # point maze: kinds of rows

Data sets are made on the spot. Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with
more seeds, runs what is missing. In the end ``FIGURES/offline_NAME.md`` is written.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import envs
from agents.offline.cdsa import CDSA
from agents.offline.pgd import PGD
from ccrl.experiment.cells import complete
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.offline import Dataset, normalised_score, tail_mean, value_at_risk
from ccrl.settings import Count, Settings
from envs.maze import HazardCorridor, PointMaze, overconfident_action
from scripts import make_dataset

__all__ = ["Baselines", "Corridor", "Guidance", "Rows", "main"]

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Study(Settings):
    """What all studies have."""

    out: Path = Path("results/offline")
    """Finished runs are kept in this folder."""
    figures: Path = Path("docs/figures")
    """The report is written to this folder."""
    jobs: Count = 1
    """So many runs go at a time, each a process with one thread."""
    seeds: Count = 3
    """Each cell has so many runs."""
    updates: Count = 10_000
    """Agents take so many gradient steps."""
    episodes: Count = 100
    """So many episodes are played at the end, deterministically, with seeds of their own."""
    steps: Count = 100_000
    """Data sets of mazes have so many transitions."""


@dataclass(frozen=True)
class Baselines(Study):
    """Returns on the U-maze and on a bad InvertedPendulum, and normalised scores with references of our own."""

    methods: tuple[str, ...] = ("bc", "td3_bc", "iql", "rebrac")
    """These agents are compared; iql has expectile .9 and beta 10 on the maze."""
    data: tuple[str, ...] = ("maze", "pendulum")
    """These data sets are made."""

    def run(self) -> Table:
        cells = [
            {"data": d, "method": m, "seed": s, "updates": self.updates, "steps": self.steps, "episodes": self.episodes}
            for s, d, m in itertools.product(range(self.seeds), self.data, self.methods)
        ]
        found = complete(self.out / "baselines.csv", cells, play_baseline, jobs=self.jobs, name="baselines")
        return [_means(found, {"data": d, "method": m}, ("return", "score", "data return", "updates/s"))
                for d, m in itertools.product(self.data, self.methods)]  # fmt: skip


@dataclass(frozen=True)
class Corridor(Study):
    """CDSA beside the hazard: strengths of both parts, for both readings of the density."""

    updates: Count = 4_000
    """The score and the models take so many gradient steps."""
    episodes: Count = 400
    """So many episodes are played at the end."""
    strengths: tuple[float, ...] = (0.0, 0.05, 0.1, 0.5)
    """The state part has these strengths, with the action part off."""
    action_strengths: tuple[float, ...] = (0.5, 2.0, 5.0)
    """The action part has these strengths, with the state part off."""

    def run(self) -> Table:
        tried = [(0.0, k) for k in self.strengths] + [(k, 0.0) for k in self.action_strengths]
        cells = [
            {"density": d, "k_a": a, "k_s": k, "seed": s, "updates": self.updates, "episodes": self.episodes}
            for s, d, (a, k) in itertools.product(range(self.seeds), ("data", "policy"), tried)
        ]
        found = complete(self.out / "cdsa.csv", cells, play_corridor, jobs=self.jobs, name="cdsa")
        names = ("return", "VaR 5%", "CVaR 5%", "hazard steps", "moved")
        return [_means(found, {"density": d, "k_a": a, "k_s": k}, names)
                for d, (a, k) in itertools.product(("data", "policy"), tried)]  # fmt: skip


@dataclass(frozen=True)
class Guidance(Study):
    """Likelihood under a target policy and dynamics error of guided trajectories, for some strengths."""

    strengths: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0, 3.0)
    """The guidance has these coefficients."""
    seeds: Count = 1
    """Each cell has so many runs."""
    denoiser_steps: Count = 3_000
    """The denoiser takes so many gradient steps."""
    trajectories: Count = 300
    """So many trajectories are generated."""

    def run(self) -> Table:
        cells = [
            {"seed": s, "steps": self.steps, "denoiser_steps": self.denoiser_steps, "trajectories": self.trajectories,
             "strengths": " ".join(map(str, self.strengths))} for s in range(self.seeds)
        ]  # fmt: skip
        found = complete(self.out / "guidance.csv", cells, play_guidance, jobs=self.jobs, name="guidance")
        return [_means(found, {"strength": k}, ("log pi", "error mean", "error median", "displacement"))
                for k in self.strengths]  # fmt: skip


@dataclass(frozen=True)
class Rows(Study):
    """PGD beside its rivals: returns of TD3+BC and IQL on generated rows of the U-maze."""

    rows: tuple[str, ...] = ("real", "unguided", "transitions", "model", "guided")
    """Rows are made in these ways."""
    bases: tuple[str, ...] = ("td3_bc", "iql")
    """Policies are trained by these algorithms."""
    denoiser_steps: Count = 3_000
    """The denoiser takes so many gradient steps."""

    def run(self) -> Table:
        cells = [
            {"base": b, "rows": r, "seed": s, "updates": self.updates, "steps": self.steps, "episodes": self.episodes,
             "denoiser_steps": self.denoiser_steps}
            for s, b, r in itertools.product(range(self.seeds), self.bases, self.rows)
        ]  # fmt: skip
        found = complete(self.out / "pgd.csv", cells, play_rows, jobs=self.jobs, name="pgd")
        return [
            _means(found, {"base": b, "rows": r}, ("return", "score"))
            for b, r in itertools.product(self.bases, self.rows)
        ]


# -- cells ------------------------------------------------------------------------------------------------------------


def maze_data(steps: int, seed: int = 0) -> Dataset:
    """The noisy controller on the U-maze."""
    return make_dataset.Maze(steps=steps, seed=seed, num_envs=max(1, min(50, steps // 200))).make()


def play_baseline(cell: dict[str, Any]) -> Table:
    """One run of ``Baselines``."""
    maze = cell["data"] == "maze"
    data = maze_data(cell["steps"]) if maze else make_dataset.Pendulum(steps=min(10_000, cell["steps"])).make()
    env_id, scores = ("ccrl/PointMazeU-v0", data.scores) if maze else ("InvertedPendulum-v5", (5.0, 1000.0))
    settings: dict[str, Any] = {"hidden": (128, 128)}
    if cell["method"] == "iql" and maze:
        settings |= {"expectile": 0.9, "beta": 10.0}
    if cell["method"] == "rebrac":
        settings |= {"batch_size": 256, "actor_penalty": 0.003, "critic_penalty": 0.001}
    agent = agents.get_agent(cell["method"])(env_id, data=data, seed=cell["seed"], **settings)
    agent.learn(cell["updates"])
    result = _score(agent, env_id, cell)
    assert scores is not None
    return [{
        "return": result, "score": normalised_score(result, scores), "data return": float(data.returns().mean()),
        "updates/s": float(agent.scalars["time/fps"]),
    }]  # fmt: skip


def play_corridor(cell: dict[str, Any]) -> Table:
    """One run of ``Corridor``: the paper's tables are unknown, so are its settings; these are ours."""
    agent = CDSA(
        HazardCorridor(1), data=make_dataset.Corridor(seed=cell["seed"]).make(), policy=Overconfident(),
        seed=cell["seed"], ignored=(0,), hidden=(128, 128), model_hidden=(128, 128), learning_rate=1e-3,
        action_strength=cell["k_a"], state_strength=cell["k_s"], density_of=cell["density"],
    )  # fmt: skip
    agent.learn(cell["updates"])
    env = HazardCorridor(cell["episodes"])
    obs, total, hazard = env.reset(seed=10_000 + cell["seed"]), torch.zeros(cell["episodes"]), 0.0
    moved = 0.0
    with torch.no_grad():
        for _ in range(100):
            base = agent.policy.base_action(obs)
            action = agent.policy.act(obs, None)["action"]
            moved += float((action - base).norm(dim=-1).mean()) / 100
            result = env.step(action)
            obs, total = result.obs, total + result.reward
            assert isinstance(result.final_obs, Tensor)
            hazard += float((result.final_obs[:, 1].abs() > 0.5).float().mean())
    returns = total.double().numpy()
    return [{
        "return": float(returns.mean()), "VaR 5%": value_at_risk(returns, 0.05), "CVaR 5%": tail_mean(returns, 0.05),
        "hazard steps": hazard, "moved": moved,
    }]  # fmt: skip


class Overconfident(nn.Module):
    """The policy that left its data."""

    def act(self, obs: Tensor, noise: Tensor | None, *rest: Any) -> dict[str, Tensor]:
        return {"action": overconfident_action(obs)}

    def to_env(self, action: Tensor) -> Tensor:
        return action


def target_policy(obs: Tensor) -> tuple[Tensor, Tensor]:
    """``.7 tanh((1, 1) - p - .5 v)`` with unit variance."""
    mean = 0.7 * (1.0 - obs[:, :2] - 0.5 * obs[:, 2:]).tanh()
    return mean, torch.ones_like(mean)


def play_guidance(cell: dict[str, Any]) -> Table:
    """One run of ``Guidance``: one denoiser, all strengths."""
    data = maze_data(cell["steps"], cell["seed"])
    found: Table = []
    agent: Any = None
    for strength in map(float, cell["strengths"].split()):
        made = PGD(
            "ccrl/PointMazeU-v0", data=data, seed=cell["seed"], strength=strength, window=16, generated=15,
            sampling_steps=32, denoiser_features=48, denoiser_levels=2, denoiser_batch=64, trajectories=1,
            denoiser_steps=cell["denoiser_steps"], compile="off",
        )  # fmt: skip
        if agent is None:
            made.before_learning()
            agent = made
        made.maker.load_state_dict(agent.maker.state_dict())
        made.actor = target_policy  # type: ignore[method-assign]
        made.ctx.generator.manual_seed(cell["seed"])
        rows = made.generate(cell["trajectories"], guided=True)
        env = PointMaze(len(rows["reward"]))
        truth, _, _ = env.transition(rows["obs"], rows["action"], None)
        variance = torch.as_tensor(data.obs.var(0))
        error = ((rows["next_obs"] - truth).square() / variance).mean(-1)
        mean, _ = target_policy(rows["obs"])
        ways = rows["obs"].view(-1, 15, 4)
        found.append({
            "strength": strength, "log pi": float(-0.5 * (rows["action"] - mean).square().sum(-1).mean()),
            "error mean": float(error.mean()), "error median": float(error.median()),
            "displacement": float((ways[:, -1, :2] - ways[:, 0, :2]).norm(dim=-1).mean()),
        })  # fmt: skip
    return found


def play_rows(cell: dict[str, Any]) -> Table:
    """One run of ``Rows``."""
    data = maze_data(cell["steps"])
    iql = {"expectile": 0.9, "beta": 10.0} if cell["base"] == "iql" else {}
    agent = PGD(
        "ccrl/PointMazeU-v0", data=data, seed=cell["seed"], base=cell["base"], rows=cell["rows"], hidden=(128, 128),
        window=16, generated=15, sampling_steps=32, denoiser_features=48, denoiser_levels=2, denoiser_batch=64,
        trajectories=2000, denoiser_steps=cell["denoiser_steps"], regenerate_every=2_000, **iql,
    )  # fmt: skip
    agent.learn(cell["updates"])
    result = _score(agent, "ccrl/PointMazeU-v0", cell)
    assert data.scores is not None
    return [{"return": result, "score": normalised_score(result, data.scores)}]


def _score(agent: Any, env_id: str, cell: dict[str, Any]) -> float:
    env = envs.make(env_id, cell["episodes"])
    return float(evaluate_agent(agent, env, cell["episodes"], 20_000 + cell["seed"], True).returns.mean())


# -- report -----------------------------------------------------------------------------------------------------------


def _means(found: list[dict[str, str]], which: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    rows = [r for r in found if all(r[k] == str(v) for k, v in which.items())]
    out: dict[str, Any] = dict(which)
    for name in names:
        values = [float(r[name]) for r in rows]
        spread = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
        out[name] = f"{statistics.mean(values):.4g}{spread}"
    return out


def report(name: str, table: Table, figures: Path) -> str:
    """Markdown of a table, written to ``figures``."""
    head = list(table[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(row[k]) for k in head) + " |" for row in table]
    text = "\n".join(lines) + "\n"
    figures.mkdir(parents=True, exist_ok=True)
    (figures / f"offline_{name}.md").write_text(text, encoding="utf-8")
    return text


STUDIES: dict[str, type[Study]] = {"baselines": Baselines, "cdsa": Corridor, "guidance": Guidance, "pgd": Rows}


def main(argv: list[str]) -> Table:
    """The command line."""
    if not argv or argv[0] not in STUDIES:
        raise ValueError(f"expected one of {', '.join(STUDIES)}, got {argv[:1] or 'nothing'}")
    study: Any = tyro.cli(STUDIES[argv[0]], args=argv[1:], prog=f"offline {argv[0]}")
    np.seterr(all="raise", under="ignore")
    table: Table = study.run()
    print(report(argv[0], table, study.figures))
    return table
