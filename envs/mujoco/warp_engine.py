"""mujoco-warp: ``N`` simulations of one model on any device that Warp knows, in float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco.batch import DATA_FIELDS
from torch import Tensor

from ccrl.packages import require
from envs.mujoco.variants import Variants

__all__ = ["WarpEngine"]

STATE_FIELDS = ("time", "qpos", "qvel", "act", "ctrl", "history", "plastic", "qacc_warmstart")
"""What the next step depends on: the rest of MuJoCo's integration state is written by nobody here."""
DROPPED = ("NEFC", "NJMAX_NNZ", "BROADPHASE", "NARROWPHASE", "CCD", "HFIELD", "NVMAX")
"""Marks of a world some of whose contacts or constraints had no room; others tell of solvers that ended early."""


class WarpEngine:
    """``num_envs`` worlds. Unlike MuJoCo's own engine it keeps nothing between calls: ``load`` the state, ``step`` or
    ``forward``, and ``read`` what became of it. None of them waits for the device.

    A step is one recorded graph: on a GPU a CUDA graph, launched on PyTorch's current stream. mujoco-warp has no PGS
    solver (Gymnasium's humanoids ask for it): Newton's method solves the same problem, to a smaller residual.

    :param fields: derived arrays of MjData that ``read`` shows beside the state.
    :param variants: models that worlds can be of (``load``); None: all are of ``model``.
    :param nconmax: room for so many contacts per world, on average; None takes mujoco-warp's guess.
    :param njmax: room for so many rows of constraints per world; None takes mujoco-warp's guess.
    :raises ImportError: mujoco-warp is not installed.
    :raises ValueError: fields that MjData or mujoco-warp does not have, or that it cannot vary between worlds.
    :raises NotImplementedError: the model has features that mujoco-warp does not simulate.
    """

    dtype = torch.float32

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        device: torch.device,
        fields: tuple[str, ...],
        variants: Variants | None = None,
        nconmax: int | None = None,
        njmax: int | None = None,
    ) -> None:
        self._warp = require("warp", "warp")
        # it would print what it finds and compiles
        self._warp.config.log_level = max(self._warp.config.log_level, self._warp.LOG_WARNING)
        self._warp.init()
        self._mjw = require("mujoco_warp", "warp")
        self.model, self.num_envs, self.device = model, num_envs, device
        start = mujoco.MjData(model)
        mujoco.mj_forward(model, start)
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            model = copy.copy(model)
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        with self._warp.ScopedDevice(self._warp.device_from_torch(device)):
            self._model = self._mjw.put_model(model)
            self._data = self._mjw.put_data(model, start, nworld=num_envs, nconmax=nconmax, njmax=njmax)
        self._model.opt.warn_overflow = 0  # ``dropped`` tells, without printing from the device
        unknown = [name for name in fields if name not in DATA_FIELDS or not hasattr(self._data, name)]
        if unknown:
            raise ValueError(f"fields: expected arrays of MjData that mujoco-warp has, received {unknown}")
        self._state = {name: self._view(name) for name in STATE_FIELDS if np.size(getattr(start, name))}
        self._fields = {name: self._view(name).view(num_envs, *getattr(start, name).shape) for name in fields}
        self._overflow = self._view("overflow")
        self._graphs: dict[int, Any] = {}
        # "qacc_warmstart": a reset begins the solver at zero
        self.rest = {name: x.clone() for name, x in self._state.items() if name != "qacc_warmstart"}
        self.rest["qacc_warmstart"] = torch.zeros_like(self._state["qacc_warmstart"])
        self._variants = [] if variants is None else self._vary(variants)

    def _view(self, name: str) -> Tensor:
        view: Tensor = self._warp.to_torch(getattr(self._data, name))
        return view

    def _vary(self, variants: Variants) -> list[tuple[Tensor, Tensor]]:
        """Give every world values of its own of the fields that differ; their tensors, and those of all variants."""
        pairs = []
        for name, values in variants.values.items():
            owner, _, field = name.rpartition(".")
            home = self._model.opt if owner else self._model
            array: Any = getattr(home, field, None)
            # all of its arrays have an axis of worlds, or have not
            plain = not isinstance(array, self._warp.array) or self._warp.to_torch(array).ndim != values.ndim
            if name in variants.changed and (plain or self._turns_on(name, values)):
                what = "has no values per world of" if plain else "reads once, for all worlds, whether there is any"
                raise ValueError(f"randomise: expected fields that mujoco-warp can vary; it {what} {name}")
            if plain:
                continue  # derived, and of no use to it
            all = torch.as_tensor(values, dtype=self.dtype, device=self.device)
            mine = all[:1].expand(self.num_envs, *all.shape[1:]).contiguous()
            setattr(home, field, self._warp.from_torch(mine, dtype=array.dtype))
            pairs.append((mine, all))
        return pairs

    def _turns_on(self, name: str, values: np.ndarray) -> bool:
        owner, _, field = name.rpartition(".")
        here = np.any(getattr(self.model.opt if owner else self.model, field))
        return bool((values.reshape(len(values), -1).any(1) != here).any())

    def load(self, state: Mapping[str, Tensor], variant: Tensor | None = None) -> None:
        """Put the worlds into a state: tensors ``[N, ...]`` by the names of ``rest``. ``variant`` ``[N]`` int64 says of
        which model each is."""
        for name, mine in self._state.items():
            mine.copy_(state[name])
        self._overflow.zero_()
        if variant is not None:
            for mine, all in self._variants:
                torch.index_select(all, 0, variant, out=mine)

    def step(self, nstep: int) -> None:
        """``nstep`` simulation steps; ``cfrc_ext`` is computed after the last, where it is among the fields."""
        self._launch(nstep)

    def forward(self) -> None:
        """Compute the derived fields where the worlds are, as ``mj_forward``."""
        self._launch(0)

    def _launch(self, nstep: int) -> None:
        """One recorded graph, for Python would take longer to launch the kernels one by one than they take to run."""
        warp, stream = self._warp, None
        if self.device.type == "cuda":
            stream = warp.stream_from_torch(torch.cuda.current_stream(self.device))
        if nstep not in self._graphs:
            kept = {name: x.clone() for name, x in self._state.items()}
            with warp.ScopedStream(stream):
                self._run(nstep)  # compiles and allocates, which cannot be recorded
            for name, x in kept.items():
                self._state[name].copy_(x)
            with warp.ScopedCapture(device=warp.device_from_torch(self.device)) as capture:
                self._run(nstep)
            self._graphs[nstep] = capture.graph
        warp.capture_launch(self._graphs[nstep], stream=stream)

    def _run(self, nstep: int) -> None:
        if nstep == 0:
            self._mjw.forward(self._model, self._data)
        for _ in range(nstep):
            self._mjw.step(self._model, self._data)
        if nstep and "cfrc_ext" in self._fields:
            self._mjw.rne_postconstraint(self._model, self._data)

    def read(self) -> dict[str, Tensor]:
        """Copies of the state and of the derived fields, ``[N, ...]``."""
        return {name: x.clone() for name, x in (self._state | self._fields).items()}

    def dropped(self) -> Tensor:
        """The share of worlds in which contacts or constraints of the last step had no room, a number on the device."""
        marks = sum(getattr(self._mjw.OverflowType, name) for name in DROPPED)
        return (self._overflow & int(marks)).ne(0).float().mean()
