"""How fast PPO trains, end to end: ``python scripts/bench train``."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from ccrl.packages import check_siblings, require
from ccrl.settings import Activation, Compile

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers ids)
from agents import PPO
from agents.ppo import PPOConfig

__all__ = ["Config", "main"]

PHASES = ("env", "policy", "estimate", "update")


@dataclass
class Config:
    """Environment steps per second of PPO, beside Stable-Baselines3 (and SBX, when it is installed) with the same
    network, rollout, minibatch and number of gradient steps, one torch thread each.

    The others have their own vector environment of Gymnasium's tasks, as their users do; ours has ``nthread`` simulator
    threads. The measurements alternate and a ratio is the median of the rounds' ratios: a change in the machine's load
    then meets all. The first iterations, compilation included, are not measured; their time is stated.
    """

    task: str = "HalfCheetah-v5"
    """Environment id."""
    num_envs: int = 16
    """Environments."""
    n_steps: int = 128
    """Steps per environment and iteration."""
    batches: tuple[tuple[int, int], ...] = ((64, 10), (256, 4))
    """Pairs of minibatch size and epochs."""
    rounds: int = 5
    """Measurements of each side."""
    iterations: int = 4
    """Iterations per measurement."""
    scaling: tuple[int, ...] = (16, 64, 256, 1024)
    """Numbers of environments of the second table."""
    nthread: int | None = None
    """Simulator threads of ours; by default every core this process may use."""


class Side:
    """One competitor: runs iterations and remembers the speed of each measurement."""

    def __init__(self, run: Callable[[int], int], phases: Callable[[], list[float]] | None = None) -> None:
        self.run, self.phases = run, phases
        start = time.perf_counter()
        run(2)  # compiles, and fills caches
        self.first = time.perf_counter() - start
        """Seconds of the first two iterations."""
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def measure(self, iterations: int) -> None:
        """Append microseconds per environment step, of the wall clock and of all cores."""
        wall, cpu = time.perf_counter(), time.process_time()
        steps = self.run(iterations)
        self.cpu.append((time.process_time() - cpu) / steps * 1e6)
        self.wall.append((time.perf_counter() - wall) / steps * 1e6)


def main(config: Config) -> None:
    """Measure and print Markdown tables.

    Raises ``ImportError`` without SB3.
    """
    require("stable_baselines3", "sb3")
    torch.set_num_threads(1)
    print(_machine(config) + "\n")
    for batch_size, n_epochs in config.batches:
        _compare(config, batch_size, n_epochs)
    if config.scaling:
        _scaling(config)


def _machine(config: Config) -> str:
    names = ["torch", "mujoco", "gymnasium", "stable_baselines3"]
    names += ["sbx-rl", "jax"] if util.find_spec("sbx") else []
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    return (f"{cpu}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start; Python "
            f"{platform.python_version()}, {', '.join(f'{name} {metadata.version(name)}' for name in names)}; "
            f"{config.rounds} rounds of {config.iterations} iterations")  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# -- sides ----------------------------------------------------------------------------------------------------------


def _ours(
    config: Config,
    compiled: Compile,
    batch_size: int,
    n_epochs: int,
    num_envs: int,
    n_steps: int,
    activation: Activation = "tanh",
) -> Side:
    ppo = PPOConfig(
        num_envs=num_envs, n_steps=n_steps, batch_size=batch_size, n_epochs=n_epochs, compile=compiled,
        activation=activation,
    )  # fmt: skip
    kwargs = {"nthread": config.nthread} if config.nthread else {}
    agent = PPO(config.task, ppo, env_kwargs=kwargs)
    shares: list[list[float]] = []

    def note(agent: Any) -> None:
        shares.append([float(agent.scalars[f"time/{name}"]) for name in PHASES])

    def run(iterations: int) -> int:
        steps = iterations * agent.samples_per_iteration
        shares.clear()
        with contextlib.redirect_stdout(io.StringIO()):  # its line about the compiler belongs in no table
            agent.learn(steps, note)
        return steps

    return Side(run, lambda: [statistics.mean(column) for column in zip(*shares)])


def _theirs(config: Config, module: str, batch_size: int, n_epochs: int) -> Side:
    from stable_baselines3.common.env_util import make_vec_env

    cls = importlib.import_module(module).PPO
    options = {"n_steps": config.n_steps, "batch_size": batch_size, "n_epochs": n_epochs}
    env = make_vec_env(config.task, config.num_envs, seed=0)
    model = cls("MlpPolicy", env, seed=0, device="cpu" if module == "stable_baselines3" else "auto", **options)

    def run(iterations: int) -> int:
        steps = iterations * config.num_envs * config.n_steps
        model.learn(steps, reset_num_timesteps=False)
        return steps

    return Side(run)


# -- tables ---------------------------------------------------------------------------------------------------------


def _compare(config: Config, batch_size: int, n_epochs: int) -> None:
    shape = (batch_size, n_epochs, config.num_envs, config.n_steps)
    sides = {
        "ccrl, compiled": _ours(config, "on", *shape),
        "ccrl, compiled, fast_tanh": _ours(config, "on", *shape, "fast_tanh"),
        "ccrl, eager": _ours(config, "off", *shape),
        "SB3": _theirs(config, "stable_baselines3", batch_size, n_epochs),
    }
    if util.find_spec("sbx"):
        sides["SBX"] = _theirs(config, "sbx", batch_size, n_epochs)
    for _ in range(config.rounds):
        for side in sides.values():
            side.measure(config.iterations)
    updates = n_epochs * -(-config.num_envs * config.n_steps // batch_size)
    peers = [name for name in sides if not name.startswith("ccrl")]
    print(f"PPO on {config.task}, {config.num_envs} envs x {config.n_steps} steps, minibatches of {batch_size}, "
          f"{n_epochs} epochs ({updates} gradient steps per iteration)\n")  # fmt: skip
    columns = ["steps/s", "range", "CPU us/step", *(f"of {peer}" for peer in peers), "compile, s", *PHASES]
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    two = 2 * config.num_envs * config.n_steps
    for name, side in sides.items():
        speeds = [1e6 / us for us in side.wall]
        ratios = [f"{_ratio(sides[peer].wall, side.wall):.2f}" for peer in peers]
        spent = max(0.0, side.first - two * statistics.median(side.wall) / 1e6)
        shares = [f"{share:.0%}" for share in side.phases()] if side.phases else [""] * len(PHASES)
        cells = [f"{statistics.median(speeds):,.0f}", f"{min(speeds):,.0f}-{max(speeds):,.0f}",
                 f"{statistics.median(side.cpu):.1f}", *ratios, f"{spent:.1f}", *shares]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()


def _scaling(config: Config) -> None:
    """Microseconds per environment step by the number of environments, at the same gradient steps per step."""
    batch_size, n_epochs = config.batches[-1]
    sides = {n: _ours(config, "on", batch_size, n_epochs, n, max(16, 2048 // n)) for n in config.scaling}
    for _ in range(config.rounds):
        for side in sides.values():
            side.measure(1 if side is sides[max(sides)] else config.iterations)
    print(f"Microseconds per environment step, compiled, minibatches of {batch_size}, {n_epochs} epochs\n")
    print(f"| envs | us/step | CPU us/step | {' | '.join(f'{name}, us' for name in PHASES)} |\n|---|{'---:|' * 6}")
    for n, side in sides.items():
        us = statistics.median(side.wall)
        parts = " | ".join(f"{share * us:.1f}" for share in (side.phases() if side.phases else ()))
        print(f"| {n} | {us:.1f} | {statistics.median(side.cpu):.1f} | {parts} |", flush=True)


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours))
