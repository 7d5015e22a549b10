"""The life cycle that all classic-control tasks share: batching, autoreset, time limit, seeding, resuming.

A task is a subclass with five pure functions on rows of shape ``[N]``; ``envs/classic/cartpole.py`` is one to copy.
They are written with operators and with ``self.xp``, the functions that NumPy and torch share: on the CPU the arrays
are NumPy's, because a small NumPy operation takes a third of a torch one and its cosine is the one of Gymnasium's
environments to the last bit; on any other device they are tensors. The way out is a view, not a copy.

A state is ``[D, N]``, not ``[N, D]``: its rows are contiguous, which makes each operation a plain vector loop. Nothing
is written in place and nothing is read back by the host, so a step on a GPU never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import Space
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult

__all__ = ["Array", "ClassicEnv"]

Array = Any
"""``numpy.ndarray`` on the CPU, ``torch.Tensor`` elsewhere and in compiled steps."""

_MEMORY = ("state", "steps", "terminated", "truncated", "obs")


class ClassicEnv:
    """``num_envs`` copies of one classic-control task; a :class:`ccrl.batched_env.BatchedEnv`.

    Observations are float32 and rewards are float32 ``[N]``, whatever ``dtype`` is. Discrete actions are not checked
    against the range of the space, because that would make the host wait for the device.

    In ``DISABLED`` mode a finished copy stays as it is: ``step`` repeats its last observation and flags with reward 0
    until ``reset(mask=...)``.

    Args:
        num_envs: number of copies ``N``.
        device: where the state lives.
        dtype: of the state and its dynamics, ``torch.float32`` or ``torch.float64``. With float64 on the CPU the
            trajectories are Gymnasium's bit for bit. With float32, 200 steps stay within 1e-5 of it for
            both mountain cars and for 998 of 1000 cart-poles. Pendulum and Acrobot are chaotic: single steps do, but of
            whole trajectories of 200 steps only 42 % and 85 %.
        autoreset_mode: see :class:`ccrl.batched_env.BatchedEnv`.
        max_episode_steps: the step that is truncated; ``None`` takes the task's own limit.
        compile: run the step as one compiled torch graph: fewer launches on a GPU, for some seconds of start-up.
            Results differ from the others in the last bits.

    Raises:
        ValueError: a number of copies or steps below one, or another ``dtype``.
    """

    id: ClassVar[str]
    """Gymnasium's id of the task."""
    default_max_episode_steps: ClassVar[int]
    uniforms: ClassVar[int]
    """How many uniform numbers an initial state is made of."""
    noises: ClassVar[int] = 0
    """How many uniform numbers a step takes; with some, ``dynamics`` gets them ``[noises, N]`` as a third argument."""
    provides_final_obs: bool

    single_observation_space: Space[Any]
    single_action_space: Space[Any]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        compile: bool = False,
    ) -> None:
        limit = self.default_max_episode_steps if max_episode_steps is None else max_episode_steps
        if num_envs < 1 or limit < 1:
            raise ValueError(
                f"{self.id}: num_envs and max_episode_steps must be at least 1, got num_envs={num_envs}, "
                f"max_episode_steps={limit}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.id}: dtype must be torch.float32 or torch.float64, got {dtype}")
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.dtype = dtype
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.provides_final_obs = self.autoreset_mode == AutoresetMode.SAME_STEP
        self.max_episode_steps = limit
        self.xp: Any = np if self.device.type == "cpu" and not compile else torch
        """``numpy`` or ``torch``: what the arrays of the task are."""
        self._types = (np.float32, np.dtype(str(dtype)[6:])) if self.xp is np else (torch.float32, dtype)
        self._generator = torch.Generator(self.device)
        self._generator.seed()
        self._advance: Callable[..., tuple[Any, ...]] = self._transition
        if compile:
            self._advance = torch.compile(self._transition, fullgraph=True, dynamic=False)
        self._memory: tuple[Array, ...] = ()  # what _MEMORY names, the observation as [O, N]; () before the reset
        self._renderer: Any = None

    # What a task defines. ``state`` is ``[D, N]`` (iterating it gives rows); a Box action is ``[A, N]`` float32, a
    # Discrete one ``[N]`` integers.

    def initial_state(self, uniform: Array) -> Array:
        """``[D, N]`` states at the start of an episode, from ``uniform`` ``[uniforms, N]`` in [0, 1)."""
        raise NotImplementedError

    def dynamics(self, state: Array, action: Array) -> Array:
        """``[D, N]`` successor states."""
        raise NotImplementedError

    def terminated(self, state: Array) -> Array:
        """``[N]`` bool: the task is over in this successor state."""
        raise NotImplementedError

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        """``[N]`` reward of ``action`` in ``state``; ``terminated`` tells whether the successor ends the task."""
        raise NotImplementedError

    def observe(self, state: Array) -> Array:
        """``[O, N]`` observation of a state."""
        return state

    def observe_initial(self, state: Array) -> Array:
        """``[O, N]`` observation of an initial state, for tasks that Gymnasium starts in another precision."""
        return self.observe(state)

    # What a task may use.

    def single(self, x: Array) -> Array:
        """``x`` in float32."""
        return x.astype(self._types[0], copy=False) if self.xp is np else x.to(self._types[0])

    def real(self, x: Array) -> Array:
        """``x`` in the state's own ``dtype``."""
        return x.astype(self._types[1], copy=False) if self.xp is np else x.to(self._types[1])

    def square(self, x: Array) -> Array:
        """``x ** 2``. In float64 on the CPU by the C library's ``pow``, as Python's operator on a NumPy scalar does it:
        one value in a thousand differs from ``x * x`` in the last bit."""
        if self.xp is np and x.dtype == np.float64:
            return np.float_power(x, np.full(x.shape, 2.0))
        return x * x

    # The protocol.

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Start episodes everywhere, or where ``mask`` ``[N]`` bool is set. Returns ``[N, O]`` float32.

        Raises:
            ValueError: ``mask`` of another shape or type, or given at the very first reset.
        """
        if mask is not None and (mask.shape != (self.num_envs,) or mask.dtype != torch.bool):
            raise ValueError(
                f"{self.id}: mask must be bool of shape ({self.num_envs},), got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        if mask is not None and not self._memory:
            raise ValueError(f"{self.id}: the first reset starts every copy; call reset() without a mask once")
        if seed is not None:
            self._generator.manual_seed(seed)
        state = self._draw()
        steps = self._inward(torch.zeros(self.num_envs, dtype=torch.int64, device=self.device))
        # A sum, because an observation can be the state itself, which callers must not be able to change.
        fresh = (state, steps, steps != 0, steps != 0, self.single(self.observe_initial(state)) + 0.0)
        if mask is None:
            self._memory = fresh
        else:
            chosen = self._inward(mask)
            self._memory = tuple(self.xp.where(chosen, new, old) for new, old in zip(fresh, self._memory))
        return self._outward(self._memory[4].T)

    def step(self, action: Tensor) -> StepResult:
        """One step of every copy: ``action`` is ``[N, A]`` (Box) or ``[N]`` integers (Discrete).

        Raises:
            ValueError: an action of another shape or kind.
            RuntimeError: no reset yet.
        """
        if not self._memory:
            raise RuntimeError(f"{self.id}: call reset() before step()")
        shape = (self.num_envs, *self.single_action_space.shape)
        discrete = len(shape) == 1
        if action.shape != shape or action.is_floating_point() == discrete:
            raise ValueError(
                f"{self.id}: expected {'integer' if discrete else 'floating-point'} actions of shape {shape}, got "
                f"{action.dtype} of shape {tuple(action.shape)}"
            )
        rows = self._inward(action.detach()) if discrete else self.single(self._inward(action.detach())).T
        fresh = self._memory[0] if self.autoreset_mode == AutoresetMode.DISABLED else self._draw()
        noise = (self._uniform(self.noises),) if self.noises else ()
        self._memory, reward, final_obs = self._advance(self._memory, rows, fresh, *noise)
        _, _, terminated, truncated, obs = self._memory
        last = None if final_obs is None else self._outward(final_obs.T)
        return StepResult(
            self._outward(obs.T), self._outward(reward), self._outward(terminated), self._outward(truncated), last
        )

    def close(self) -> None:
        """Close the window system of the renderer, if there was one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future, as tensors: a copy that loads it continues bit for bit."""
        if not self._memory:
            raise RuntimeError(f"{self.id}: there is no state before the first reset()")
        values: dict[str, Any] = {name: self._outward(x).clone() for name, x in zip(_MEMORY, self._memory)}
        return values | {"generator": self._generator.get_state()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an environment of the same task, size and dtype.

        Raises:
            ValueError: the state belongs to another task, number of copies or dtype.
        """
        state = values["state"]
        size = self.initial_state(self._inward(torch.zeros(self.uniforms, 1, dtype=self.dtype))).shape[0]
        if state.shape != (size, self.num_envs) or state.dtype != self.dtype:
            raise ValueError(
                f"{self.id}: expected a state of shape {(size, self.num_envs)} and {self.dtype}, got "
                f"{tuple(state.shape)} and {state.dtype}; build the environment with the same id, num_envs and dtype"
            )
        self._memory = tuple(self._inward(values[name].to(self.device, copy=True)) for name in _MEMORY)
        self._generator.set_state(values["generator"].cpu())

    def render(self, index: int = 0) -> np.ndarray:
        """``[height, width, 3]`` uint8 picture of copy ``index``, by Gymnasium's renderer of the task.

        Raises:
            ImportError: pygame is missing.
            ValueError: a task that Gymnasium does not have.
        """
        if not self._memory:
            raise RuntimeError(f"{self.id}: call reset() before render()")
        if self.id.startswith("ccrl/"):
            raise ValueError(f"{self.id} has no picture; render_mode must be None")
        if self._renderer is None:
            self._renderer = gymnasium.make(self.id, render_mode="rgb_array").unwrapped
            self._renderer.reset()
        self._renderer.state = self._outward(self._memory[0])[:, index].double().cpu().numpy()
        try:
            return np.asarray(self._renderer.render())
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f'rendering {self.id} needs pygame: pip install "gymnasium[classic-control]"') from error

    # Inside.

    def _inward(self, tensor: Tensor) -> Array:
        return tensor.numpy() if self.xp is np else tensor

    def _outward(self, array: Array) -> Tensor:
        return torch.from_numpy(array) if self.xp is np else array

    def _uniform(self, rows: int) -> Array:
        shape = (rows, self.num_envs)
        return self._inward(torch.rand(shape, dtype=self.dtype, device=self.device, generator=self._generator))

    def _draw(self) -> Array:
        return self.initial_state(self._uniform(self.uniforms))

    def _transition(
        self, memory: tuple[Array, ...], action: Array, fresh: Array, *noise: Array
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        """The whole step as one pure function. ``fresh`` ``[D, N]`` are initial states, drawn for every copy since
        the host does not know which ones it will need."""
        where = self.xp.where
        state, steps, was_terminated, was_truncated, obs = memory
        successor = self.dynamics(state, action, *noise)
        terminated = self.terminated(successor)
        reward = self.single(self.reward(state, action, terminated))
        successor_obs = self.single(self.observe(successor))
        taken = steps + 1
        truncated = taken >= self.max_episode_steps

        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            done = terminated | truncated
            first_obs = self.single(self.observe_initial(fresh))
            kept = (where(done, fresh, successor), taken * ~done, terminated, truncated)
            return (*kept, where(done, first_obs, successor_obs)), reward, successor_obs

        ended = was_terminated | was_truncated
        reward = self.single(where(ended, 0.0, reward))
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            first_obs = self.single(self.observe_initial(fresh))
            kept = (where(ended, fresh, successor), taken * ~ended, terminated & ~ended, truncated & ~ended)
            return (*kept, where(ended, first_obs, successor_obs)), reward, None

        flags = (where(ended, was_terminated, terminated), where(ended, was_truncated, truncated))
        kept = (where(ended, state, successor), where(ended, steps, taken), *flags)
        return (*kept, where(ended, obs, successor_obs)), reward, None
