"""How fast SAC and TD3 run, steps of the environment included: ``python scripts/bench off_policy``."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any, Literal

import torch

from ccrl.packages import check_siblings, require
from ccrl.settings import Compile

check_siblings("agents", "envs")

import agents
import envs  # noqa: F401  (registers ids)

__all__ = ["Config", "floor", "main"]

Run = Callable[[int], None]


@dataclass
class Config:
    """Environment steps per second of the whole loop (acting, environment, memory, gradient steps) beside
    Stable-Baselines3 and, where it is installed, SBX, with the same network, batch and gradient steps per step.

    The sides are measured in turns, and a ratio is the median of the rounds' ratios. What compiles does so before. The
    floor is the time of the matrix products of an update alone, in the same run.
    """

    agent: Literal["sac", "td3"] = "sac"
    """The agent: sac or td3."""
    task: str = "HalfCheetah-v5"
    """Environment id, of Gymnasium."""
    hidden: tuple[int, ...] = (256, 256)
    """These are the widths of the hidden layers."""
    batch_size: int = 256
    """A gradient step reads this many transitions."""
    settings: tuple[tuple[int, int], ...] = ((1, 1),)
    """Pairs of parallel environments and of gradient steps after a step of all of them."""
    steps: int = 200
    """A measurement takes this many gradient steps."""
    rounds: int = 5
    """Each side is measured so many times."""
    threads: int = 1
    """PyTorch and XLA use this many threads."""
    compile: Compile = "on"
    """Our gradient steps are compiled (on) or not (off)."""


def main(config: Config) -> str:
    """Print and return a Markdown table."""
    require("stable_baselines3", "sb3")
    torch.set_num_threads(config.threads)
    # read when JAX is first imported
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if config.threads == 1 else ""
    os.environ.setdefault("XLA_FLAGS", one)
    others = {"SB3": "stable_baselines3"} | ({"SBX": "sbx"} if util.find_spec("sbx") else {})
    columns = [f"of {name}, {clock}" for name in others for clock in ("CPU", "wall")]
    lines = [
        f"{config.agent} on {config.task}, {config.hidden}, batch {config.batch_size}, {config.threads} thread(s), "
        f"{config.rounds} rounds of {config.steps} gradient steps\n",
        f"| environments | updates | side | steps per CPU second | steps/s | {' | '.join(columns)} | of the floor |",
        f"|---:|---:|---|{'---:|' * (3 + len(columns))}",
    ]
    for n, updates in config.settings:
        rounds = -(-config.steps // updates)
        sides: dict[str, Run] = {"ccrl": _ours(config, n, updates, rounds)}
        sides |= {name: _theirs(config, module, n, updates) for name, module in others.items()}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        least = list[float]()
        for k in range(config.rounds):
            for name in list(sides) if k % 2 == 0 else reversed(sides):
                taken[name].append(_clocks(sides[name], rounds * n))
            least.append(floor(config, rounds * updates))
        for name, spent in taken.items():
            speeds = [rounds * n / statistics.median(column) for column in zip(*spent)]
            ratios = [
                f"{statistics.median(b[i] / a[i] for a, b in zip(spent, taken[other])):.2f}"
                for other in others for i in (0, 1)
            ]  # fmt: skip
            share = statistics.median(f / s[0] for f, s in zip(least, spent))
            cells = [str(n), str(updates), name, *(f"{x:,.0f}" for x in speeds), *ratios, f"{share:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text, flush=True)
    return text


def _clocks(run: Run, count: int) -> tuple[float, float]:
    """Processor seconds and seconds of ``run(count)``."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(count)
    return time.process_time() - cpu, time.perf_counter() - wall


def _ours(config: Config, n: int, updates: int, rounds: int) -> Run:
    options = {"hidden": config.hidden, "batch_size": config.batch_size, "compile": config.compile, "num_envs": n}
    agent = agents.get_agent(config.agent)(
        config.task, updates=updates, learning_starts=500, rounds=rounds, buffer_size=100_000, **options
    )

    # learn() takes whole iterations: one is exactly a measurement
    def run(steps: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            agent.learn(steps)

    run(500 + rounds * n)
    return run


def _theirs(config: Config, module: str, n: int, updates: int) -> Run:
    cls = getattr(importlib.import_module(module), config.agent.upper())
    vectors = importlib.import_module("stable_baselines3.common.env_util")
    relu = torch.nn.ReLU if module == "stable_baselines3" else importlib.import_module("jax").nn.relu
    model = cls(
        "MlpPolicy", vectors.make_vec_env(config.task, n, seed=0), batch_size=config.batch_size, buffer_size=100_000,
        learning_starts=500, train_freq=1, gradient_steps=updates, learning_rate=3e-4, gamma=0.99, seed=0,
        device="cpu" if module == "stable_baselines3" else "auto",
        policy_kwargs={"net_arch": list(config.hidden), "activation_fn": relu},
    )  # fmt: skip

    def run(steps: int) -> None:
        model.learn(steps, reset_num_timesteps=False)

    run(500 + 40 * n)
    return run


def floor(config: Config, updates: int) -> float:
    """Processor seconds of the matrix products of so many updates: three passes of the actor and the critics forward,
    and backward those gradients that are needed."""
    import gymnasium

    env: Any = gymnasium.make(config.task)
    obs, actions = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    outputs = 2 * actions if config.agent == "sac" else actions
    actor = _pairs([obs, *config.hidden, outputs])
    critic = _pairs([obs + actions, *config.hidden])  # the last layer, to one number, is a multiply and sum
    every = 1.0 if config.agent == "sac" else 0.5  # TD3's actor moves at every second gradient step
    products = 0.0
    for count, pairs in ((1, actor), (2, critic)):
        forward = sum(_seconds(config.batch_size, a, b) for a, b in pairs)
        weights = sum(_seconds(a, config.batch_size, b) for a, b in pairs)
        inputs = sum(_seconds(config.batch_size, b, a) for a, b in pairs[1:])
        first = _seconds(config.batch_size, pairs[0][1], pairs[0][0])
        if pairs is actor:  # targets; its own loss
            products += forward + every * (forward + weights + inputs)
        else:  # targets; its own loss; the actor's, through it to the action alone (of one critic in TD3)
            through = forward + inputs + first
            products += count * (forward + forward + weights + inputs)
            products += every * through * (count if config.agent == "sac" else 1)
    return products * updates


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(sizes))


def _seconds(rows: int, inner: int, columns: int, repeats: int = 20) -> float:
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)

    def multiply(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    multiply(1)
    return _clocks(multiply, repeats)[0] / repeats
