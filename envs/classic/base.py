"""What all classic-control tasks share beyond :class:`ccrl.torch_env.TorchEnv`: NumPy on the CPU, rows, and pictures.

A task is a subclass with five pure functions on rows of shape ``[N]``; ``envs/classic/cartpole.py`` is one to copy.
They are written with operators and with ``self.xp``, the functions that NumPy and torch share: on the CPU the arrays
are NumPy's, because a small NumPy operation takes a third of a torch one and its cosine is the one of Gymnasium's
environments to the last bit; on any other device they are tensors. The way out is a view, not a copy.

A state is ``[D, N]``, not ``[N, D]``: its rows are contiguous, which makes each operation a plain vector loop.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, StepRows
from ccrl.torch_env import Array, TorchEnv

__all__ = ["Array", "ClassicEnv"]


class ClassicEnv(TorchEnv):
    """``num_envs`` copies of one classic-control task; a :class:`ccrl.batched_env.BatchedEnv`.

    Observations are float32 and rewards are float32 ``[N]``, whatever ``dtype`` is.

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
    uniforms: ClassVar[int]
    """How many uniform numbers an initial state is made of."""
    noises: ClassVar[int] = 0
    """How many uniform numbers a step takes; with some, ``dynamics`` gets them ``[noises, N]`` as a third argument."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            num_envs, device=device, autoreset_mode=autoreset_mode, max_episode_steps=max_episode_steps, compile=compile
        )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{self.id}: dtype must be torch.float32 or torch.float64, got {dtype}")
        self.dtype = dtype
        self.xp: Any = np if self.device.type == "cpu" and not compile else torch
        """``numpy`` or ``torch``: what the arrays of the task are."""
        self._types = (np.float32, np.dtype(str(dtype)[6:])) if self.xp is np else (torch.float32, dtype)
        self._renderer: Any = None

    # What a task defines. ``state`` is ``[D, N]`` (iterating it gives rows); a Box action is ``[A, N]`` float32, a
    # Discrete one ``[N]`` integers.

    def initial_state(self, uniform: Array) -> Array:
        """``[D, N]`` states at the start of an episode, from ``uniform`` ``[uniforms, N]`` in [0, 1)."""
        raise NotImplementedError

    def dynamics(self, state: Array, action: Array, *noise: Array) -> Array:
        """``[D, N]`` successor states; ``noise`` is ``[noises, N]`` in [0, 1), where the task takes some."""
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

    # What :class:`TorchEnv` asks for, from the functions above.

    def initial(self, generator: torch.Generator, n: int) -> Array:
        return self.initial_state(self._uniform(self.uniforms, generator, n))

    def draw_noise(self, generator: torch.Generator, n: int) -> Array | None:
        return self._uniform(self.noises, generator, n) if self.noises else None

    def transition(self, state: Array, action: Array, noise: Array | None) -> tuple[Array, Array, Array]:
        successor = self.dynamics(state, action) if noise is None else self.dynamics(state, action, noise)
        terminated = self.terminated(successor)
        return successor, self.reward(state, action, terminated), terminated

    def _uniform(self, rows: int, generator: torch.Generator, n: int) -> Array:
        return self._inward(torch.rand((rows, n), dtype=self.dtype, device=self.device, generator=generator))

    def _inward(self, tensor: Tensor) -> Array:
        return tensor.numpy() if self.xp is np else tensor

    def _outward(self, array: Array) -> Tensor:
        return torch.from_numpy(array) if self.xp is np else array

    def _action_inward(self, action: Tensor) -> Array:
        rows = self._inward(action)
        return self.single(rows).T if action.is_floating_point() else rows

    def _obs_outward(self, obs: Array) -> Tensor:
        return self._outward(obs.T)

    def _where(self, mask: Array, chosen: Array, other: Array) -> Array:
        return self.xp.where(mask, chosen, other)

    def _float32(self, values: Array) -> Array:
        return self.single(values)

    def _copied(self, values: Array) -> Array:
        return values.copy() if self.xp is np else values.clone()

    def _is_nowhere(self, mask: Array) -> bool:
        return self.xp is np and not mask.any()

    def _result(self, reward: Array, final_obs: Array | None) -> StepResult:
        if final_obs is not None and self.xp is np:
            final_obs = final_obs.copy()  # where no episode ended it can be the state, which callers must not change
        return super()._result(reward, final_obs)

    def _store(self, reward: Array, final_obs: Array | None, rows: StepRows) -> None:
        if rows.arrays is None or self.xp is not np:
            super()._store(reward, final_obs, rows)
            return
        _, _, ended, cut, shown = self._memory
        for row, values in zip(rows.arrays, (shown.T, reward, ended, cut)):
            row[...] = values
        if final_obs is not None and isinstance(rows.final_obs, Tensor) and not self._is_nowhere(ended | cut):
            rows.final_obs.copy_(self._outward(final_obs.T))

    def close(self) -> None:
        """Close the window system of the renderer, if there was one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

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
