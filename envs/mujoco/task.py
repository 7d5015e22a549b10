"""What a MuJoCo environment is made of: one :class:`MujocoTask` per environment, written against the tensors of a
:class:`State`. A task knows nothing of the engine that steps it, so the same class runs wherever an engine can show
MjData's arrays as ``[N, ...]`` tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative, Range, Settings
from envs.mujoco.in_place import Arrays, Write

__all__ = ["Bound", "MujocoTask", "State", "check_shape", "model_path", "within"]

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


class State:
    """The ``N`` simulations a task looks at: MjData's arrays with a leading batch axis, as attributes.

    Always there: ``qpos [N, nq]``, ``qvel [N, nv]``, ``act [N, na]``, ``time [N]``, ``ctrl [N, nu]`` (the action as
    given, not clamped). Derived arrays (``xpos [N, nbody, 3]``, ``cfrc_ext [N, nbody, 6]``, ...) are there when the
    task's ``fields`` name them; as after ``mj_step`` they describe the state before the last substep, which is also
    what Gymnasium's environments see. ``body_mass [N, nbody]`` is there where models of different masses are played
    (``randomise``). ``before`` is what ``MujocoTask.remember`` returned before this step, and ``terminated [N]`` what
    ``MujocoTask.terminated`` returned after it; ``reward`` may read both.

    The tensors are live: a task reads them and never writes or keeps them.
    """

    qpos: Tensor
    qvel: Tensor
    act: Tensor
    time: Tensor
    ctrl: Tensor
    before: Tensor
    terminated: Tensor

    def __init__(self, **tensors: Tensor) -> None:
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):  # copy and pickle probe for these
            raise AttributeError(name)
        raise AttributeError(
            f"the state has {sorted(self.__dict__)}, not {name!r}: name derived MjData arrays in the task's `fields`"
        )

    def rows(self, rows: Tensor) -> State:
        """Copies of the given rows ``[n]`` int64, each field copied when it is first read."""
        return _Rows(self, rows)


class _Rows(State):
    def __init__(self, state: State, rows: Tensor) -> None:
        self.__dict__.update(_state=state, _rows=rows)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Tensor = getattr(self.__dict__["_state"], name).index_select(0, self.__dict__["_rows"])
        self.__dict__[name] = value
        return value


Bound = Annotated[float, Range(also=(math.inf, -math.inf))]
"""One end of a range that may be open."""


class MujocoTask(Settings):
    """One environment: its MJCF file, observation, reward, termination and reset.

    A subclass is a dataclass whose fields are the constructor options; it sets ``xml_file`` and ``frame_skip`` and
    writes ``observe`` and ``reward``, and where needed ``terminated``, ``reset`` and ``remember``. All methods work on
    ``[N, ...]`` tensors in the dtype and on the device the engine chose: float64 on the CPU with MuJoCo's own, float32
    on any device with mujoco-warp. They never wait for the device (no ``.item()``, no constants made in a step).
    """

    xml_file: str | Path
    """A ``Path``, or a string that starts with ``.``, ``/`` or ``~``, is a file; any other string names one of the
    MJCF files that ship with Gymnasium."""
    frame_skip: Count
    """Simulation steps per environment step."""
    reset_noise_scale: Nonnegative
    """Half width of the uniform noise the inherited ``reset`` adds to the initial positions and velocities."""

    fields: tuple[str, ...] = ()
    """Derived MjData arrays the methods read. Only these are copied out of the simulator. Naming ``cfrc_ext`` makes
    the engine run ``mj_rnePostConstraint`` after each step; it is zero after a reset, as in Gymnasium."""
    max_episode_steps: ClassVar[int] = 1000
    """The time limit that applies when the environment is built without one."""
    camera: ClassVar[dict[str, Any]] = {}
    """Attributes of the ``MjvCamera`` that films the task (distance, lookat, elevation, trackbodyid, ...)."""

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        """Read constants of the model once, before anything else is called. ``tensor`` turns an array into a float
        tensor of the engine's dtype and device. An override calls ``super().setup(model, tensor)`` first."""
        self.dt = model.opt.timestep * self.frame_skip
        self.init_qpos = tensor(model.qpos0)
        self.init_qvel = tensor(np.zeros(model.nv))

    def observe(self, state: State) -> Tensor:
        """The observation ``[N, k]``; after a step and, on the reset rows alone, after a reset."""
        raise NotImplementedError(f"{type(self).__name__} needs observe(state) -> Tensor [N, k]")

    def reward(self, state: State) -> Tensor:
        """The reward ``[N]`` of the step that led to ``state``, in its dtype."""
        raise NotImplementedError(f"{type(self).__name__} needs reward(state) -> Tensor [N]")

    def terminated(self, state: State) -> Tensor:
        """Where the task has ended, ``[N]`` bool; by default nowhere."""
        return torch.zeros(state.qpos.shape[0], dtype=torch.bool, device=state.qpos.device)

    def remember(self, state: State) -> Tensor | None:
        """What ``reward`` compares with its value before the step, ``[N, ...]``: it finds it in ``state.before``."""
        return None

    def in_place(self, state: State, out: Arrays) -> Write | None:
        """A faster form of ``observe``, ``terminated`` and ``reward`` for NumPy on the CPU: a function that writes into
        ``out`` what the three return for the live ``state``, to the last bit, with views and scratch arrays made here,
        once. None: there is none. Where a subclass replaces another method than ``reset``, it is not used; the subclass
        writes its own. ``envs/mujoco/in_place.py`` says which operations NumPy may do."""
        return None

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Initial ``qpos [n, nq]`` and ``qvel [n, nv]`` of ``n`` new episodes; by default the model's reference
        configuration at rest, with uniform noise of ``reset_noise_scale`` on both."""
        s = self.reset_noise_scale
        return (
            self.init_qpos + self.uniform(n, self.init_qpos, -s, s, generator),
            self.init_qvel + self.uniform(n, self.init_qvel, -s, s, generator),
        )

    # Drawn in float64 and cast: with one seed, engines of different precision begin at the same states up to rounding.

    @staticmethod
    def uniform(n: int, like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Uniform noise ``[n, *like.shape]`` with the dtype and device of ``like``."""
        noise = like.new_empty((n, *like.shape), dtype=torch.float64)
        return noise.uniform_(low, high, generator=generator).to(like.dtype)

    @staticmethod
    def normal(n: int, like: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        """Normal noise ``[n, *like.shape]`` of standard deviation ``scale``."""
        noise = like.new_empty((n, *like.shape), dtype=torch.float64)
        return noise.normal_(generator=generator).mul_(scale).to(like.dtype)


def check_shape(task: MujocoTask, call: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ``ValueError`` where a method of a task returned something else."""
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(
            f"{type(task).__name__}.{call}: expected shape {shape} and {dtype}, "
            f"received {tuple(value.shape)} and {value.dtype}"
        )


def within(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Elementwise ``low < x < high``; False where ``x`` is NaN."""
    low, high = bounds
    return (x > low) & (x < high)


def model_path(xml_file: str | Path) -> Path:
    """The MJCF file an ``xml_file`` option names (the rule of ``MujocoTask.xml_file``).

    Raises ``FileNotFoundError`` where there is none.
    """
    own = isinstance(xml_file, Path) or xml_file.startswith((".", "/", "~"))
    path = Path(xml_file).expanduser() if own else ASSETS / xml_file
    if path.is_file():
        return path
    if own:
        raise FileNotFoundError(f"xml_file={str(xml_file)!r}: no such file; expected an MJCF file at {path.absolute()}")
    known = ", ".join(sorted(p.name for p in ASSETS.glob("*.xml")))
    raise FileNotFoundError(
        f"xml_file={xml_file!r} is not one of Gymnasium's MJCF files ({known}); "
        f"write a file of your own as './{xml_file}' or as a pathlib.Path"
    )
