"""The CPU engine: ``N`` simulations of one model on MuJoCo's own thread pool, shown to the tasks as live tensors."""

from __future__ import annotations

import os
from typing import Any

import mujoco
import torch
from mujoco.batch import DATA_FIELDS, Batch
from torch import Tensor

from envs.mujoco.task import State
from envs.mujoco.variants import Variants

__all__ = ["BatchEngine", "available_cores"]

STATE_FIELDS = ("qpos", "qvel", "act", "time", "ctrl")
POOL_FROM = 8
BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADCTRL) + 1)


def available_cores() -> int:
    """The cores this process may use; a container or ``taskset`` can leave it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BatchEngine:
    """``num_envs`` float64 simulations on ``mujoco.batch.Batch``. The results do not depend on ``nthread``.

    ``state`` shows them: ``qpos, qvel, act, time, ctrl`` are views of the simulator's memory; the derived ``fields``
    are refreshed by ``step`` and ``reset`` for the rows these are called on.

    With ``variants`` each simulation is of one of these (``play``), else of ``model``.

    Raises ``ValueError`` for a field MjData does not have.
    """

    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        nthread: int,
        fields: tuple[str, ...],
        variants: Variants | None = None,
    ) -> None:
        unknown = sorted(set(fields) - DATA_FIELDS)
        if unknown:
            raise ValueError(f"fields: expected names of MjData arrays ({sorted(DATA_FIELDS)}), received {unknown}")
        self.model = model
        contact_forces = "cfrc_ext" in fields
        # mj_rnePostConstraint reads the contacts, and only a persistent batch still has those after a step.
        self._batch = Batch(model, num_envs, min(nthread, num_envs), persistent=contact_forces)
        self._scratch = mujoco.MjData(model)
        tensors = {name: self._view(name) for name in dict.fromkeys((*STATE_FIELDS, *fields)) if name != "cfrc_ext"}
        if contact_forces:
            tensors["cfrc_ext"] = torch.zeros(num_envs, model.nbody, 6, dtype=self.dtype)
            self._ncon, self._xfrc_applied = self._view("ncon").view(num_envs), self._view("xfrc_applied")
        self._cfrc_ext = tensors.get("cfrc_ext")
        self.state = State(**tensors)
        self._rows = torch.from_numpy(self._batch.state)
        self._initial_row = self._rows[:1].clone()
        self._warnings = torch.from_numpy(self._batch.warning)
        self._bad_state = self._warnings[:, BAD_STATE, 1]
        self._calm = self._batch.warning.tobytes()
        self._variants = variants
        values = {} if variants is None else variants.values
        self._models = [(torch.from_numpy(self._batch.expand(k)), torch.from_numpy(x)) for k, x in values.items()]
        self.state.__dict__ |= {k: mine for k, (mine, _) in zip(values, self._models) if k == "body_mass"}
        self._variant = torch.zeros(num_envs, dtype=torch.int64)
        self.play(torch.arange(num_envs), torch.zeros(num_envs, dtype=torch.int64))

    def _view(self, name: str) -> Tensor:
        array = self._batch.bind(name).view()
        array.flags.writeable = True  # torch knows no read-only tensors and would warn; tasks do not write
        return torch.from_numpy(array)

    def play(self, rows: Tensor, variant: Tensor) -> None:
        """From now on the simulations in ``rows`` ``[n]`` are of these variants of the model ``[n]``, both int64."""
        self._variant[rows] = variant
        for mine, all in self._models:
            mine[rows] = all[variant]

    def step(self, nstep: int, rows: Tensor | None = None) -> None:
        """Advance all simulations, or those in ``rows`` ``[n]`` int64, by ``nstep`` calls of ``mj_step``."""
        ids = None if rows is None else rows.numpy()
        self._batch.step(ids, nstep)
        if self._cfrc_ext is not None:
            self._compute_cfrc_ext(self._cfrc_ext, rows)

    def _compute_cfrc_ext(self, into: Tensor, rows: Tensor | None) -> None:
        # After the step and not through a force sensor: with RK4 the sensor's value is of another integrator stage.
        loaded = self._ncon > 0
        if self.model.neq or self.model.nflex or self._xfrc_applied.any():
            loaded.fill_(True)
        # What no contact, constraint or applied force acts on has zero external force, and most of the cost is the
        # copy of the simulator's memory.
        loaded = loaded.nonzero().squeeze(1) if rows is None else rows[loaded[rows]]
        into.zero_() if rows is None else into.index_fill_(0, rows, 0.0)
        get_data, model, scratch = self._batch.get_data, self.model, self._scratch
        out, cfrc_ext = into.numpy(), scratch.cfrc_ext
        # Serial: two Python threads took as long as one. Of variants the forces are in the data, with their contacts.
        for i in loaded.tolist():
            get_data(i, scratch)
            mujoco.mj_rnePostConstraint(model, scratch)
            out[i] = cfrc_ext

    def reset(self, rows: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Reset the simulations in ``rows`` ``[n]`` int64 to the model's defaults, put them at ``qpos [n, nq]`` and
        ``qvel [n, nv]`` and compute the derived fields there, as ``mj_resetData`` and ``mj_forward`` do."""
        self._rows.index_copy_(0, rows, self._initial_row.expand(len(rows), -1))
        self.state.qpos.index_copy_(0, rows, qpos.to(self.dtype))
        self.state.qvel.index_copy_(0, rows, qvel.to(self.dtype))
        self._bad_state.index_fill_(0, rows, 0)
        # A call on one simulation runs in this thread; waking the pool costs as much as several of these.
        ids = rows.numpy()
        for part in [ids[i : i + 1] for i in range(len(ids))] if len(ids) < POOL_FROM else [ids]:
            self._batch.forward(part)
        if self._cfrc_ext is not None:
            self._cfrc_ext.index_fill_(0, rows, 0.0)

    def unstable(self) -> Tensor | None:
        """Where MuJoCo has met NaN, infinite or huge numbers in qpos, qvel, qacc or ctrl since the last call, ``[N]``
        bool, or None where it had nothing to warn of. It resets such a simulation by itself and goes on, so neither
        observation nor reward would show it."""
        # asked after every step: comparing bytes takes 0.1 us for 16 simulations, any() on the tensor 9
        if self._batch.warning.tobytes() == self._calm:
            return None
        bad = self._bad_state.ne(0).any(1)
        self._warnings.zero_()
        return bad

    def data(self, index: int) -> mujoco.MjData:
        """A copy of one simulation with its derived fields computed, to render or to inspect."""
        model = self.model if self._variants is None else self._variants.models[int(self._variant[index])]
        data = self._batch.get_data(index, mujoco.MjData(model))
        mujoco.mj_forward(model, data)
        return data

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on: MuJoCo's full integration state ``[N, nstate]`` float64."""
        variant = {} if self._variants is None else {"variant": self._variant.clone()}
        return {"integration_state": self._rows.clone(), **variant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s result. Derived fields stay as they are until the next step."""
        self._rows.copy_(state["integration_state"])
        if self._variants is not None:
            self.play(torch.arange(len(self._rows)), state["variant"])
