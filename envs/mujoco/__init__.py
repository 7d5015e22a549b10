"""Batched MuJoCo environments: ``make_mujoco(id, num_envs, **options)``."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, cast

from envs.mujoco.env import MujocoEnv
from envs.mujoco.render import RenderOptions
from envs.mujoco.task import MujocoTask, State
from envs.mujoco.tasks.ant import Ant
from envs.mujoco.tasks.arms import Pusher, Reacher
from envs.mujoco.tasks.humanoid import Humanoid, HumanoidStandup
from envs.mujoco.tasks.pendulum import InvertedDoublePendulum, InvertedPendulum
from envs.mujoco.tasks.runners import HalfCheetah, Hopper, Swimmer, Walker2d

__all__ = ["TASKS", "MujocoEnv", "MujocoTask", "RenderOptions", "State", "make_mujoco"]

TASKS: dict[str, type[MujocoTask]] = {
    "Ant-v5": Ant,
    "HalfCheetah-v5": HalfCheetah,
    "Hopper-v5": Hopper,
    "Humanoid-v5": Humanoid,
    "HumanoidStandup-v5": HumanoidStandup,
    "InvertedDoublePendulum-v5": InvertedDoublePendulum,
    "InvertedPendulum-v5": InvertedPendulum,
    "Pusher-v5": Pusher,
    "Reacher-v5": Reacher,
    "Swimmer-v5": Swimmer,
    "Walker2d-v5": Walker2d,
}


def make_mujoco(id: str, num_envs: int, **options: Any) -> MujocoEnv:
    """``num_envs`` copies of a task by its Gymnasium id.

    ``options`` are those of the task (the fields of its class, Gymnasium's names), of ``MujocoEnv`` (seed, nthread,
    autoreset_mode, max_episode_steps, dtype, unstable) and of ``RenderOptions`` (width, height, camera_name, ...).

    Raises ``ValueError`` for an unknown id and ``TypeError`` for an unknown option.
    """
    if id not in TASKS:
        raise ValueError(f"id: expected one of {', '.join(TASKS)}, received {id!r}")
    known = {
        "task": [f.name for f in fields(cast(Any, TASKS[id]))],
        "env": [n for n, p in inspect.signature(MujocoEnv).parameters.items() if p.kind is p.KEYWORD_ONLY],
        "render": [f.name for f in fields(RenderOptions)],
    }
    unknown = [name for name in options if not any(name in names for names in known.values())]
    if unknown:
        expected = ", ".join(sorted(set(known["task"] + known["env"] + known["render"])))
        raise TypeError(f"{id}: expected options among {expected}; received {', '.join(unknown)}")
    task, env, render = ({n: options[n] for n in names if n in options} for names in known.values())
    if render:
        env.setdefault("render", RenderOptions(**render))
    return MujocoEnv(TASKS[id](**task), num_envs, **env)
