"""Robots of Isaac Lab 3.0 (``isaac:Isaac-Cartpole-Direct``) and mjlab 1.6 (``mjlab:Mjlab-Velocity-Flat-Unitree-G1``).

Both are installed in an environment of their own (``scripts/setup/``); nothing of them is imported before a task is
made. Isaac Lab holds one simulation per process: a second request for the same task shares it, with as many copies as
it has (``ccrl.adapters.lab.LabEnv.share``), any other is refused.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import gymnasium
import torch

from ccrl.adapters.lab import LabEnv, streams_kept
from ccrl.batched_env import AutoresetMode, as_autoreset_mode, check_device
from ccrl.packages import require
from ccrl.settings import Count, Positive, checked

__all__ = ["apply", "make_isaac", "make_lab", "make_mjlab", "resolve_task"]

ASSETS = "ISAACSIM_ASSET_ROOT"

_open: dict[str, Any] = {}
"""Isaac Lab's simulation in this process: what was asked for, and the environment."""


def make_lab(
    id: str, num_envs: int, device: torch.device | str, autoreset_mode: Any, options: dict[str, Any]
) -> LabEnv:
    """The environment of ``isaac:TASK`` or ``mjlab:TASK``.

    :raises ValueError: an unknown task, option or mode.
    :raises ImportError: the simulator is not installed.
    """
    family, _, task = id.partition(":")
    mode = AutoresetMode.SAME_STEP if family == "isaac" else AutoresetMode.DISABLED
    if autoreset_mode is not None and as_autoreset_mode(autoreset_mode, where=id) != mode:
        raise ValueError(f"{id} resets as {mode.value} alone, where it shows the true successor; got {autoreset_mode}")
    check_device(device)
    make = make_isaac if family == "isaac" else make_mjlab
    return make(task, num_envs, str(device), **options)


@checked
def make_isaac(
    task: str,
    num_envs: int,
    device: str = "cpu",
    clip_actions: Positive | None = None,
    random_ages: bool = True,
    video: str | None = None,
    video_length: Count = 200,
    cfg: dict[str, Any] | None = None,
) -> LabEnv:
    """A task of Isaac Lab on the Newton engine, without Kit.

    :param clip_actions: half width of a clip of the actions; None: none.
    :param random_ages: training begins in the middle of episodes.
    :param video: the simulator's own recorder films the scene into a file in this folder (the package moviepy below 2);
        None: no film.
    :param video_length: steps that it films, from the first on.
    :param cfg: entries of the task's configuration by dotted name, as in ``{"episode_length_s": 5.0}``; ``seed`` is 0
        where it is not among them.
    :raises RuntimeError: this process simulates another task already.
    :raises FileNotFoundError: an asset is not there; the message names the variable that says where assets are.
    """
    asked = {"task": task, "device": device, "clip_actions": clip_actions, "video": video, "cfg": cfg or {}}
    if _open:
        if {**asked, "task": task.removesuffix("-v0")} != _open["asked"]:
            raise RuntimeError(
                f"Isaac Lab holds one simulation per process, and this one has {_open['asked']}; got {asked}. Evaluate "
                "in a process of its own: python scripts/evaluate.py RUN"
            )
        shared: LabEnv = _open["env"].share()
        return shared
    app, parse = require("isaaclab.app", "isaac"), require("isaaclab_tasks.utils.parse_cfg", "isaac")
    require("isaaclab_tasks", "isaac")
    known = resolve_task(task, [id for id in gymnasium.registry if id.startswith("Isaac")])
    stack = ExitStack()

    def close() -> None:
        _open.clear()
        context = require("isaaclab.sim", "isaac").SimulationContext
        if context.instance() is not None:  # else the next simulation of this process is refused
            context.clear_instance()
        stack.close()

    with streams_kept(torch.device(device)):
        own = parse.parse_env_cfg(known, device=device, num_envs=num_envs)
        apply(own, {"seed": 0, "compute_final_obs": True} | (cfg or {}))
        if video is not None:
            recorder = require("isaaclab.envs.utils.video_recorder_cfg", "isaac").VideoRecorderCfg
            films = {"source": "visualizer:newton", "output_dir": video, "video_length": video_length}
            own.video_recorders = [recorder(**films)]
        show = {"headless": True, "visualizer": ["none" if video is None else "newton"]}
        try:
            stack.enter_context(app.launch_simulation(own, show))
            env = gymnasium.make(known, cfg=own)
        except FileNotFoundError as error:
            stack.close()
            raise FileNotFoundError(
                f"{known}: {error}. Assets are looked for in {ASSETS} = {os.environ.get(ASSETS)!r}; set it, before the "
                "start of Python, to a folder that has them (scripts/setup/isaac.sh makes one for Cartpole and Ant)"
            ) from error
        except BaseException:
            stack.close()
            raise
    try:
        made = LabEnv(env, clip_actions=clip_actions, random_ages=random_ages, on_close=close)
    except BaseException:
        env.close()
        close()
        raise
    _open.update(asked={**asked, "task": task.removesuffix("-v0")}, env=made)
    return made


@checked
def make_mjlab(
    task: str,
    num_envs: int,
    device: str = "cpu",
    clip_actions: Positive | None = None,
    random_ages: bool = True,
    video: str | None = None,
    video_length: Count = 200,
    cfg: dict[str, Any] | None = None,
) -> LabEnv:
    """A task of mjlab, reset when the collector asks for it. Options: see :func:`make_isaac`."""
    require("mjlab.tasks", "mjlab")  # registers the tasks
    lab, tasks = require("mjlab.envs", "mjlab"), require("mjlab.tasks.registry", "mjlab")
    known = resolve_task(task, tasks.list_tasks())
    with streams_kept(torch.device(device)):
        own = tasks.load_env_cfg(known)
        own.scene.num_envs = num_envs
        apply(own, {"seed": 0, "auto_reset": False} | (cfg or {}))
        env = lab.ManagerBasedRlEnv(own, device=device, render_mode=None if video is None else "rgb_array")
    if video is not None:
        record = require("mjlab.utils.wrappers", "mjlab").VideoRecorder
        env = record(env, video, lambda _: False, lambda step: step == 0, video_length, "clip", True)
    return LabEnv(env, clip_actions=clip_actions, random_ages=random_ages)


def resolve_task(task: str, known: Collection[str]) -> str:
    """``task`` as it is registered: releases differ in whether names end in ``-v0``.

    :raises ValueError: neither is there; the message has near ones.
    """
    for name in (task, f"{task}-v0", task.removesuffix("-v0")):
        if name in known:
            return name
    near = difflib.get_close_matches(task, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"
    raise ValueError(f"no task {task!r}; {hint}")


def apply(cfg: Any, values: dict[str, Any]) -> None:
    """Set entries of a nested configuration by dotted name.

    :raises ValueError: there is no such entry; the message has near ones.
    """
    for path, value in values.items():
        *parents, name = path.split(".")
        owner = cfg
        for parent in parents:
            owner = getattr(owner, parent, None)
        if owner is None or not hasattr(owner, name):
            near = difflib.get_close_matches(name, dir(owner), n=3)
            raise ValueError(f"cfg: expected entries of {type(cfg).__name__}, got {path!r}; near ones: {near}")
        setattr(owner, name, value)
