"""``MujocoEnv``: many copies of a :class:`MujocoTask` as a ``BatchedEnv``."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, StepRows, as_autoreset_mode
from ccrl.seeding import stream_seed
from envs.mujoco.engine import BatchEngine, available_cores
from envs.mujoco.in_place import Arrays, Write, bound
from envs.mujoco.model import action_space, load_model
from envs.mujoco.render import Renderer, RenderOptions
from envs.mujoco.task import MujocoTask, State, check_shape
from envs.mujoco.variants import Randomise, asked_variants

__all__ = ["MujocoEnv"]


class MujocoEnv:
    """``num_envs`` copies of ``task`` on CPU threads, physics in float64.

    Observations, rewards and final observations are cast once into buffers of ``dtype``, which the next ``step`` or
    ``reset`` overwrites. Each ``step`` writes the rows of ``final_obs`` where an episode ended and no others. Flags are
    not to be written to: where nothing can end, every step returns the same ones.

    Args:
        task: the environment; its options are the fields of its class.
        num_envs: ``N``, at least 1.
        device: the CPU; others are for mujoco-warp, :class:`envs.mujoco.warp.WarpEnv`.
        seed: of the stream that resets draw from; None takes one from the operating system.
        nthread: simulator threads; None takes every core the process may use. Results do not depend on it.
        autoreset_mode: what happens after an episode's end, see ``ccrl.batched_env.BatchedEnv``. With DISABLED,
            finished copies stand still: reward 0, the last observation and flags.
        max_episode_steps: the time limit; None takes the task's.
        dtype: of observations and rewards, float32 or float64.
        unstable: MuJoCo resets a simulation that meets NaN or huge numbers by itself and goes on, and Gymnasium does
            not tell. ``"nan"`` makes that step's reward NaN, which the collector reports; ``"continue"`` does as
            Gymnasium does.
        randomise: episodes are played on variants of the model, see ``envs.mujoco.variants.Randomise``; None: on it.
        models: so many variants are drawn, once; every episode draws one of them. None: 64.
        models_seed: of the stream that the variants are drawn from. None: 0.
        render: size and camera of ``render``.

    Raises ``ValueError`` or ``TypeError`` for options out of range and for a task whose methods return other shapes
    than they should, ``FileNotFoundError`` for a missing MJCF file.
    """

    provides_final_obs: bool

    def __init__(
        self,
        task: MujocoTask,
        num_envs: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        nthread: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        unstable: Literal["nan", "continue"] = "nan",
        randomise: Randomise | None = None,
        models: int | None = None,
        models_seed: int | None = None,
        render: RenderOptions | None = None,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError(
                f"{type(task).__name__}: MuJoCo's own engine simulates on the CPU, got device={str(device)!r}; "
                "leave device at 'cpu', or give engine='warp'"
            )
        self.device = BatchEngine.device
        self.task, self.num_envs, self.unstable = task, num_envs, unstable
        self.autoreset_mode = as_autoreset_mode(autoreset_mode, where=type(task).__name__)
        self.max_episode_steps = task.max_episode_steps if max_episode_steps is None else max_episode_steps
        self._render_options = render or RenderOptions()
        nthread = available_cores() if nthread is None else nthread
        positive = {
            "num_envs": num_envs,
            "nthread": nthread,
            "max_episode_steps": self.max_episode_steps,
            "frame_skip": task.frame_skip,
        }
        for name, value in positive.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, received {value!r}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected torch.float32 or torch.float64, received {dtype}")
        if unstable not in ("nan", "continue"):
            raise ValueError(f"unstable: expected 'nan' or 'continue', received {unstable!r}")
        self.provides_final_obs = self.autoreset_mode is AutoresetMode.SAME_STEP

        model = load_model(task.xml_file)
        self._variants = asked_variants(model, randomise, models, models_seed)
        self.engine = BatchEngine(model, num_envs, nthread, task.fields, self._variants)
        task.setup(model, lambda x: torch.as_tensor(np.array(x), dtype=self.engine.dtype, device=self.device))
        self._generator = torch.Generator(self.device)
        self._seed(seed)
        self._renderer: Renderer | None = None

        obs_size = self._check_task()
        self._obs = torch.zeros(num_envs, obs_size, dtype=dtype)
        self._final_obs = torch.zeros_like(self._obs) if self.provides_final_obs else None
        self._reward = torch.zeros(num_envs, dtype=dtype)
        self._terminated = torch.zeros(num_envs, dtype=torch.bool)
        self._truncated = torch.zeros(num_envs, dtype=torch.bool)
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64)
        self._never = torch.zeros(num_envs, dtype=torch.bool)
        self._steps_to_limit = 0  # of the oldest episode, on the host: before it no flag has to be looked at
        self._may_terminate = type(task).terminated is not MujocoTask.terminated
        self._stopped = False  # some copies finished and have not been reset: False always under SAME_STEP
        self._started = False
        self.single_action_space = action_space(model)
        numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
        self.single_observation_space = Box(-np.inf, np.inf, (obs_size,), dtype=numpy_dtype)
        self._action_shape = torch.Size((num_envs, model.nu))
        self._fix_memory()

    # The protocol

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Start new episodes, everywhere or where ``mask`` ``[N]`` bool is set: ``[N, k]``."""
        if seed is not None:
            self._seed(seed)
        if mask is None:
            self._begin(torch.arange(self.num_envs))
        elif mask.dtype != torch.bool or mask.shape != (self.num_envs,):
            raise ValueError(
                f"mask: expected bool of shape ({self.num_envs},), received {mask.dtype} of shape {tuple(mask.shape)}"
            )
        elif not self._started:
            raise RuntimeError("reset(mask=...) before the first reset(): call reset() once to start every copy")
        else:
            self._begin(mask.nonzero().squeeze(1))
        return self._obs

    def step(self, action: Tensor) -> StepResult:
        """Advance every copy by ``frame_skip`` simulation steps. ``action`` ``[N, nu]`` of any float dtype; the
        simulator clamps it to the actuators' ranges, the reward sees it as given."""
        self._check(action)
        if self._stopped:
            return self._step_partly(action)
        done = self._move(action)
        terminated, truncated = (self._ended.clone() if self._may_terminate else self._never), self._never
        if self._steps_to_limit <= 0:
            truncated = self._elapsed >= self.max_episode_steps
        self._terminated, self._truncated = terminated, truncated
        if done:
            self._finish(terminated | truncated, self._final_obs)
        self._remember()
        return StepResult(self._obs, self._reward, terminated, truncated, self._final_obs)

    def step_into(self, action: Tensor, rows: StepRows) -> dict[str, Any]:
        """``step``, written into ``rows``."""
        self._check(action)
        if self._stopped or rows.arrays is None:
            rows.write(self.step(action))
            return {}
        done = self._move(action)
        obs, reward, terminated, truncated = rows.arrays
        reward[...] = self._arrays.reward
        terminated[...] = self._arrays.terminated
        truncated[...] = False
        if self._steps_to_limit <= 0:
            np.greater_equal(self._ages, self.max_episode_steps, out=truncated)
        self._terminated = self._truncated = self._never
        if done:
            self._terminated, self._truncated = rows.terminated.clone(), rows.truncated.clone()
            self._finish(self._terminated | self._truncated, rows.final_obs)
        obs[...] = self._arrays.obs
        self._remember()
        return {}

    def close(self) -> None:
        """Release the renderer. The simulator's threads end with the object."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # Beyond the protocol

    def set_state(self, qpos: Tensor, qvel: Tensor, rows: Tensor | None = None) -> Tensor:
        """Start new episodes at ``qpos [n, nq]`` and ``qvel [n, nv]`` in ``rows`` ``[n]`` int64 (None: all copies), as
        Gymnasium's reset does with its own noise. Returns the observation ``[N, k]``.

        Raises ``ValueError`` for other shapes, or rows before the first reset.
        """
        if rows is not None and not self._started:
            raise ValueError("set_state(rows=...) before the first reset(): call reset() once to start every copy")
        rows = torch.arange(self.num_envs) if rows is None else rows
        model = self.engine.model
        expected = (len(rows), model.nq), (len(rows), model.nv)
        if (tuple(qpos.shape), tuple(qvel.shape)) != expected:
            raise ValueError(
                f"expected qpos, qvel of shapes {expected}, received {(tuple(qpos.shape), tuple(qvel.shape))}"
            )
        self._begin_at(rows, qpos, qvel)
        return self._obs

    def render(self, index: int = 0) -> np.ndarray:
        """A picture of copy ``index``, ``[height, width, 3]`` uint8, without a display.

        Raises ``RuntimeError`` where no OpenGL backend works, and says what to install.
        """
        if self._renderer is None:
            self._renderer = Renderer(self.engine.model, self._render_options, self.task.camera)
        return self._renderer.render(self.engine.data(index))

    def state_dict(self) -> dict[str, Any]:
        """Everything the future depends on. After ``load_state_dict`` the same actions give the same results, bit for
        bit."""
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        return {
            **tensors,
            "simulator": self.engine.state_dict(),
            "generator": self._generator.get_state(),
            "stopped": self._stopped,
            "started": self._started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, in an environment built with the same arguments.

        Raises ``ValueError`` where the state is of another task or number of copies; nothing is loaded then.
        """
        mine = self.state_dict()
        if _shapes(mine) != _shapes(state):
            raise ValueError(f"state: expected {_shapes(mine)}, received {_shapes(state)}")
        self.engine.load_state_dict(state["simulator"])
        # new tensors for the flags: those of the last StepResult may be constants
        self._terminated, self._truncated = state["terminated"].clone(), state["truncated"].clone()
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        self._count_down()
        self._generator.set_state(state["generator"])
        self._stopped, self._started = state["stopped"], state["started"]

    # Inside

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "obs": self._obs,
            "elapsed": self._elapsed,
            "terminated": self._terminated,
            "truncated": self._truncated,
        }
        return tensors | ({"before": self._before} if self._before is not None else {})

    def _seed(self, seed: int | None) -> None:
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(stream_seed(seed, "initial states"))

    def _step_partly(self, action: Tensor) -> StepResult:
        """A step in which the finished copies do not take part (NEXT_STEP: they start again; DISABLED: they wait)."""
        stopped = self._terminated | self._truncated
        kept = self._obs[stopped]
        self.engine.state.ctrl.copy_(action.detach())
        self.engine.step(self.task.frame_skip, (~stopped).nonzero().squeeze(1))
        self._elapsed += ~stopped
        self._observe_step()
        self._obs[stopped] = kept
        self._reward[stopped] = 0.0
        terminated = torch.where(stopped, self._terminated, self._ended)
        truncated = self._elapsed >= self.max_episode_steps
        self._terminated, self._truncated = terminated, truncated
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self._begin(stopped.nonzero().squeeze(1))
        self._stopped = bool((self._terminated | self._truncated).any())
        self._remember()
        return StepResult(self._obs, self._reward, self._terminated, self._truncated)

    def _check(self, action: Tensor) -> None:
        if action.shape != self._action_shape:
            raise ValueError(f"action: expected shape {tuple(self._action_shape)}, received {tuple(action.shape)}")
        if not self._started:
            raise RuntimeError("step() before the first reset(): call reset() once to start every copy")

    def _move(self, action: Tensor) -> bool:
        """Advance and observe every copy; whether an episode ended."""
        self.engine.state.ctrl.copy_(action.detach())
        self.engine.step(self.task.frame_skip)
        self._ages += 1
        self._steps_to_limit -= 1
        self._observe_step()
        done = self._may_terminate and bool(self._arrays.terminated.any())
        return done or (self._steps_to_limit <= 0 and bool((self._ages >= self.max_episode_steps).any()))

    def _finish(self, done: Tensor, final_obs: Any) -> None:
        """Restart the copies in ``done``, their last observations kept in ``final_obs``; or let them stand still."""
        if not self.provides_final_obs:
            self._stopped = True
            return
        rows = done.nonzero().squeeze(1)
        if final_obs is not None:
            final_obs.index_copy_(0, rows, self._obs.index_select(0, rows).to(final_obs.dtype))
        self._begin(rows)

    def _fix_memory(self) -> None:
        """Views of what stays where it is."""
        state = self.engine.state
        self._ages, self._ended = self._elapsed.numpy(), torch.zeros_like(self._never)
        self._arrays = Arrays(self._obs.numpy(), self._reward.numpy(), self._ended.numpy())
        self._write: Write | None = self.task.in_place(state, self._arrays) if bound(self.task) else None
        self._kept: tuple[Any, Any] | None = None
        if self._write is not None:
            state.terminated = self._ended
            if self._before is not None and _is_view(found := self._remembered(state), state):
                self._kept = self._before.numpy(), found.numpy()

    def _observe_step(self) -> None:
        if self._write is not None:
            self._write()
        else:
            state = self.engine.state
            self._obs.copy_(self.task.observe(state))
            if self._may_terminate:
                state.terminated = self.task.terminated(state)
                self._ended.copy_(state.terminated)
            self._reward.copy_(self.task.reward(state))
        bad = self.engine.unstable()
        if bad is not None and self.unstable == "nan":
            self._reward[bad] = torch.nan

    def _remember(self) -> None:
        if self._kept is not None:
            before, now = self._kept
            before[...] = now
        elif self._before is not None:
            self._before.copy_(self._remembered(self.engine.state))

    def _remembered(self, state: State) -> Tensor:
        found = self.task.remember(state)
        assert found is not None  # as at construction
        return found

    def _begin(self, rows: Tensor) -> None:
        qpos, qvel = self.task.reset(len(rows), self._generator)
        if self._variants is not None:
            variant = torch.randint(self._variants.count, (len(rows),), generator=self._generator, device=self.device)
            self.engine.play(rows, variant)
        self._begin_at(rows, qpos, qvel)

    def _begin_at(self, rows: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        self.engine.reset(rows, qpos, qvel)
        state = self.engine.state.rows(rows)
        if self._before is not None:
            self._before[rows] = self._remembered(state)
        self._obs.index_copy_(0, rows, self.task.observe(state).to(self._obs.dtype))
        self._elapsed.index_fill_(0, rows, 0)
        self._count_down()
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            # Out of place: the last StepResult holds these tensors.
            self._terminated = self._terminated.index_fill(0, rows, False)
            self._truncated = self._truncated.index_fill(0, rows, False)
            self._stopped = bool((self._terminated | self._truncated).any())
        self._started = True

    def _count_down(self) -> None:
        self._steps_to_limit = self.max_episode_steps - int(self._elapsed.max())

    def _check_task(self) -> int:
        """Call each of the task's methods once, with a stream of its own, and return the observation's size."""
        task, state, n = self.task, self.engine.state, self.num_envs
        qpos, qvel = task.reset(n, torch.Generator(self.device).manual_seed(0))
        check_shape(task, "reset(n, generator)[0]", qpos, (n, state.qpos.shape[1]), qpos.dtype)
        check_shape(task, "reset(n, generator)[1]", qvel, (n, state.qvel.shape[1]), qvel.dtype)
        self.engine.reset(torch.arange(n), qpos, qvel)
        before = task.remember(state)
        self._before = None if before is None else before.clone()
        if self._before is not None:
            state.before = self._before
        obs = task.observe(state)
        check_shape(task, "observe(state)", obs, (n, obs.shape[-1]), obs.dtype)
        state.terminated = task.terminated(state)
        check_shape(task, "terminated(state)", state.terminated, (n,), torch.bool)
        check_shape(task, "reward(state)", task.reward(state), (n,), self.engine.dtype)
        return obs.shape[1]


def _is_view(x: Tensor, state: State) -> bool:
    memory = x.untyped_storage().data_ptr()
    return any(y.untyped_storage().data_ptr() == memory for y in vars(state).values())


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _shapes(value) if isinstance(value, dict) else tuple(getattr(value, "shape", ()))
        for name, value in sorted(state.items())
    }
