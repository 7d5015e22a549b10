"""One run each of the offline baselines' studies; every function takes a cell's settings and gives its rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import envs
from agents.offline.online import go_online
from agents.td3 import TD3
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.offline import Dataset, normalised_score
from scripts.make_dataset import Maze, Pendulum
from scripts.studies.offline.data import SETS, opened
from scripts.studies.tables import Rows

__all__ = ["GRIDS", "compiled", "play_baseline", "play_online", "play_selection", "play_short", "returns_of"]

SPARSE = {"iql": {"expectile": 0.9, "beta": 10.0}, "rebrac": {"actor_penalty": 0.003, "critic_penalty": 0.001}}
"""Published settings for mazes with sparse rewards (IQL's of antmaze, ReBRAC's of maze2d)."""
GRIDS: dict[str, list[dict[str, float]]] = {
    "td3_bc": [{"alpha": a} for a in (0.5, 1.0, 2.5, 5.0, 10.0, 20.0)],
    "iql": [{"expectile": e, "beta": b} for e in (0.7, 0.9, 0.95) for b in (3.0, 10.0)],
}
"""Settings that a user without a simulator would have to choose among."""


def returns_of(agent: Any, env_id: str, episodes: int, seed: int) -> Any:
    """Returns of deterministic episodes; their streams of random numbers have nothing to do with training's."""
    copies = episodes if env_id.startswith("ccrl/") else min(10, episodes)
    env = envs.make(env_id, copies)
    found = evaluate_agent(agent, env, episodes, seed, True).returns
    env.close()
    return found


def compiled(agent: Any) -> dict[str, str]:
    """The column that says whether gradient steps were one compiled graph, whose arithmetic has another order."""
    return {"compile": "on" if agent.learner.cycle.compiled else "off"}


def play_short(cell: dict[str, Any], out: Path) -> Rows:
    """U-maze or pendulum with two layers of 128 and a short training."""
    task, _, controller = cell["data"].partition(" ")
    maze = task == "u_maze"
    if maze:
        data = u_maze(cell["steps"], controller=controller or "cells")
    else:
        data = Pendulum(steps=min(10_000, cell["steps"])).make()
    name, _, variant = cell["method"].partition(" ")
    settings = SPARSE.get(name, {}) if maze and variant != "tau .7" else {}
    env_id = SETS[task].env
    agent = agents.get_agent(name)(env_id, data=data, seed=cell["seed"], hidden=(128, 128), **settings)
    start = time.process_time()
    agent.learn(cell["updates"])
    spent = time.process_time() - start
    returns = returns_of(agent, env_id, cell["episodes"], cell["seed"])
    random = data.scores[0] if data.scores else 5.0
    return [{"return": float(returns.mean()), "random": random, "data return": float(data.returns().mean()),
             "cpu seconds": spent} | compiled(agent)]  # fmt: skip


def u_maze(steps: int, seed: int = 0, controller: Any = "cells") -> Dataset:
    """The noisy controller on the U-maze."""
    copies = max(1, min(50, steps // 200))
    return Maze(steps=steps, seed=seed, num_envs=copies, reference=100, controller=controller).make()


def play_baseline(cell: dict[str, Any], out: Path) -> Rows:
    """A row per evaluation, every sixth of the training."""
    name, kind = cell["method"], SETS[cell["data"]]
    data = opened(cell["data"], out, cell["steps"])
    settings: dict[str, Any] = {"hidden": kind.hidden if name != "rebrac" else (*kind.hidden, kind.hidden[0])}
    settings |= {"batch_size": 256} | (SPARSE.get(name, {}) if "maze" in cell["data"] else {})
    updates = cell["updates"]
    # compiling once is cheaper than so many eager steps; what is compiled is kept on disk for the next cell
    how = "on" if updates >= 10_000 else "off"
    agent = agents.get_agent(name)(kind.env, data=data, seed=cell["seed"], compile=how, **settings)
    rows, every = Rows(), max(agent.samples_per_iteration, updates // 6)
    assert data.scores is not None

    def look(agent: Any) -> None:
        if agent.num_timesteps % every:
            return
        returns = returns_of(agent, kind.env, min(kind.episodes, cell["episodes"]), cell["seed"])
        mean = float(returns.mean())
        rows.append({"update": agent.num_timesteps, "return": mean, "score": normalised_score(mean, data.scores or "")})

    agent.learn(updates, callback=look)
    return [row | {"data return": float(data.returns().mean())} | compiled(agent) for row in rows]


def play_online(cell: dict[str, Any], out: Path) -> Rows:
    """TD3 on the U-maze from nothing, from TD3+BC's networks, and from them with the data in its memory."""
    env_id = SETS["u_maze"].env
    online: dict[str, Any] = {"buffer_size": 200_000, "rounds": 100, "compile": "off"}
    if cell["start"] == "nothing":
        first = min(1_000, cell["online"] // 2)
        agent: Any = TD3(env_id, seed=cell["seed"], hidden=(128, 128), learning_starts=first, **online)
    else:
        data = u_maze(cell["steps"])
        offline = agents.get_agent("td3_bc")(env_id, data=data, seed=cell["seed"], hidden=(128, 128))
        offline.learn(cell["updates"])
        agent = go_online(offline, env_id, keep_data=cell["start"] == "networks and data", **online)
    rows = Rows()
    for step in range(0, cell["online"] + 1, cell["every"]):
        if step:
            agent.learn(until=step)
        returns = returns_of(agent, env_id, cell["episodes"], cell["seed"])
        rows.append({"step": agent.num_timesteps, "return": float(returns.mean())} | compiled(agent))
    return rows


def play_selection(cell: dict[str, Any], out: Path) -> Rows:
    """The returns of every episode of a policy that was trained with one of the settings."""
    settings = GRIDS[cell["method"]][cell["setting"]]
    data = u_maze(cell["steps"])
    agent = agents.get_agent(cell["method"])(
        SETS["u_maze"].env, data=data, seed=cell["seed"], hidden=(128, 128), **settings
    )
    agent.learn(cell["updates"])
    returns = returns_of(agent, SETS["u_maze"].env, cell["episodes"], cell["seed"])
    assert data.scores is not None
    return [{"values": json.dumps(settings), "return": float(returns.mean()), "random": data.scores[0],
             "expert": data.scores[1],
             "returns": " ".join(f"{x:.0f}" for x in returns)} | compiled(agent)]  # fmt: skip
