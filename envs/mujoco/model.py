"""Models from MJCF files, without messages about files that are not the user's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box

from envs.mujoco.task import ASSETS, model_path

__all__ = ["action_space", "load_model", "make_quietly"]

_TOTAL_MASS = re.compile(r'\ssettotalmass="([^"]*)"')


def load_model(xml_file: str | Path) -> mujoco.MjModel:
    """The compiled model of ``xml_file`` (see :func:`envs.mujoco.task.model_path`).

    Gymnasium's HalfCheetah asks for its total mass by a compiler attribute that MuJoCo 4 calls deprecated, on the
    screen and in a file ``MUJOCO_LOG.TXT`` of the working folder. The attribute is left out here and the mass set
    afterwards, as MuJoCo's message asks; the model is the same to the bit. A file of the user's own is loaded as it is.

    Raises:
        FileNotFoundError: no such file.
    """
    path = model_path(xml_file)
    text = path.read_text(encoding="utf-8") if path.parent == ASSETS else ""
    asked = _TOTAL_MASS.search(text)
    if asked is None:
        return mujoco.MjModel.from_xml_path(str(path))
    model = mujoco.MjModel.from_xml_string(_TOTAL_MASS.sub("", text))
    mujoco.mj_setTotalmass(model, float(asked.group(1)))
    mujoco.mj_setConst(model, mujoco.MjData(model))
    # two means that only the compiler computes; the solver's tolerance is relative to the second
    model.stat.meanmass = sum(model.body_mass[1:].tolist()) / (model.nbody - 1)
    model.stat.meaninertia = sum(model.dof_M0.tolist()) / model.nv
    return model


def action_space(model: mujoco.MjModel) -> Box:
    """The actuators' ranges, ``[nu]`` float32."""
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    return Box(low, high, dtype=np.float32)


def make_quietly(id: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """``gymnasium.make(id, **options)`` of a MuJoCo task, without that message."""
    with _without_deprecations():
        return gymnasium.make(id, **options)


@contextmanager
def _without_deprecations() -> Iterator[None]:
    before = mujoco.get_mju_user_warning()

    def handle(message: Any) -> None:
        text = message.decode() if isinstance(message, bytes) else str(message)
        if "settotalmass" not in text:
            print(f"WARNING: {text}") if before is None else before(message)

    mujoco.set_mju_user_warning(handle)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
