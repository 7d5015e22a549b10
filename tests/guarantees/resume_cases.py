"""The processes behind ``test_exact_resume.py``: ``resume_cases.py kill|compare FOLDER CASE...``.

``kill`` trains every case in a process of its own that dies by SIGKILL right after its checkpoint. ``compare``, a new
process, resumes each and also trains it without interruption; it prints, as JSON, what differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

import envs  # noqa: F401  (registers ids also where the project is not installed)
from agents import get_agent
from ccrl.experiment import config as configs
from ccrl.experiment.callbacks import Callback, CheckpointCallback

HALF, WHOLE = 3, 6
"""Iterations."""

ROLLOUT: dict[str, Any] = {"num_envs": 2, "n_steps": 16}
# the ring of 40 is overwritten: half of a run fills it with 36 rows
REPLAY: dict[str, Any] = {"num_envs": 2, "rounds": 6, "learning_starts": 10, "buffer_size": 40, "batch_size": 8}
OFFLINE: dict[str, Any] = {"dataset": "data.npz", "updates": 4, "batch_size": 8}
SIZES: dict[str, dict[str, Any]] = {
    "ppo": {
        **ROLLOUT, "batch_size": 16, "n_epochs": 2, "normalise_obs": True, "normalise_reward": True, "anneal_lr": True,
    },
    "mdpo": {**ROLLOUT, "inner_steps": 2, "critic_batch_size": 32, "critic_epochs": 1},
    "bpo": {**ROLLOUT, "batch_size": 8, "n_epochs": 2, "median_hidden": [4], "anneal_eps": True},
    "sac": {**REPLAY, "actor_every": 2, "n_step_returns": 2, "normalise_obs": True},
    "td3": {**REPLAY, "actor_every": 2},
    "crossq": {**REPLAY, "warm_up": 5},
    "mdpo_off_policy": {**REPLAY, "reference_every": 5},
    "dqn": {**REPLAY, "target_every": 5},
    "qr_dqn": {**REPLAY, "target_every": 5, "n_quantiles": 4},
    "detan": {**REPLAY, "target_every": 5, "n_quantiles": 4, "relabel": 0.5},
    "iql": {**OFFLINE, "anneal_actor": True},
    "td3_bc": {**OFFLINE, "policy_delay": 3},
    "cdsa": {**OFFLINE, "base": "base.pt", "density_of": "policy", "model_hidden": [8]},
    "pgd": {
        **OFFLINE, "real_rows": 2, "window": 8, "stride": 2, "generated": 7, "trajectories": 4, "sampling_steps": 2,
        "regenerate_every": 8, "denoiser_steps": 2, "denoiser_batch": 4, "denoiser_features": 8, "denoiser_levels": 1,
    },
}  # fmt: skip


class Draws(Callback):
    """State of its own, from all three global generators: a resumed run must draw what the whole one does."""

    def __init__(self) -> None:
        self.drawn: list[list[float]] = []

    def on_iteration(self, agent: Any) -> bool | None:
        self.drawn.append([random.random(), float(np.random.rand()), float(torch.rand(()))])  # noqa: NPY002
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": [list(d) for d in self.drawn]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = [list(d) for d in state["drawn"]]


class DyingCheckpoint(CheckpointCallback):
    """Saves, then SIGKILL."""

    key = CheckpointCallback.__name__  # the resumed run's callback finds its state under this name

    def _save(self, agent: Any) -> None:
        super()._save(agent)
        os.kill(os.getpid(), signal.SIGKILL)


def prepare(folder: Path) -> None:
    """What offline agents read: a data set of the pendulum's spaces, and a policy to correct."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(61, 4))
    np.savez(
        folder / "data.npz", obs=obs[:-1], action=rng.uniform(-3, 3, (60, 1)), reward=obs[1:, 0], next_obs=obs[1:],
        terminated=np.arange(60) % 15 == 14,
    )  # fmt: skip
    build("ppo:InvertedPendulum-v5:off", folder).save(folder / "base.pt")


def build(case: str, folder: Path) -> Any:
    name, env, compiled = case.split(":")
    cls = get_agent(name)
    files = {k: str(folder / SIZES[name][k]) for k in ("dataset", "base") if k in SIZES[name]}
    sizes = {"hidden": [8], "compile": compiled, **SIZES[name], **files}
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    agent = cls(env, configs.from_dict(cls.Config, sizes), seed=3)
    for updater in agent.updaters.values():
        updater.unroll = 2  # PPO's two minibatches in one graph; four would compile for twice as long
    return agent


def train(agent: Any, folder: Path, checkpoints: type[CheckpointCallback] = CheckpointCallback) -> Any:
    callbacks = [Draws(), checkpoints(folder, every=HALF * agent.samples_per_iteration)]
    return agent.learn(until=WHOLE * agent.samples_per_iteration, callback=callbacks)


def differences(a: Any, b: Any, where: str = "state") -> list[str]:
    """Paths of two trees at which they are not equal, bit for bit."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(a)} against {sorted(b)}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: length {len(a)} against {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
    return [] if equal else [f"{where}: {a} against {b}"]


def facts(agent: Any) -> dict[str, Any]:
    scalars = {k: float(v) for k, v in agent.scalars.items() if not k.startswith("time/")}
    return {**agent.state_dict(), "scalars": scalars, "clock": agent.num_timesteps}


def kill(folder: Path, cases: list[str]) -> None:
    # an agent made here would be collected in the children, where its environment waits for threads that a fork ends
    if (child := os.fork()) == 0:
        prepare(folder)
        os._exit(0)
    os.waitpid(child, 0)
    for i, case in enumerate(cases):
        child = os.fork()  # one start-up for all cases; each still dies alone
        if child == 0:
            train(build(case, folder), folder / str(i), DyingCheckpoint)
            os._exit(0)  # not reached
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{case}: expected death by SIGKILL, got status {status}")


def compare(folder: Path, cases: list[str]) -> None:
    found: dict[str, list[str]] = {}
    for i, case in enumerate(cases):
        saved = sorted((folder / str(i)).glob("step_*.pt"))
        random.seed(i + 50)
        torch.manual_seed(i + 50)
        resumed = get_agent(case.split(":")[0]).load(saved[-1], restore_rng=True)
        for updater in resumed.updaters.values():
            updater.unroll = 2
        assert [len(saved), resumed.iteration, resumed.num_timesteps] == [1, HALF, HALF * resumed.samples_per_iteration]
        train(resumed, folder / f"{i}-resumed")
        ours = facts(resumed)
        whole = facts(train(build(case, folder), folder / f"{i}-whole"))
        assert len(whole["callbacks"]["Draws"]["drawn"]) == WHOLE
        assert any(u.compile for u in resumed.updaters.values()) == case.endswith(":on")
        found[case] = differences(whole, ours)
    print(json.dumps(found))


if __name__ == "__main__":
    {"kill": kill, "compare": compare}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
