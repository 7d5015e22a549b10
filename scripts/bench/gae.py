"""How fast advantages are computed: ``python scripts/bench gae``."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ccrl.packages import require
from ccrl.returns import gae

__all__ = ["Config", "main", "reference", "sb3_loop"]

GAMMA, LAM = 0.99, 0.95
BYTES = 6 * 4
"""Per step, in float32: reward, value, next value, discount and carry are read, the advantage is written."""


Rollout = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Reward, value, next value, discount, carry, ``[T, N]`` each."""


@dataclass
class Config:
    """Generalised advantage estimation on ``T x N`` rollouts, beside

    * a copy of the same bytes: what memory allows;
    * Stable-Baselines3's loop, when it is installed;
    * a plain row loop in torch;
    * the same on the GPU, when there is one.

    The measurements alternate; times are medians of the rounds and ratios medians of the rounds' ratios. One thread.
    """

    shapes: tuple[tuple[int, int], ...] = ((2048, 1), (128, 16), (24, 4096), (64, 8192))
    """Pairs of steps and environments."""
    rounds: int = 15
    """Measurements of each kind."""
    seconds: float = 0.02
    """Length of one measurement (at least one call)."""


def main(config: Config) -> None:
    """Measure and print Markdown tables."""
    torch.set_num_threads(1)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"load {os.getloadavg()[0]:.1f} at the start"
        print(f"{device} ({name}), torch {torch.__version__}, {config.rounds} rounds\n")
        columns = "gae, us | GB/s | copy of the same bytes, us | of copy | SB3's loop, us | times faster | row loop, us"
        print(f"| T x N | {columns} | times faster |\n|---|{'---:|' * 8}")
        for steps, envs in config.shapes:
            print(_row(config, steps, envs, device), flush=True)
        print()


def reference(reward: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, carry: Tensor) -> Tensor:
    """``A_t = delta_t + gamma lambda A_{t+1}``, row by row. All ``[T, N]``."""
    advantage, last = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(reward.shape[0])):
        delta = reward[t] + discount[t] * next_value[t] - value[t]
        last = delta + discount[t] * carry[t] * LAM * last
        advantage[t] = last
    return advantage


def sb3_loop(reward: Tensor, value: Tensor, next_value: Tensor, carry: Tensor) -> tuple[Callable[[], None], np.ndarray]:
    """SB3's ``compute_returns_and_advantage`` on the same rollout, and the array ``[T, N]`` that it fills."""
    buffers = require("stable_baselines3.common.buffers", "sb3")
    steps, envs = reward.shape
    space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    buffer = buffers.RolloutBuffer(steps, space, space, "cpu", LAM, GAMMA, n_envs=envs)
    buffer.rewards[:], buffer.values[:] = reward.numpy(), value.numpy()
    buffer.episode_starts[1:] = 1.0 - carry[:-1].numpy()
    last, dones = next_value[-1].clone(), 1.0 - carry[-1].numpy()
    return lambda: buffer.compute_returns_and_advantage(last, dones), buffer.advantages


def _rollout(steps: int, envs: int) -> Rollout:
    """Episodes that terminate: SB3's buffer knows no other ends."""
    draw = torch.Generator().manual_seed(0)
    reward, value = (torch.randn(steps, envs, generator=draw) for _ in range(2))
    alive = (torch.rand(steps, envs, generator=draw) > 0.01).float()
    next_value = torch.cat([value[1:], torch.randn(1, envs, generator=draw)])
    return reward, value, next_value, GAMMA * alive, alive


def _row(config: Config, steps: int, envs: int, device: str) -> str:
    rollout = _rollout(steps, envs)
    reward, value, next_value, factor, carry = (x.to(device) for x in rollout)
    here = reward, value, next_value, factor, carry
    source = torch.zeros(BYTES * steps * envs // 8, device=device)  # a copy reads half of its bytes and writes half
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {
        "gae": lambda: gae(*here, LAM), "copy": lambda: target.copy_(source), "rows": lambda: reference(*here)
    }  # fmt: skip
    advantage = gae(*here, LAM).cpu()
    checks = [reference(*rollout)]
    try:
        run, filled = sb3_loop(*rollout[:3], rollout[4])
        run()
        checks.append(torch.from_numpy(filled))
        calls["sb3"] = run
    except ImportError as error:
        print(f"without SB3: {error}", file=sys.stderr)
    for other in checks:
        torch.testing.assert_close(advantage, other, rtol=1e-3, atol=1e-3)
    counts = {name: max(1, round(config.seconds / _time(call, 1, device))) for name, call in calls.items()}
    rounds = [{name: _time(call, counts[name], device) for name, call in calls.items()} for _ in range(config.rounds)]

    def us(name: str) -> str:
        return f"{statistics.median(r[name] for r in rounds) * 1e6:,.1f}" if name in calls else "not installed"

    def ratio(name: str, other: str) -> str:
        return f"{statistics.median(r[name] / r[other] for r in rounds):,.2f}" if name in calls else ""

    speed = BYTES * steps * envs / statistics.median(r["gae"] for r in rounds) / 1e9
    cells = [f"{steps} x {envs}", us("gae"), f"{speed:.2f}", us("copy"), ratio("copy", "gae"), us("sb3"),
             ratio("sb3", "gae"), us("rows"), ratio("rows", "gae")]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _time(call: Callable[[], object], count: int, device: str) -> float:
    """Seconds per call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count
