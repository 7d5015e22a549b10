"""Our PPO beside rsl_rl's on one task of Isaac Lab, with rsl_rl's settings: what both reach, and in which time.

    python scripts/bench robots --num-envs 64 --iterations 40 --out results/robots

In the simulator's own environment (docs/robots.md). One simulation per process, so every run is a process of its own;
runs alternate, and the same command goes on where it stopped. Both are counted at the same place, in the simulator's
step: undiscounted returns of the last 100 episodes, wall and CPU time of the training alone (the latter is what counts
where others use the machine too), and the simulator's share of the CPU time.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs
from agents import tuned
from agents.ppo import PPO, PPOConfig
from ccrl.experiment import config as configs
from ccrl.settings import Count, Natural, Settings
from ccrl.stats import iqm

__all__ = ["Config", "Tally", "main"]

COLUMNS = ("env", "who", "seed", "iterations", "return", "seconds", "cpu", "simulator")


@dataclass(frozen=True)
class Config(Settings):
    """The issue's sizes: 64 copies, 16 steps, 40 iterations."""

    env: str = "isaac:Isaac-Cartpole-Direct"
    """This task is trained on; its rsl_rl settings are ours in agents/settings/ppo."""
    num_envs: Count = 64
    """It has this many copies."""
    iterations: Count = 40
    """Both train for so many rollouts and updates."""
    seeds: tuple[Natural, ...] = (0, 1, 2, 3, 4)
    """Both are trained with these seeds."""
    out: Path = Path("results/robots")
    """The rows go into robots.csv in this folder."""
    only: Literal["ccrl", "rsl_rl"] | None = None
    """One run of this is made in this process, with the first seed; unset, all of both, in processes of their own."""
    device: str = "cpu"
    """Simulator and networks compute here."""


class Tally:
    """Counts what a batched simulator's ``step`` returns; put in the place of it.

    :param env: ``step`` gives observations, reward ``[N]``, terminated and truncated ``[N]``, and the rest.
    """

    def __init__(self, env: Any) -> None:
        self._step, self.seconds = env.step, 0.0
        self.returns: deque[float] = deque(maxlen=100)
        self._return = torch.zeros(env.num_envs, device=env.device)
        env.step = self

    def __call__(self, action: Any) -> Any:
        begin = time.process_time()
        result = self._step(action)
        self.seconds += time.process_time() - begin
        self._return += result[1]
        over = result[2] | result[3]
        self.returns.extend(self._return[over].tolist())
        self._return[over] = 0.0
        return result


def main(config: Config) -> list[dict[str, Any]]:
    """All runs that are not there yet, then what was reached; or the one run of ``only``."""
    if config.only is not None:
        return [_run(config)]
    path = config.out / "robots.csv"
    for seed in config.seeds:
        for who in ("ccrl", "rsl_rl") if seed % 2 == 0 else ("rsl_rl", "ccrl"):
            if any(row["who"] == who and int(row["seed"]) == seed for row in _rows(path, config)):
                continue
            command = [sys.executable, str(Path(__file__).parent), "robots", "--only", who, "--seeds", str(seed)]
            for name in ("env", "num_envs", "iterations", "out", "device"):
                command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
            subprocess.run(command, check=True)
    rows = _rows(path, config)
    for who in ("ccrl", "rsl_rl"):
        mine = [{name: float(row[name]) for name in COLUMNS[4:]} for row in rows if row["who"] == who]
        score, seconds, cpu, share = (np.array([row[name] for row in mine]) for name in COLUMNS[4:])
        print(
            f"[bench] {who}: return {float(iqm(score)):.2f} (IQM of {len(mine)}; {score.min():.2f} to "
            f"{score.max():.2f}), {np.median(seconds):.1f} s, of the CPU {np.median(cpu):.1f} s, of which "
            f"{np.median(share):.1f} s in the simulator"
        )
    return rows


def _rows(path: Path, config: Config) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["env"] == config.env and int(row["iterations"]) == config.iterations]


def _run(config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    who, seed = config.only, config.seeds[0]
    options = {"seed": seed, "compute_final_obs": who == "ccrl"}  # rsl_rl does not read them
    lab = envs.make(config.env, config.num_envs, device=config.device, cfg=options)
    own: Any = lab.unwrapped  # type: ignore[attr-defined]
    tally = Tally(own)
    train = _ours(config, lab, seed) if who == "ccrl" else _theirs(config, own, seed)
    begin, cpu = time.perf_counter(), time.process_time()
    train()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    row = {
        "env": config.env, "who": who, "seed": seed, "iterations": config.iterations,
        "return": round(float(np.mean(tally.returns)), 4), "seconds": round(seconds, 2),
        "cpu": round(cpu, 2), "simulator": round(tally.seconds, 2),
    }  # fmt: skip
    path = config.out / "robots.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(f"[bench] {row}", flush=True)
    return row


def _ours(config: Config, lab: Any, seed: int) -> Any:
    settings = configs.load_yaml(tuned.find("ppo", config.env))["agent"]
    agent = PPO(lab, configs.from_dict(PPOConfig, settings | {"num_envs": config.num_envs}), seed=seed)
    return lambda: agent.learn(config.iterations * agent.config.num_envs * agent.config.n_steps)


def _theirs(config: Config, own: Any, seed: int) -> Any:
    parse, wrap = require("isaaclab_tasks.utils.parse_cfg", "isaac"), require("isaaclab_rl.rsl_rl", "isaac")
    runners, version = require("rsl_rl.runners", "isaac"), require("importlib.metadata", "isaac").version
    task = config.env.partition(":")[2]
    cfg = parse.load_cfg_from_registry(task, "rsl_rl_cfg_entry_point")
    cfg = wrap.handle_deprecated_rsl_rl_cfg(cfg, version("rsl-rl-lib"))
    env = wrap.RslRlVecEnvWrapper(own, clip_actions=cfg.clip_actions)
    torch.manual_seed(seed)
    runner = runners.OnPolicyRunner(env, {**cfg.to_dict(), "device": config.device}, log_dir=None, device=config.device)
    return lambda: runner.learn(config.iterations, init_at_random_ep_len=True)
