"""What two processes do, for test_several.py: one gradient step on their halves of a rollout."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import envs  # noqa: F401  (registers Pendulum)
from agents.ppo import PPO
from ccrl.data import Data
from ccrl.estimators.base import run_phases
from ccrl.learn.parallel import Processes, distribute

SETTINGS = {"n_steps": 8, "hidden": (8,), "n_epochs": 1, "normalise_advantage": "none", "normalise_obs": True,
            "learning_rate": 1e-2, "ent_coef": 0.01, "compile": "off"}  # fmt: skip


def make(num_envs: int, seed: int) -> PPO:
    return PPO("Pendulum-v1", num_envs=num_envs, batch_size=8 * num_envs, seed=seed, **SETTINGS)


def update(agent: PPO, columns: dict[str, torch.Tensor]) -> None:
    """One step on the whole rollout, and the move of the normaliser."""
    data = Data(columns)
    run_phases(agent.estimator, {"on": data}, agent.ctx)
    agent.policy.update_normaliser(data["obs"], data["valid"])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    processes = Processes()
    agent = make(8, seed=processes.seed(0))
    distribute(agent.learner, processes)
    mine = slice(8 * processes.rank, 8 * processes.rank + 8)
    update(agent, {k: x[:, mine].contiguous() for k, x in torch.load(folder / "rollout.pt").items()})
    torch.save(agent.policy.state_dict(), folder / f"after_{processes.rank}.pt")
    agent.learn(2 * 128)
    assert agent.num_timesteps == 256, agent.num_timesteps
    torch.save(agent.policy.state_dict(), folder / f"trained_{processes.rank}.pt")
    processes.close()
