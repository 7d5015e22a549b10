"""``WarpEnv``: many copies of a :class:`MujocoTask` on mujoco-warp, on any device, without waiting for it in a step."""

from __future__ import annotations

from typing import Any, Literal

import mujoco
import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, StepRows, Tree
from ccrl.seeding import stream_seed
from ccrl.settings import Count, Natural, checked
from ccrl.torch_env import TorchEnv
from envs.mujoco.model import action_space, load_model
from envs.mujoco.render import Renderer, RenderOptions
from envs.mujoco.task import MujocoTask, State, check_shape
from envs.mujoco.variants import Randomise, asked_variants
from envs.mujoco.warp_engine import WarpEngine

__all__ = ["WarpEnv"]

LARGEST = 1e10
"""MuJoCo's mjMAXVAL: a state beyond is taken for an explosion."""


class WarpEnv(TorchEnv):
    """``num_envs`` copies of ``task``, physics in float32.

    All of a copy's state is in the tensors of :class:`ccrl.torch_env.TorchEnv`; the engine is loaded with it in every
    step. Where derived arrays are observed (``task.fields``), every step also computes them for the initial states of
    all copies, since the host does not know which of them will be needed.

    :param task: the environment; its options are the fields of its class.
    :param device: where it is simulated. On the CPU it serves tests: MuJoCo's own engine is many times faster there.
    :param seed: of the stream that resets draw from; None takes one from the operating system.
    :param max_episode_steps: the time limit; None takes the task's.
    :param unstable: what a copy gets whose state is not finite or huge. It is put back to the model's defaults, as
        MuJoCo does; ``"nan"`` makes that step's reward NaN, which the collector reports.
    :param nconmax: room for so many contacts per copy, on average; None takes mujoco-warp's guess.
    :param njmax: room for so many rows of constraints per copy. What has no room is left out of the physics: the log
        says in which share of the copies, as ``simulator/dropped``.
    :param randomise: as ``models`` and ``models_seed``, see :class:`envs.mujoco.env.MujocoEnv`.
    :param render: size and camera of ``render``.
    :raises ValueError: options out of range, and a task whose methods return other shapes than they should.
    :raises ImportError: mujoco-warp is not installed.
    :raises FileNotFoundError: a missing MJCF file.
    """

    engine_class: type[Any] = WarpEngine

    @checked
    def __init__(
        self,
        task: MujocoTask,
        num_envs: Count,
        *,
        device: torch.device | str = "cpu",
        seed: Natural | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: Count | None = None,
        unstable: Literal["nan", "continue"] = "nan",
        nconmax: Count | None = None,
        njmax: Count | None = None,
        randomise: Randomise | None = None,
        models: Count | None = None,
        models_seed: Natural | None = None,
        render: RenderOptions | None = None,
    ) -> None:
        limit = task.max_episode_steps if max_episode_steps is None else max_episode_steps
        super().__init__(num_envs, device=device, autoreset_mode=autoreset_mode, max_episode_steps=limit)
        self.name = type(task).__name__
        self.task, self.unstable = task, unstable
        self._render_options = render or RenderOptions()
        self._renderer: Renderer | None = None
        model = load_model(task.xml_file)
        self._variants = asked_variants(model, randomise, models, models_seed)
        masses = None if self._variants is None else self._variants.values.get("body_mass")
        self._mass = None
        if masses is not None:
            self._mass = torch.as_tensor(masses, dtype=self.engine_class.dtype, device=self.device)
        fields = tuple(dict.fromkeys(task.fields))
        self.engine = self.engine_class(model, num_envs, self.device, fields, self._variants, nconmax, njmax)
        self._derived = [name for name in fields if name != "cfrc_ext"]
        task.setup(model, lambda x: torch.as_tensor(np.array(x), dtype=self.engine.dtype, device=self.device))
        if seed is not None:
            self._generator.manual_seed(stream_seed(seed, "initial states"))
        self._may_terminate = type(task).terminated is not MujocoTask.terminated
        self._rest = self._prepared(dict(self.engine.rest))
        self._remembers = task.remember(State(**self._rest)) is not None
        self.single_action_space = action_space(model)
        self.single_observation_space = Box(-np.inf, np.inf, (self._check_task(),), np.float32)

    def initial(self, generator: torch.Generator, n: int) -> dict[str, Tensor]:
        qpos, qvel = self.task.reset(n, generator)
        variant = None
        if self._variants is not None:
            variant = torch.randint(self._variants.count, (n,), generator=generator, device=self.device)
        return self._state_at(qpos, qvel, variant)

    def _state_at(self, qpos: Tensor, qvel: Tensor, variant: Tensor | None) -> dict[str, Tensor]:
        """The whole state of copies that begin at ``qpos [N, nq]`` and ``qvel [N, nv]``."""
        dtype = self.engine.dtype
        state = dict(self.engine.rest) | {"qpos": qpos.to(dtype), "qvel": qvel.to(dtype)}
        if variant is not None:
            state["variant"] = variant
        state = self._prepared(state)
        if self._remembers:
            state["before"] = self._remembered(State(**state, **self._masses(state)))
        return state

    def _prepared(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the derived fields, as after ``mj_forward``. Contact forces are zero there, as in Gymnasium."""
        if self._derived:
            self.engine.load(state, state.get("variant"))
            self.engine.forward()
            found = self.engine.read()
            state |= {name: found[name] for name in self._derived}
        if "cfrc_ext" in self.task.fields:
            state["cfrc_ext"] = state["qpos"].new_zeros(self.num_envs, self.engine.model.nbody, 6)
        return state

    def transition(
        self, state: dict[str, Tensor], action: Tensor, noise: Any
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        task, engine = self.task, self.engine
        engine.load({**state, "ctrl": action}, state.get("variant"))
        engine.step(task.frame_skip)
        new: dict[str, Tensor] = engine.read()
        whole = torch.cat((new["qpos"], new["qvel"]), 1)
        calm = (whole.abs() < LARGEST).all(1)  # False for NaN
        new = {name: self._where(calm, x, self._rest[name]) for name, x in new.items()}
        new["ctrl"] = action
        seen = State(**new, **{name: state[name] for name in ("before",) if name in state}, **self._masses(state))
        seen.terminated = task.terminated(seen)
        reward = task.reward(seen)
        if self.unstable == "nan":
            reward = reward.masked_fill(~calm, torch.nan)
        if self._remembers:
            new["before"] = self._remembered(seen)
        if "variant" in state:
            new["variant"] = state["variant"]
        return new, reward, seen.terminated

    def observe(self, state: dict[str, Tensor]) -> Tensor:
        return self.task.observe(State(**state))

    def step(self, action: Tensor) -> StepResult:
        return super().step(action)._replace(log={"simulator/dropped": self.engine.dropped()})

    def step_into(self, action: Tensor, rows: StepRows) -> dict[str, Any]:
        return super().step_into(action, rows) | {"simulator/dropped": self.engine.dropped()}

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def set_state(self, qpos: Tensor, qvel: Tensor, rows: Tensor | None = None) -> Tree:
        """Start new episodes at ``qpos [n, nq]`` and ``qvel [n, nv]`` in ``rows`` ``[n]`` int64 (None: all copies).
        Returns the observation ``[N, k]``.

        :raises ValueError: other shapes, or rows before the first reset.
        """
        n = self.num_envs if rows is None else len(rows)
        model = self.engine.model
        expected = (n, model.nq), (n, model.nv)
        if (tuple(qpos.shape), tuple(qvel.shape)) != expected:
            raise ValueError(
                f"expected qpos, qvel of shapes {expected}, received {(tuple(qpos.shape), tuple(qvel.shape))}"
            )
        mask = None
        if not self._memory:
            if rows is not None:
                raise ValueError("set_state(rows=...) before the first reset(): call reset() once to start every copy")
            self.reset()
        if rows is not None:
            mask = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device).index_fill_(0, rows, True)
            at, dtype = self._memory[0], self.engine.dtype
            qpos = at["qpos"].index_copy(0, rows, qpos.to(dtype))
            qvel = at["qvel"].index_copy(0, rows, qvel.to(dtype))
        return self._start(self._state_at(qpos, qvel, self._memory[0].get("variant")), mask)

    def render(self, index: int = 0) -> np.ndarray:
        """A picture of copy ``index``, ``[height, width, 3]`` uint8, without a display; waits for the device.

        :raises RuntimeError: no reset yet; or no OpenGL backend works, and it says what to install.
        """
        if not self._memory:
            raise RuntimeError("render() before the first reset(): call reset() once to start every copy")
        state, model = self._memory[0], self.engine.model
        if self._renderer is None:
            self._renderer = Renderer(model, self._render_options, self.task.camera)
        if self._variants is not None:
            model = self._variants.models[int(state["variant"][index])]
        data = mujoco.MjData(model)
        for name in ("qpos", "qvel", "act"):
            getattr(data, name)[:] = state[name][index].cpu().numpy() if name in state else 0.0
        mujoco.mj_forward(model, data)
        return self._renderer.render(data)

    def _masses(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """``body_mass`` ``[N, nbody]`` of the models that the copies are of, where masses differ."""
        return {} if self._mass is None else {"body_mass": self._mass[state["variant"]]}

    def _remembered(self, state: State) -> Tensor:
        found = self.task.remember(state)
        assert found is not None  # as at construction
        return found

    def _check_task(self) -> int:
        """Call each of the task's methods once, with a stream of its own, and return the observation's size."""
        task, n = self.task, self.num_envs
        qpos, qvel = task.reset(n, torch.Generator(self.device).manual_seed(0))
        check_shape(task, "reset(n, generator)[0]", qpos, (n, self.engine.model.nq), qpos.dtype)
        check_shape(task, "reset(n, generator)[1]", qvel, (n, self.engine.model.nv), qvel.dtype)
        variant = None if self._variants is None else torch.zeros(n, dtype=torch.int64, device=self.device)
        state = State(**self._state_at(qpos, qvel, variant))
        obs = task.observe(state)
        check_shape(task, "observe(state)", obs, (n, obs.shape[-1]), obs.dtype)
        state.terminated = task.terminated(state)
        check_shape(task, "terminated(state)", state.terminated, (n,), torch.bool)
        check_shape(task, "reward(state)", task.reward(state), (n,), self.engine.dtype)
        return obs.shape[1]
