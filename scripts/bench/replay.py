"""How fast SAC and TD3 update from a replay memory: ``python scripts/bench replay``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from ccrl.learn.cycle import Means
from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import agents
from ccrl.testing.agent_contract import SpacesEnv

__all__ = ["Config", "main"]


@dataclass
class Config:
    """Gradient steps per CPU second, beside Stable-Baselines3 with the same networks, batch and memory.

    Both sides update from memories of random transitions, in turns; a ratio is the median of the rounds' ratios of
    processor time. Compilation is not measured; its time is stated. Also stated: what collecting a step costs besides
    the environment, and an update's cost by the memory's size.
    """

    agent: str = "sac"
    """The agent: sac or td3."""
    obs: int = 17
    """Observations have this many numbers."""
    actions: int = 6
    """Actions have this many numbers."""
    hidden: tuple[int, ...] = (256, 256)
    """These are the widths of the hidden layers."""
    batch_size: int = 256
    """A gradient step reads this many transitions."""
    updates: int = 100
    """A measurement takes this many gradient steps."""
    rounds: int = 5
    """Each side is measured this many times."""
    compile: str = "on"
    """Our updates are compiled (on) or not (off)."""
    sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Memory sizes of the second table."""
    threads: int = 1
    """PyTorch uses this many threads, on both sides."""


def main(config: Config) -> str:
    """Print and return the tables."""
    require("stable_baselines3", "sb3")
    torch.set_num_threads(config.threads)
    ours, compiled = _ours(config, 10_000)
    theirs = _sb3(config)
    rows = [(_cpu(ours, config.updates), _cpu(theirs, config.updates)) for _ in range(config.rounds)]
    rates = [config.updates / statistics.median(column) for column in zip(*rows)]
    ratio = statistics.median(b / a for a, b in rows)
    lines = [
        f"{config.agent} {config.obs}-{config.actions}, {config.hidden}, batch {config.batch_size}, {config.threads} "
        f"thread(s), compile {config.compile} ({compiled:.0f} s)",
        f"ours {rates[0]:.1f}, SB3 {rates[1]:.1f} updates per CPU second; ratio {ratio:.2f}",
        f"collecting a step besides the environment: {1e6 * _overhead(config):.0f} us",
    ]
    for size in config.sizes:
        update, _ = _ours(config, size)
        lines.append(f"memory of {size}: {1e3 * _cpu(update, config.updates) / config.updates:.2f} ms per update")
    text = "\n".join(lines)
    print(text, flush=True)
    return text


def _cpu(update: Callable[[int], None], updates: int) -> float:
    start = time.process_time()
    update(updates)
    return time.process_time() - start


def _spaces(config: Config) -> tuple[gym.spaces.Box, gym.spaces.Box]:
    return gym.spaces.Box(-np.inf, np.inf, (config.obs,)), gym.spaces.Box(-1.0, 1.0, (config.actions,))


def _agent(config: Config, size: int, **options: Any) -> Any:
    cls = agents.get_agent(config.agent)
    settings = {"hidden": config.hidden, "batch_size": config.batch_size, "compile": config.compile} | options
    return cls(SpacesEnv(*_spaces(config)), num_envs=2, buffer_size=size, **settings)


def _ours(config: Config, size: int) -> tuple[Callable[[int], None], float]:
    """A function that takes so many updates, and the seconds that its first steps took."""
    agent = _agent(config, size)
    learner, generator = agent.learner, torch.Generator().manual_seed(0)
    obs, following = (torch.randn(size, config.obs, generator=generator) for _ in range(2))
    never = torch.zeros(size, dtype=torch.bool)
    learner.ring.replace(
        {
            "obs": obs, "next_obs": following, "action": torch.randn(size, config.actions, generator=generator),
            "reward": torch.randn(size, generator=generator), "terminated": never, "truncated": never,
            "alive": torch.ones(size),
        }
    )  # fmt: skip
    learner.begin(0, 10**7)
    start = time.perf_counter()
    learner._train(learner.ring, 12, Means())
    return lambda updates: learner._train(learner.ring, updates, Means()), time.perf_counter() - start


def _overhead(config: Config) -> float:
    """Processor seconds per collected round of two environments that cost nothing, before learning starts."""
    agent = _agent(config, 10_000, learning_starts=10**6, compile="off")
    agent.learn(200)
    start = time.process_time()
    agent.learn(2_000)
    return (time.process_time() - start) / 1_000


def _sb3(config: Config) -> Callable[[int], None]:
    import stable_baselines3 as sb3
    from stable_baselines3.common.logger import configure

    class Env(gym.Env[Any, Any]):  # type: ignore[misc]
        observation_space, action_space = _spaces(config)

        def reset(self, **options: Any) -> Any:
            return np.zeros(config.obs, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(config.obs, np.float32), 0.0, False, False, {}

    model = getattr(sb3, config.agent.upper())(
        "MlpPolicy", Env(), batch_size=config.batch_size, buffer_size=10_000, device="cpu", learning_rate=3e-4,
        gamma=0.99, policy_kwargs={"net_arch": list(config.hidden)},
    )  # fmt: skip
    model.set_logger(configure(None, []))
    buffer, rng = model.replay_buffer, np.random.default_rng(0)
    for name in ("observations", "next_observations", "actions", "rewards"):
        array = getattr(buffer, name)
        array[:] = rng.normal(size=array.shape).clip(-1, 1)
    buffer.full = True
    model.train(gradient_steps=2, batch_size=config.batch_size)

    def update(updates: int) -> None:
        model.train(gradient_steps=updates, batch_size=config.batch_size)

    return update
