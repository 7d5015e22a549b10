"""Has anything become slower: ``python scripts/bench guard``, by hand before a release.

Every row is a ratio to a baseline measured in turns with it in this run, so that it says the same on another machine:
Stable-Baselines3, Gymnasium, or plain code written out here. Processor time on one thread, and no compilation, whose
minutes would keep people from running it; ``bench train`` and ``bench replay`` measure compiled updates.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import torch

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers ids)
from agents import PPO
from agents.ppo import PPOConfig
from ccrl.batched_env import resolve_env
from ccrl.collect import Collector, Request
from ccrl.policies import MLPPolicy
from ccrl.returns import gae
from envs.mujoco import TASKS, MujocoEnv
from scripts.bench import env as env_bench
from scripts.bench import gae as gae_bench
from scripts.bench import offline as offline_bench
from scripts.bench import replay as replay_bench

__all__ = ["COMMITTED", "ROWS", "Config", "below", "main"]

COMMITTED = Path(__file__).with_name("guard.json")
Run = Callable[[], object]


@dataclass
class Config:
    """Ratios of processor time, baseline over ours, medians of rounds in which both are measured. The command fails
    where one is more than ``tolerance`` below the committed one."""

    rows: tuple[str, ...] = ()
    """These rows are measured; none: all."""
    rounds: int = 7
    """Each side of a row is measured so many times."""
    tolerance: float = 0.15
    """A ratio may fall by this share."""
    write: bool = False
    """The measured ratios are committed in place of the old ones (after a change that is meant to be)."""


def main(config: Config) -> None:
    """Measure, print a table, and exit with an error where a ratio fell.

    Raises ``ValueError`` for an unknown row.
    """
    if unknown := sorted(set(config.rows) - set(ROWS)):
        raise ValueError(f"rows: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    committed: dict[str, float] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    found: dict[str, float] = {}
    print("| row | ratio | rounds | committed |\n|---|---:|---|---:|")
    for name in config.rows or ROWS:
        ratios = _ratios(*ROWS[name](), config.rounds)
        found[name] = statistics.median(ratios)
        old = f"{committed[name]:.2f}" if name in committed else "-"
        print(f"| {name} | {found[name]:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {old} |", flush=True)
    if config.write:
        text = json.dumps(committed | {name: round(x, 2) for name, x in found.items()}, indent=1)
        COMMITTED.write_text(text + "\n")
        return
    if slower := below(found, committed, config.tolerance):
        sys.exit(f"slower than committed by more than {config.tolerance:.0%}: {', '.join(slower)}")


def below(found: Mapping[str, float], committed: Mapping[str, float], tolerance: float) -> list[str]:
    """Rows whose ratio fell by more than a share ``tolerance``."""
    # not "<": what is no number fell too
    return [name for name, ratio in found.items() if not ratio >= (1.0 - tolerance) * committed.get(name, 0.0)]


def _ratios(ours: Run, baseline: Run, rounds: int) -> list[float]:
    for run in (ours, baseline):
        run()
    ratios = []
    for k in range(rounds):
        first, second = (ours, baseline) if k % 2 == 0 else (baseline, ours)
        seconds = {first: _seconds(first)}
        seconds[second] = _seconds(second)
        ratios.append(seconds[baseline] / seconds[ours])
    return ratios


def _seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


# -- rows: ours and the baseline ---------------------------------------------------------------------------------------


def _ppo() -> tuple[Run, Run]:
    """An iteration of PPO, 16 x 128 steps, minibatches of 256, 4 epochs, beside SB3's."""
    sb3 = require("stable_baselines3", "sb3")
    vectors = require("stable_baselines3.common.env_util", "sb3")
    ppo = PPOConfig(num_envs=16, n_steps=128, batch_size=256, n_epochs=4, compile="off")
    agent = PPO("HalfCheetah-v5", ppo, env_kwargs={"nthread": 1})
    env = vectors.make_vec_env("HalfCheetah-v5", 16, seed=0)
    model = sb3.PPO("MlpPolicy", env, device="cpu", n_steps=128, batch_size=256, n_epochs=4)
    return lambda: agent.learn(2048), lambda: model.learn(2048, reset_num_timesteps=False)


