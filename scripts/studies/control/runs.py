"""One training of the comparison: ours or SB3's, on the same environments, evaluated at the same steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs
from agents.a2c import A2C, A2CConfig
from agents.bpo import BPO, BPOConfig
from agents.mdpo import MDPO, MDPOConfig
from agents.ppo import PPO, PPOConfig
from ccrl.adapters import as_vec_env
from ccrl.batched_env import BatchedEnv
from ccrl.experiment.evaluation import evaluate
from ccrl.experiment.run import describe
from scripts.benchmark_sb3 import model_arguments

__all__ = ["ARMS", "EPISODES", "Arm", "Curve", "play"]

EPISODES = 10
"""Of an evaluation, with the most probable actions."""

VERSIONS = ("torch", "gymnasium", "mujoco", "stable_baselines3")

Evaluate = Callable[[int, Callable[[Any, bool], Tensor]], None]
"""Called after every iteration with the clock and what acts."""


@dataclass(frozen=True)
class Arm:
    """One row of the comparison: a method and the setting that is tuned."""

    train: Callable[..., None]
    """``train(env, steps, seed, on_iteration, **settings)``."""
    setting: str
    """Name of the tuned setting."""
    values: tuple[float, ...]
    """Those tried, as many for every arm."""


class Curve:
    """Evaluations at multiples of ``every`` steps, and the time they took, which is not the training's."""

    def __init__(self, env: BatchedEnv, every: int, seed: int) -> None:
        self.env, self.every, self.seed = env, every, seed
        self.steps: list[int] = []
        self.returns: list[float] = []
        self.wall = self.cpu = 0.0

    def __call__(self, clock: int, act: Callable[[Any, bool], Tensor]) -> None:
        if clock // self.every <= (self.steps[-1] if self.steps else 0) // self.every:
            return
        wall, cpu = time.perf_counter(), time.process_time()
        self.returns.append(float(evaluate(act, self.env, EPISODES, self.seed).returns.mean()))
        self.steps.append(clock)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def ours(agent: Any, config: Any, **fixed: Any) -> Callable[..., None]:
    """An agent of this project, eager: the same arithmetic on every machine, with a compiler or without."""

    def train(env: BatchedEnv, steps: int, seed: int, on_iteration: Evaluate, **settings: Any) -> None:
        found = agent(env, config(num_envs=env.num_envs, compile="off", **fixed | settings), seed=seed)
        found.learn(steps, callback=lambda a: on_iteration(a.num_timesteps, a.act))

    return train


def sb3(package: str, name: str, **fixed: Any) -> Callable[..., None]:
    """A method of Stable-Baselines3 (``package`` its contributed half or itself) on our environments."""

    def train(env: BatchedEnv, steps: int, seed: int, on_iteration: Evaluate, **settings: Any) -> None:
        from stable_baselines3.common.callbacks import BaseCallback

        class AfterUpdate(BaseCallback):  # type: ignore[misc]
            # a rollout starts after the update on the one before
            def _on_rollout_start(self) -> None:
                on_iteration(int(self.model.num_timesteps), act)

            def _on_training_end(self) -> None:
                on_iteration(int(self.model.num_timesteps), act)

            def _on_step(self) -> bool:
                return True

        def act(obs: Any, deterministic: bool) -> Tensor:
            return torch.as_tensor(model.predict(obs.numpy(), deterministic=deterministic)[0])

        arguments, _ = model_arguments(NETWORK | fixed | settings)
        module = require(package, "sb3")
        model = getattr(module, name)("MlpPolicy", as_vec_env(env), seed=seed, device="cpu", **arguments)
        model.learn(steps, AfterUpdate(), log_interval=None)

    return train


NETWORK: dict[str, Any] = {"hidden": (64, 64), "activation": "tanh", "orthogonal": True, "log_std_init": 0.0}
ROLLOUT: dict[str, Any] = {"n_steps": 128, "gamma": 0.99, "gae_lambda": 0.95}
MINIBATCHES: dict[str, Any] = {"batch_size": 256, "n_epochs": 10}
NORMALISED = {"normalise_obs": True, "normalise_reward": True}
# Value clipping at .2 is in the units of normalised rewards: on raw ones the critic could not follow.
PLAIN_MDPO = {"normalise_obs": False, "normalise_reward": False, "clip_range_vf": None}
PPO_SETTINGS: dict[str, Any] = ROLLOUT | MINIBATCHES | {"clip_range": 0.2, "vf_coef": 0.5, "max_grad_norm": 0.5}
RATES = ("learning_rate", (1e-4, 3e-4, 1e-3, 3e-3))

ARMS: dict[str, Arm] = {
    "PPO": Arm(ours(PPO, PPOConfig, **NETWORK | PPO_SETTINGS), *RATES),
    "PPO, normalised": Arm(ours(PPO, PPOConfig, **NETWORK | PPO_SETTINGS | NORMALISED), *RATES),
    "MDPO": Arm(ours(MDPO, MDPOConfig, **NETWORK | ROLLOUT | PLAIN_MDPO), *RATES),
    "MDPO, normalised": Arm(ours(MDPO, MDPOConfig, **NETWORK | ROLLOUT | NORMALISED), *RATES),
    "BPO": Arm(ours(BPO, BPOConfig, **NETWORK | ROLLOUT | MINIBATCHES | {"median_hidden": (64, 64)}), *RATES),
    "A2C": Arm(
        ours(A2C, A2CConfig, **NETWORK | {"n_steps": 5, "gamma": 0.99, "gae_lambda": 1.0}),
        "learning_rate", (3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "TRPO, sb3-contrib": Arm(
        sb3("sb3_contrib", "TRPO", **ROLLOUT | {"batch_size": 256}),
        "target_kl", (0.001, 0.003, 0.01, 0.03),
    ),
    "PPO, SB3": Arm(sb3("stable_baselines3", "PPO", **PPO_SETTINGS | {"adam_eps": 1e-5}), *RATES),
}  # fmt: skip


def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The run of one cell: its evaluations and its time, of the training alone."""
    torch.set_num_threads(1)
    arm = ARMS[cell["arm"]]
    options: dict[str, Any] = {"nthread": 1} if cell["task"] in envs.MUJOCO else {}
    env, test_env = (envs.make(cell["task"], n, **options) for n in (cell["num_envs"], EPISODES))
    curve = Curve(test_env, cell["steps"] // cell["points"], cell["seed"])
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        arm.train(env, cell["steps"], cell["seed"], curve, **{arm.setting: cell["value"]})
        wall, cpu = time.perf_counter() - wall - curve.wall, time.process_time() - cpu - curve.cpu
    finally:
        env.close()
        test_env.close()
    about = describe()
    versions = about["versions"] | {"stable_baselines3": metadata.version("stable_baselines3")}
    return [{
        "wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2),
        "at": " ".join(str(step) for step in curve.steps), "returns": " ".join(f"{r:.5g}" for r in curve.returns),
        "threads": torch.get_num_threads(), "compile": "off", "commit": (about["git"] or {}).get("commit", "")[:12],
        **{name: (versions[name] or "").partition("+")[0] for name in VERSIONS},
    }]  # fmt: skip
