"""Whether a simulator works here: make a task, step it, and say what was seen.

python scripts/setup/check.py isaac:Isaac-Cartpole-Direct --num-envs 16 --steps 50
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("envs")

import envs
from ccrl.batched_env import AutoresetMode
from ccrl.data import tree_leaves

__all__ = ["CheckConfig", "main"]


@dataclass(frozen=True)
class CheckConfig:
    """What to check."""

    env: Annotated[str, tyro.conf.Positional]
    """This task is made."""
    num_envs: int = 16
    """It has this many copies."""
    steps: int = 50
    """They take this many random steps."""
    device: str = "cpu"
    """The simulator computes here."""
    engine: Literal["mujoco", "warp"] | None = None
    """Our MuJoCo tasks are simulated by this engine; unset, by MuJoCo's own."""


def main(config: CheckConfig) -> float:
    """Make, step, print. Returns milliseconds per step of all copies.

    :raises FloatingPointError: an observation or a reward is not finite.
    """
    torch.set_num_threads(1)
    begin = time.perf_counter()
    options: dict[str, Any] = {} if config.engine is None else {"engine": config.engine}
    env = envs.make(config.env, config.num_envs, device=config.device, **options)
    print(f"made in {time.perf_counter() - begin:.1f} s: {env.single_observation_space}, {env.single_action_space}")
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_envs, *(env.single_action_space.shape or ()))
    env.reset(seed=0)
    ends = torch.zeros((), dtype=torch.int64, device=env.device)
    finite = torch.ones((), dtype=torch.bool, device=env.device)
    env.step(torch.zeros(shape, device=env.device))  # the first one may compile
    begin = time.perf_counter()
    for _ in range(config.steps):
        result = env.step(0.3 * torch.randn(shape, generator=generator).to(env.device))
        done = result.terminated | result.truncated
        if env.autoreset_mode == AutoresetMode.DISABLED and bool(done.any()):
            env.reset(mask=done)
        ends += done.sum()
        for x in (*tree_leaves(result.obs), result.reward):
            finite &= x.isfinite().all()
    count = int(ends)  # waits for the device
    each = (time.perf_counter() - begin) / config.steps * 1e3
    env.close()
    if not bool(finite):
        raise FloatingPointError(f"{config.env}: expected finite observations and rewards, got others")
    print(f"{config.steps} steps of {config.num_envs} copies: {each:.1f} ms each, {count} episodes ended")
    return each


if __name__ == "__main__":
    try:
        main(tyro.cli(CheckConfig, description=__doc__))
    except (ValueError, ImportError, OSError, RuntimeError, FloatingPointError) as failure:
        sys.exit(f"error: {failure}")
