"""Batched MuJoCo environments: ``make_mujoco(task, num_envs, **options)``."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from envs.mujoco.env import MujocoEnv
from envs.mujoco.render import RenderOptions
from envs.mujoco.task import MujocoTask, State
from envs.mujoco.tasks.ant import Ant
from envs.mujoco.tasks.arms import Pusher, Reacher
from envs.mujoco.tasks.humanoid import Humanoid, HumanoidStandup
from envs.mujoco.tasks.pendulum import InvertedDoublePendulum, InvertedPendulum
from envs.mujoco.tasks.runners import HalfCheetah, Hopper, Swimmer, Walker2d

if TYPE_CHECKING:
    from envs.mujoco.warp import WarpEnv

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


def make_mujoco(
    id: str | type[MujocoTask],
    num_envs: int,
    *,
    engine: Literal["mujoco", "warp"] = "mujoco",
    device: torch.device | str = "cpu",
    **options: Any,
) -> MujocoEnv | WarpEnv:
    """``num_envs`` copies of a task: one of Gymnasium's by its id, or a class of your own.

    ``engine`` is MuJoCo's own, on CPU threads in float64 (:class:`MujocoEnv`), or mujoco-warp, in float32 on ``device``
    (:class:`envs.mujoco.warp.WarpEnv`). ``options`` are those of the task (the fields of its class, Gymnasium's names),
    of the engine's environment (seed, autoreset_mode, max_episode_steps, unstable, randomise; nthread, dtype or
    nconmax, njmax) and of ``RenderOptions`` (width, height, camera_name, ...).

    Raises ``ValueError`` for an unknown id, engine or device, ``TypeError`` for an unknown option and ``ImportError``
    where mujoco-warp is not installed.
    """
    if isinstance(id, str) and id not in TASKS:
        raise ValueError(f"id: expected one of {', '.join(TASKS)}, received {id!r}")
    cls = TASKS[id] if isinstance(id, str) else id
    if engine == "warp":
        from envs.mujoco.warp import WarpEnv  # late: it is the only module that mujoco-warp is for

        made: type[MujocoEnv | WarpEnv] = WarpEnv
    elif engine == "mujoco":
        made = MujocoEnv
    else:
        raise ValueError(f"engine: expected 'mujoco' or 'warp', received {engine!r}")
    known = {
        "task": [f.name for f in fields(cast(Any, cls))],
        "env": [n for n, p in inspect.signature(made).parameters.items() if p.kind is p.KEYWORD_ONLY],
        "render": [f.name for f in fields(RenderOptions)],
    }
    unknown = [name for name in options if not any(name in names for names in known.values())]
    if unknown:
        expected = ", ".join(sorted(set(known["task"] + known["env"] + known["render"])))
        where = id if isinstance(id, str) else id.__name__
        raise TypeError(
            f"{where}: expected options among {expected}; received {', '.join(unknown)} for engine={engine!r}"
        )
    of_task, of_env, render = ({n: options[n] for n in names if n in options} for names in known.values())
    if render:
        of_env.setdefault("render", RenderOptions(**render))
    return made(cls(**of_task), num_envs, device=device, **of_env)
