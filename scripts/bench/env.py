"""How much of the simulator's own speed an environment keeps: ``python scripts/bench env``."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import mujoco
import numpy as np
import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from envs.mujoco import TASKS, MujocoEnv
from envs.mujoco.engine import available_cores
from envs.mujoco.model import load_model

__all__ = ["Config", "main"]

Run = Callable[[int], int]
"""Runs at least the given number of environment steps and returns how many it ran."""
DRAWS = 64  # random actions are drawn once and repeated: drawing is not what is measured


@dataclass
class Config:
    """Environment steps per second under random actions, observation, reward and resets included, beside

    * raw: one MjData per thread, ``frame_skip`` times ``mj_step`` per step, resets as often as in the environment;
    * Gymnasium's SyncVectorEnv, which uses one thread, against this environment on one thread;
    * EnvPool on the same threads, when it is installed.

    The measurements alternate and a ratio is the median of the rounds' ratios: a change in the machine's load then
    meets both sides.
    """

    tasks: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5")
    """Gymnasium ids."""
    num_envs: tuple[int, ...] = (64, 256)
    """Numbers of copies."""
    sync_envs: int = 16
    """Copies in SyncVectorEnv."""
    nthread: int | None = None
    """Simulator threads; by default every core this process may use."""
    rounds: int = 15
    """Measurements of each kind."""
    seconds: float = 0.15
    """Length of one measurement."""


def main(config: Config) -> None:
    """Measure and print a Markdown table.

    Raises ``ValueError`` for an unknown task.
    """
    if unknown := sorted(set(config.tasks) - set(TASKS)):
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, received {', '.join(unknown)}")
    torch.set_num_threads(1)
    nthread = config.nthread or available_cores()
    print(
        f"mujoco {mujoco.__version__}, gymnasium {gymnasium.__version__}, {nthread} threads, {config.rounds} rounds\n"
    )
    print("| task | copies | steps/s | raw mj_step, steps/s | of raw | of SyncVectorEnv, one thread | of EnvPool |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for task in config.tasks:
        for num_envs in config.num_envs:
            speeds = _measure(task, num_envs, nthread, config)
            ours, raw = statistics.median(speeds["ours"]), statistics.median(speeds["raw"])
            of_raw, of_sync = _ratio(speeds, "ours", "raw"), _ratio(speeds, "ours, one thread", "sync")
            of_envpool = f"{_ratio(speeds, 'ours', 'envpool'):.2f}" if "envpool" in speeds else "not installed"
            row = f"| {task} | {num_envs} | {ours:,.0f} | {raw:,.0f} | {of_raw:.2f} | {of_sync:.2f} | {of_envpool} |"
            print(row, flush=True)


def _ratio(speeds: dict[str, list[float]], ours: str, peer: str) -> float:
    return statistics.median(a / b for a, b in zip(speeds[ours], speeds[peer]))


def _measure(task: str, num_envs: int, nthread: int, config: Config) -> dict[str, list[float]]:
    env = MujocoEnv(TASKS[task](), num_envs, seed=0, nthread=nthread)
    runs: dict[str, Run] = {
        "ours": _ours(env),
        "raw": _raw(env, nthread, _episode_length(env)),
        "ours, one thread": _ours(MujocoEnv(TASKS[task](), num_envs, seed=0, nthread=1)),
        "sync": _vector_env(gymnasium.make_vec(task, config.sync_envs, "sync")),
    }
    if importlib.util.find_spec("envpool"):
        make = importlib.import_module("envpool").make
        runs["envpool"] = _vector_env(make(task, "gymnasium", num_envs=num_envs, num_threads=nthread))
    steps = {name: round(config.seconds * _speed(run, 20 * num_envs)) for name, run in runs.items()}
    rounds = [{name: _speed(run, steps[name]) for name, run in runs.items()} for _ in range(config.rounds)]
    return {name: [speeds[name] for speeds in rounds] for name in runs}


def _speed(run: Run, steps: int) -> float:
    start = time.perf_counter()
    count = run(steps)
    return count / (time.perf_counter() - start)


def _actions(env: MujocoEnv) -> np.ndarray:
    space = env.single_action_space
    return np.random.default_rng(0).uniform(space.low, space.high, (DRAWS, env.num_envs, *space.shape))


def _episode_length(env: MujocoEnv) -> int:
    """Mean length of the episodes that random actions end; the time limit where they end none."""
    steps, ends = 300, 0
    actions = torch.from_numpy(_actions(env))
    env.reset()
    for k in range(steps):
        result = env.step(actions[k % DRAWS])
        ends += int(result.terminated.sum())
    return round(steps * env.num_envs / ends) if ends else env.max_episode_steps


def _ours(env: MujocoEnv) -> Run:
    actions = torch.from_numpy(_actions(env)).float()
    env.reset()

    def run(steps: int) -> int:
        rounds = -(-steps // env.num_envs)
        for k in range(rounds):
            env.step(actions[k % DRAWS])
        return rounds * env.num_envs

    return run


def _raw(env: MujocoEnv, nthread: int, episode_length: int) -> Run:
    task = env.task
    model = load_model(task.xml_file)
    actions = _actions(env).reshape(-1, model.nu)
    starts = [x.numpy() for x in task.reset(DRAWS, torch.Generator().manual_seed(0))]
    simulators = [mujoco.MjData(model) for _ in range(nthread)]
    frame_skip = task.frame_skip

    def work(data: mujoco.MjData, steps: int) -> None:
        for k in range(steps):
            if k % episode_length == 0:
                mujoco.mj_resetData(model, data)
                data.qpos[:], data.qvel[:] = (x[k // episode_length % DRAWS] for x in starts)
                mujoco.mj_forward(model, data)
            data.ctrl[:] = actions[k % len(actions)]
            mujoco.mj_step(model, data, frame_skip)

    def run(steps: int) -> int:
        share = -(-steps // nthread)
        threads = [threading.Thread(target=work, args=(data, share)) for data in simulators]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return share * nthread

    return run


def _vector_env(env: gymnasium.vector.VectorEnv) -> Run:
    # EnvPool's action_space is the single one, so the batch axis is added here.
    space = getattr(env, "single_action_space", env.action_space)
    shape = (DRAWS, env.num_envs, *space.shape)
    actions = np.random.default_rng(0).uniform(space.low, space.high, shape).astype(space.dtype)
    env.reset()

    def run(steps: int) -> int:
        rounds, resets = -(-steps // env.num_envs), 0
        for k in range(rounds):
            _, _, terminated, truncated, _ = env.step(actions[k % DRAWS])
            # Both peers reset in the step after an episode's end, which is no step of the environment.
            resets += int((terminated | truncated).sum())
        return int(rounds * env.num_envs - resets)

    return run