def _collection() -> tuple[Run, Run]:
    """A rollout of 16 x 128 steps of HalfCheetah-v5 beside a plain loop of act, step and copies on the same engine."""
    env, other = (resolve_env("HalfCheetah-v5", 16, nthread=1) for _ in range(2))
    policy = MLPPolicy(env.single_observation_space, env.single_action_space)
    collector = Collector(env)
    rows = {"obs": torch.zeros(129, 16, 17), "action": torch.zeros(128, 16, 6), "mean": torch.zeros(128, 16, 6)}
    rows |= {"log_std": torch.zeros(128, 16, 6)}
    facts = {name: torch.zeros(128, 16) for name in ("reward", "terminated", "truncated")}
    other.reset(seed=0)

    @torch.no_grad()
    def plain() -> None:
        for t in range(128):
            out = policy.act(rows["obs"][t], policy.draw_noise(16, None, torch.device("cpu")))
            result = other.step(policy.to_env(out["action"]))
            for name in ("action", "mean", "log_std"):
                rows[name][t] = out[name]
            for name, column in facts.items():
                column[t] = getattr(result, name)
            rows["obs"][t + 1] = result.obs  # type: ignore[assignment]
        rows["obs"][0] = rows["obs"][128]

    return lambda: collector.collect(Request(steps=128), policy), plain


def _hopper() -> tuple[Run, Run]:
    """1,024 random steps of 64 Hoppers, falls and resets included, beside Gymnasium's SyncVectorEnv of 16."""
    ours = env_bench._ours(MujocoEnv(TASKS["Hopper-v5"](), 64, seed=0, nthread=1))
    theirs = env_bench._vector_env(gymnasium.make_vec("Hopper-v5", 16, "sync"))
    return lambda: ours(1024), lambda: theirs(1024)


def _cartpole() -> tuple[Run, Run]:
    """A rollout of 64 x 64 steps of CartPole-v1 beside SyncVectorEnv's steps alone."""
    env = resolve_env("CartPole-v1", 64)
    policy, collector = MLPPolicy(env.single_observation_space, env.single_action_space), Collector(env)
    theirs = gymnasium.make_vec("CartPole-v1", 64, "sync")
    theirs.reset(seed=0)
    actions = theirs.action_space.sample()
    return lambda: collector.collect(Request(steps=64), policy), lambda: [theirs.step(actions) for _ in range(64)]


def _gae() -> tuple[Run, Run]:
    """Advantages of 128 x 16 steps, 30 times, beside a plain row loop in torch."""
    rollout = gae_bench._rollout(128, 16)
    plain = lambda: [gae_bench.reference(*rollout) for _ in range(30)]  # noqa: E731
    return lambda: [gae(*rollout, gae_bench.LAM) for _ in range(30)], plain


def _replay(agent: str) -> Callable[[], tuple[Run, Run]]:
    def row() -> tuple[Run, Run]:
        wide = {"hidden": (256, 256), "batch_size": 256} if agent == "sac" else {"hidden": (64, 64), "batch_size": 100}
        sizes = {} if agent == "sac" else {"obs": 3, "actions": 1}
        config = replay_bench.Config(agent=agent, compile="off", **wide, **sizes)  # type: ignore[arg-type]
        ours, theirs = replay_bench._ours(config, 10_000)[0], replay_bench._sb3(config)
        return lambda: ours(20), lambda: theirs(20)

    return row


def _offline() -> tuple[Run, Run]:
    """60 gradient steps of IQL, eager, beside plain PyTorch with fused Adam."""
    config = offline_bench.Config(hidden=(64, 64), rows=10_000)
    data = offline_bench._data(config.rows)
    ours, plain = offline_bench._ours("iql", data, config, "off"), offline_bench._PLAIN["iql"](data, config)
    return lambda: ours(60), lambda: plain(60)


ROWS: dict[str, Callable[[], tuple[Run, Run]]] = {
    "ppo": _ppo,
    "collection": _collection,
    "hopper": _hopper,
    "cartpole": _cartpole,
    "gae": _gae,
    "sac": _replay("sac"),
    "td3": _replay("td3"),
    "iql": _offline,
}
"""Name -> what makes ours and the baseline."""
