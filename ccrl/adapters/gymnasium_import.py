"""Gymnasium environments as a :class:`ccrl.batched_env.BatchedEnv`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import concatenate
from torch import Tensor

from ccrl.adapters.border import ReusedArrays, borders_of, check_arrays, put_borders
from ccrl.adapters.gymnasium_export import TorchVectorEnv
from ccrl.adapters.plain_state import read_plain, write_plain
from ccrl.adapters.seeds import copy_seeds
from ccrl.adapters.spaces import action_array, batch_buffer, check_action_space, check_batch, float32_space, store
from ccrl.batched_env import AutoresetMode, StepResult, Tree, as_autoreset_mode, check_device
from ccrl.signals import shielded

__all__ = ["GymnasiumEnv", "from_gymnasium"]

_VECTOR_STATE = ("_env_obs", "_autoreset_envs", "_terminations", "_truncations")


class GymnasiumEnv:
    """A ``gymnasium.vector.VectorEnv`` (Sync, Async or a vector entry point) seen as a ``BatchedEnv``.

    The autoreset mode is the one in the environment's metadata. The returned tensors are persistent buffers. A seed
    gives each copy one of its own, ``ccrl.adapters.seeds.copy_seeds(seed, N)`` (a vector entry point, which seeds its
    copies in its own way, gets the first of these).

    Each copy of a ``SyncVectorEnv`` is put into a :class:`ccrl.adapters.border.Border` here, those of
    :func:`from_gymnasium` were built in one: observations are copied and results checked there, and such environments
    resume exactly where their state is plain data (``resume_note`` says why it is not). An ``AsyncVectorEnv`` that was
    built elsewhere keeps references over a reset, which this class can only warn of.

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
        told = env.metadata.get("autoreset_mode")
        if told is None:
            raise ValueError(
                f"{self.name}: expected an AutoresetMode in metadata['autoreset_mode'], got none; set it on the "
                "environment's class to what its step() does"
            )
        mode = as_autoreset_mode(told, where=f"{self.name}, metadata['autoreset_mode']")
        check_action_space(env.single_action_space, where=self.name)
        self.env = env
        self.num_envs: int = env.num_envs
        self.device = check_device(device)
        self.single_action_space = env.single_action_space
        self.single_observation_space = float32_space(env.single_observation_space, where=self.name)
        self.autoreset_mode = mode
        self.provides_final_obs = mode == AutoresetMode.SAME_STEP
        inner = env.unwrapped
        if isinstance(inner, SyncVectorEnv):
            put_borders(inner.envs)
        self._bordered = isinstance(inner, SyncVectorEnv)
        self._checked = False
        self._reused = ReusedArrays(self.name)
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
        if not self._checked:
            flags = {"terminated": terminated, "truncated": truncated}
            check_arrays(f"{self.name}, step()", self.num_envs, {"rewards": reward}, flags)
            self._checked = True
        store(self._obs, obs)
        store(self._reward, reward)
        store(self._terminated, terminated)
        store(self._truncated, truncated)
        if not self.provides_final_obs:
            return StepResult(self._obs, self._reward, self._terminated, self._truncated)
        done = np.logical_or(terminated, truncated)
        if done.any():
            self._store_final(infos.get("final_obs"), np.flatnonzero(done))
            if not self._bordered:
                self._reused.check(self._obs, self._final_obs, np.flatnonzero(done))
        return StepResult(self._obs, self._reward, self._terminated, self._truncated, self._final_obs)

    def close(self) -> None:
        """Close the environment and its processes."""
        self.env.close()

    @property
    def id(self) -> str:
        """Class and, where it has one, id of the copies; of processes that were built elsewhere Gymnasium's name."""
        return str(self.env.unwrapped.get_attr("label")[0]) if self._bordered else self.name

    @property
    def resume_note(self) -> str | None:
        """Why the state of these environments cannot be had, ``None`` where it can."""
        inner = self.env.unwrapped
        if inner is not self.env:
            return f"the state of {type(self.env).__name__}, a wrapper of a vector environment, cannot be had"
        if not isinstance(inner, SyncVectorEnv | AsyncVectorEnv) or not self._bordered:
            return f"the state of {self.name} cannot be had"
        if isinstance(inner, AsyncVectorEnv) and self.autoreset_mode != AutoresetMode.SAME_STEP:
            return f"the processes of {self.name} keep which copies wait for their reset to themselves"
        notes = inner.call("border_note")
        note = next((note for note in notes if note is not None), None)
        return None if note is None else f"{self.name}: the state of the environment cannot be had ({note})"

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future, as plain data; to be loaded where ``resume_note`` is ``None``."""
        inner = self.env.unwrapped
        vector = {name: getattr(inner, name) for name in _VECTOR_STATE} if isinstance(inner, SyncVectorEnv) else {}
        return {"copies": list(inner.call("border_state")), "vector": read_plain(vector, self.name)}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an environment that was built in the same way.

        Raises:
            ValueError: another number of copies, or an environment with other attributes.
        """
        if len(values["copies"]) != self.num_envs:
            raise ValueError(f"{self.name}: expected {len(values['copies'])} copies as saved, got {self.num_envs}")
        inner = self.env.unwrapped
        inner.call("load_border_state", values["copies"])
        vector = write_plain(values["vector"], self.name)
        for name, value in vector.items():
            setattr(inner, name, value)
        if vector:
            concatenate(inner.single_observation_space, inner._env_obs, inner._observations)
            store(self._obs, inner._observations)

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
    single = make if callable(make) else lambda: _made(make, env_kwargs)
    vector = AsyncVectorEnv if asynchronous else SyncVectorEnv
    # The adapter copies once into its own buffers; a second copy inside the vector environment would be waste.
    mode = as_autoreset_mode(autoreset_mode, where="from_gymnasium")
    with shielded():
        try:
            env = vector(borders_of(single, num_envs), copy=False, autoreset_mode=mode)
        except TypeError as error:
            if "dynamic shape" not in str(error):
                raise
            raise ValueError(
                "expected an observation space of a fixed shape, got one that processes cannot share: "
                f"{str(error).partition(' has a dynamic')[0].removeprefix('As ')}; make it a Box, or a Dict of boxes"
            ) from error
    if not asynchronous and len({id(copy.unwrapped) for copy in env.envs}) < num_envs:
        raise ValueError(
            f"expected a function that makes a new environment at every call, got {num_envs} times the same "
            f"{env.envs[0].env}; build it inside the function"
        )
    made = GymnasiumEnv(env, device=device)
    made._bordered = True
    return made


def _made(id: str, options: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(id, **options)
    except (
        KeyError,
        IndexError,
        AttributeError,
        AssertionError,
        TypeError,
    ) as error:  # what environments say of options
        if not options:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{id}: expected options that the environment takes, got {options}: {type(error).__name__}: {error}"
        ) from error
