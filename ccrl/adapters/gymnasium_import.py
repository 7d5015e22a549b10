"""Gymnasium environments as a :class:`ccrl.batched_env.BatchedEnv`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from torch import Tensor

from ccrl.adapters.gymnasium_export import TorchVectorEnv
from ccrl.adapters.seeds import copy_seeds
from ccrl.adapters.spaces import action_array, batch_buffer, check_action_space, check_batch, float32_space, store
from ccrl.batched_env import AutoresetMode, StepResult, Tree, check_device

__all__ = ["GymnasiumEnv", "from_gymnasium"]


class GymnasiumEnv:
    """A ``gymnasium.vector.VectorEnv`` (Sync, Async or a vector entry point) seen as a ``BatchedEnv``.

    The autoreset mode is the one in the environment's metadata. The returned tensors are persistent buffers. A seed
    gives each copy one of its own, ``ccrl.adapters.seeds.copy_seeds(seed, N)`` (a vector entry point, which seeds its
    copies in its own way, gets the first of these). There is no ``state_dict``: Gymnasium has no way to save an
    environment, so a resumed run starts fresh episodes (the native environments in ``envs`` resume exactly).

    Args:
        env: the environment, not yet wrapped in anything that changes its autoreset mode.
        device: where observations, rewards and flags go.

    Raises:
        TypeError: not a vector environment, or a space other than ``Box``, ``Discrete``, flat ``Dict`` (observations).
        ValueError: the metadata do not tell the autoreset mode, or a device that is not here.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], *, device: torch.device | str = "cpu") -> None:
        self.name = str(env)
        if not isinstance(env, VectorEnv):
            raise TypeError(
                f"expected a gymnasium.vector.VectorEnv, got {self.name}; use "
                "ccrl.adapters.from_gymnasium(lambda: env, num_envs=1) for a single environment"
            )
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(
                f"{self.name}: expected an AutoresetMode in metadata['autoreset_mode'], got {mode!r}; set it on the "
                "environment's class to what its step() does"
            )
        check_action_space(env.single_action_space, where=self.name)
        self.env = env
        self.num_envs: int = env.num_envs
        self.device = check_device(device)
        self.single_action_space = env.single_action_space
        self.single_observation_space = float32_space(env.single_observation_space, where=self.name)
        self.autoreset_mode = mode
        self.provides_final_obs = mode == AutoresetMode.SAME_STEP
        self._obs = batch_buffer(self.single_observation_space, self.num_envs, self.device)
        self._final_obs = batch_buffer(self.single_observation_space, self.num_envs, self.device)
        self._reward = torch.zeros(self.num_envs, device=self.device)
        self._terminated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._truncated = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """See :class:`ccrl.batched_env.BatchedEnv`.

        Raises:
            ValueError: ``mask`` outside ``DISABLED`` mode, where Gymnasium's bookkeeping does not allow it; or
                observations of another shape than the space has.
        """
        options = None
        if mask is not None:
            if self.autoreset_mode != AutoresetMode.DISABLED:
                raise ValueError(
                    f"{self.name}: reset(mask=...) needs AutoresetMode.DISABLED, got {self.autoreset_mode}"
                )
            if not bool(mask.any()):
                return self._obs
            options = {"reset_mask": mask.cpu().numpy()}
        try:
            obs, _ = self.env.reset(seed=None if seed is None else self._seeds(seed), options=options)
        except ValueError as error:
            error.add_note(
                f"{self.name}: reset() failed; expected observations of {self.single_observation_space} "
                "(gymnasium.utils.env_checker.check_env(env) tells what an environment returns instead)"
            )
            raise
        check_batch(self._obs, obs, where=self.name)
        store(self._obs, obs)
        return self._obs

    def step(self, action: Tensor) -> StepResult:
        """See :class:`ccrl.batched_env.BatchedEnv`.

        Raises:
            ValueError: an action of another shape or kind.
            RuntimeError: the environment resets in the same step without handing out ``final_obs``.
        """
        array = action_array(action, self.single_action_space, self.num_envs, where=self.name)
        obs, reward, terminated, truncated, infos = self.env.step(array)
        store(self._obs, obs)
        store(self._reward, reward)
        store(self._terminated, terminated)
        store(self._truncated, truncated)
        if not self.provides_final_obs:
            return StepResult(self._obs, self._reward, self._terminated, self._truncated)
        done = np.logical_or(terminated, truncated)
        if done.any():
            self._store_final(infos.get("final_obs"), np.flatnonzero(done))
        return StepResult(self._obs, self._reward, self._terminated, self._truncated, self._final_obs)

    def close(self) -> None:
        """Close the environment and its processes."""
        self.env.close()

    def _seeds(self, seed: int) -> Any:
        inner = self.env.unwrapped
        if isinstance(inner, TorchVectorEnv):  # ours: one generator for all copies, and the seed is its seed
            return seed
        seeds = copy_seeds(seed, self.num_envs)
        return seeds if isinstance(inner, SyncVectorEnv | AsyncVectorEnv) else seeds[0]

    def _store_final(self, final: Any, rows: Any) -> None:
        if final is None:
            raise RuntimeError(
                f"{self.name}: an episode ended in SAME_STEP mode without infos['final_obs']; the value of the last "
                "state is lost. Build the environment with AutoresetMode.NEXT_STEP"
            )
        if isinstance(final, np.ndarray) and final.dtype == object:  # one entry per copy, None while it runs
            for row in rows:
                store(self._final_obs, final[row], int(row))
        else:
            store(self._final_obs, final)


def from_gymnasium(
    make: Any,
    num_envs: int = 1,
    *,
    device: torch.device | str = "cpu",
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    asynchronous: bool = False,
    **env_kwargs: Any,
) -> GymnasiumEnv:
    """``num_envs`` copies of a single Gymnasium environment.

    Args:
        make: an id for ``gymnasium.make`` or a function without arguments that returns a new environment.
        num_envs: number of copies.
        device: where the tensors go.
        autoreset_mode: ``SAME_STEP`` (no dummy rows), ``NEXT_STEP`` or ``DISABLED``.
        asynchronous: one process per copy, for environments that take longer than about 0.2 ms a step.
        env_kwargs: for ``gymnasium.make``.

    Raises:
        TypeError: an environment instead of a function that makes one.
        ValueError: keyword arguments together with a function, a function that returns one environment several times,
            or ``num_envs`` below 1.
    """
    if isinstance(make, gymnasium.Env | VectorEnv):
        use = "GymnasiumEnv(env)" if isinstance(make, VectorEnv) else "from_gymnasium(lambda: make_it(), num_envs)"
        raise TypeError(
            f"expected an id or a function that makes an environment, got the environment {make}; use {use}"
        )
    if num_envs < 1:
        raise ValueError(f"num_envs: expected >= 1, got {num_envs}")
    if callable(make) and env_kwargs:
        raise ValueError(f"keyword arguments {sorted(env_kwargs)} need an id; a function takes none")
    single = make if callable(make) else lambda: gymnasium.make(make, **env_kwargs)
    vector = AsyncVectorEnv if asynchronous else SyncVectorEnv
    # The adapter copies once into its own buffers; a second copy inside the vector environment would be waste.
    env = vector([single] * num_envs, copy=False, autoreset_mode=AutoresetMode(autoreset_mode))
    if not asynchronous and len({id(copy.unwrapped) for copy in env.envs}) < num_envs:
        raise ValueError(
            f"expected a function that makes a new environment at every call, got {num_envs} times the same "
            f"{env.envs[0]}; build it inside the function"
        )
    return GymnasiumEnv(env, device=device)
