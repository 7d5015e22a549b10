"""Fine-tuning of cloned flow actors: a point in a maze, Hopper from a data set of middling episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from agents.flow.flow_ppo import FlowPPO
from agents.ppo import PPO
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.offline import Dataset, load_npz
from scripts.make_dataset import Maze, collect, write
from scripts.studies.tables import Rows

__all__ = ["FINE_TUNING", "MEDIUM", "hopper", "maze", "medium"]

MEDIUM: dict[str, Any] = {"returns": 1200.0, "rows": 100_000, "block": 20_480, "most": 1_024_000}
"""Of Hopper's data set: the training return that ends PPO, transitions, environment steps between two looks, and most
of them."""
FINE_TUNING: dict[str, Any] = {
    "learning_rate": 3e-4, "critic_learning_rate": 1e-3, "n_epochs": 5, "normalise_reward": True, "hidden": (256, 256),
    "clone_steps": 10_000, "critic_warmup": 10,
}  # fmt: skip
"""Of the actor on Hopper."""


def maze(options: dict[str, Any], cell: dict[str, Any], out: Path) -> Rows:
    """A flow actor cloned from a controller that walks to random targets, fine-tuned for one goal: stochastic returns
    of 64 episodes."""
    data = Maze(maze="u_maze", steps=50_000, reference=1, seed=cell["seed"]).make()
    agent = FlowPPO("ccrl/PointMazeU-v0", seed=cell["seed"], compile="off", **options)
    return _fine_tuned(agent, data, "ccrl/PointMazeU-v0", cell, 64)


def hopper(options: dict[str, Any], cell: dict[str, Any], out: Path) -> Rows:
    """A flow actor cloned from middling episodes of Hopper and fine-tuned on its reward; one data set for all seeds."""
    agent = FlowPPO("Hopper-v5", seed=cell["seed"], compile="off", **(FINE_TUNING | options))
    return _fine_tuned(agent, medium(out / "hopper-medium.npz"), "Hopper-v5", cell, 32)


def medium(path: Path) -> Dataset:
    """The data set in ``path``; made where there is none: episodes, drawn as in D4RL, of the first policy of a PPO run
    (seed 0) whose last training episodes return ``MEDIUM["returns"]``, a third of what a long run reaches, or of the
    last policy where none does."""
    if not path.exists():
        c = MEDIUM
        agent = PPO("Hopper-v5", seed=0, normalise_obs=True, normalise_reward=True, compile="off")
        while (agent.ep_rew_mean or 0.0) < c["returns"] and agent.num_timesteps < c["most"]:
            agent.learn(c["block"])
        torch.manual_seed(0)
        env = envs.make("Hopper-v5", 10)
        data = collect(env, lambda obs: agent.act(obs, False), c["rows"], 0, str(path))
        env.close()
        partial = path.with_name("unfinished-" + path.name)
        write(data, str(partial), None)
        partial.replace(path)  # a killed run must not leave half a data set
        print(f"[flow hopper] {path}: {len(data):,} transitions of PPO after {agent.num_timesteps:,} steps, mean "
              f"return {data.returns().mean():.0f}", flush=True)  # fmt: skip
    return load_npz(path)


def _fine_tuned(agent: FlowPPO, data: Dataset, env_id: str, cell: dict[str, Any], episodes: int) -> Rows:
    """Returns of the clone and after every ``every`` iterations, actions drawn."""
    agent.clone(data)
    rows = Rows()
    for k in range(0, cell["iterations"] + 1, cell["every"]):
        if k:
            agent.learn(until=k * agent.samples_per_iteration)
        env = envs.make(env_id, episodes)
        found = evaluate_agent(agent, env, episodes, seed=1000 + cell["seed"], deterministic=False)
        env.close()
        rows.append({"iteration": k, "steps": agent.num_timesteps, "reward": float(found.returns.mean())})
    return rows
