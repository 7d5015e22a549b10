"""A batched environment from three functions: how episodes start, how a state changes, what is seen of it.

:class:`TorchEnv` adds the rest once: autoreset in all three modes, the last observation of an episode, time limits,
seeds, saving and restoring, and the checks of what the three functions return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, StepResult, StepRows, Tree, as_autoreset_mode, check_device
from ccrl.seeding import restore_generator, stream_seed
from ccrl.settings import Count, checked

__all__ = ["Array", "TorchEnv"]

Array = Any
"""A tensor or a flat dict of tensors (of NumPy arrays in subclasses that override how arrays go in and out)."""

_MEMORY = ("state", "steps", "terminated", "truncated", "obs")
_NO_LIMIT = 2**62


class TorchEnv:
    """``num_envs`` copies of one task on any device; a :class:`ccrl.batched_env.BatchedEnv`.

    A task is a subclass with two spaces and the methods :meth:`initial`, :meth:`transition` and, where the observation
    is not the state itself, :meth:`observe`. All are pure functions of whole batches: they write nothing in place and
    read nothing back to the host, so that a step on a GPU never waits for it and can be compiled. An environment draws
    from a generator of its own alone. Each draw is made for all copies, whichever of them need it, so what a copy draws
    does not depend on when the others' episodes end.

    The first ``reset`` and the first ``step`` check what the methods return against the spaces; later ones do not.
    Discrete actions are not checked against the range of the space: the host would have to wait for the device.

    In ``DISABLED`` mode a finished copy stays as it is: ``step`` repeats its last observation and flags with reward 0
    until ``reset(mask=...)``.

    Args:
        num_envs: number of copies ``N``.
        device: where the state lives.
        autoreset_mode: see :class:`ccrl.batched_env.BatchedEnv`.
        max_episode_steps: the step that is truncated; ``None`` takes ``default_max_episode_steps`` of the class.
        compile: run the step as one compiled graph: fewer launches on a GPU, for some seconds of start-up. Results
            differ from the others in the last bits.

    Raises:
        ValueError: a number of copies or steps below one, an unknown mode, or a device that is not here.
    """

    id: ClassVar[str] = ""
    """How messages call the task; without one the name of the class."""
    default_max_episode_steps: ClassVar[int | None] = None
    """Time limit of the task; ``None``: episodes end by termination alone."""

    single_observation_space: Space[Any]
    single_action_space: Space[Any]
    provides_final_obs: bool

    @checked
    def __init__(
        self,
        num_envs: Count = 1,
        *,
        device: torch.device | str = "cpu",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: Count | None = None,
        compile: bool = False,
    ) -> None:
        self.name = self.id or type(self).__name__
        limit = self.default_max_episode_steps if max_episode_steps is None else max_episode_steps
        self.num_envs = num_envs
        self.device = check_device(device)
        self.autoreset_mode = as_autoreset_mode(autoreset_mode, where=self.name)
        self.provides_final_obs = self.autoreset_mode == AutoresetMode.SAME_STEP
        self.max_episode_steps = limit
        self._limit = _NO_LIMIT if limit is None else min(limit, _NO_LIMIT)
        self._generator = torch.Generator(self.device)
        self._generator.seed()
        self._noise_generator = torch.Generator(self.device)
        self._noise_generator.seed()
        self._advance: Callable[..., tuple[tuple[Array, ...], Array, Array | None]] = self._whole_step
        if compile:
            self._advance = torch.compile(self._whole_step, fullgraph=True, dynamic=False)
        self._memory: tuple[Array, ...] = ()  # what _MEMORY names; () before the first reset
        self._checked = False

    # What a task defines. A state is a tensor [N, ...] or a flat dict of them.

    def initial(self, generator: torch.Generator, n: int) -> Array:
        """States ``[n, ...]`` at the start of ``n`` episodes, on ``self.device``, with all random numbers from
        ``generator``."""
        raise NotImplementedError

    def transition(self, state: Array, action: Tensor, noise: Array | None) -> tuple[Array, Tensor, Tensor]:
        """One step: the successor states, shaped as ``state``; the reward ``[N]``; and whether the task ended, ``[N]``
        bool (time limits do not count). ``action`` is ``[N, *shape]`` as the action space says (float32 of a ``Box``,
        which may lie outside of it; int64 otherwise) and ``noise`` what :meth:`draw_noise` returned. In ``DISABLED``
        mode also called, in vain, on states of copies that have finished."""
        raise NotImplementedError

    def observe(self, state: Array) -> Tree:
        """Observations ``[N, ...]`` of states, or a dict of them for a ``Dict`` space; the state itself by default."""
        observation: Tree = state
        return observation

    def observe_initial(self, state: Array) -> Tree:
        """Observations of initial states, where those are seen in another way."""
        return self.observe(state)

    def draw_noise(self, generator: torch.Generator, n: int) -> Array | None:
        """The random numbers ``[n, ...]`` of one step; ``None`` for a task without. Drawn outside of ``transition``,
        which may be compiled."""
        return None

    # The protocol.

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """Start episodes everywhere, or where ``mask`` ``[N]`` bool is set. Returns the observations ``[N, ...]``.

        Raises:
            ValueError: ``mask`` of another shape or type, or given at the very first reset; observations that are not
                those of the space.
        """
        if mask is not None and (mask.shape != (self.num_envs,) or mask.dtype != torch.bool):
            raise ValueError(
                f"{self.name}: mask must be bool of shape ({self.num_envs},), got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        if mask is not None and not self._memory:
            raise ValueError(f"{self.name}: the first reset starts every copy; call reset() without a mask once")
        if seed is not None:
            self._generator.manual_seed(stream_seed(seed, "initial states"))
            self._noise_generator.manual_seed(stream_seed(seed, "steps"))
        return self._start(self.initial(self._generator, self.num_envs), mask)

    def _start(self, state: Array, mask: Tensor | None) -> Tree:
        """Episodes begin in these states, everywhere or where ``mask`` ``[N]`` bool is set; the observations."""
        steps = self._inward(torch.zeros(self.num_envs, dtype=torch.int64, device=self.device))
        if not self._checked:
            _map(self._outward, state)
        # copied, because an observation can be the state itself, which callers must not be able to change
        obs = self._copied(self._float32(self.observe_initial(state)))
        fresh = (state, steps, steps != 0, steps != 0, obs)
        if mask is None:
            if not self._checked:
                self._check_obs(self._obs_outward(obs))
            self._memory = fresh
        else:
            chosen = self._inward(mask)
            self._memory = tuple(self._where(chosen, new, old) for new, old in zip(fresh, self._memory))
        return self._obs_outward(self._memory[4])

    def step(self, action: Tensor) -> StepResult:
        """One step of every copy: ``action`` is ``[N, *shape]``, floating-point (``Box``) or integers.

        Raises:
            ValueError: an action of another shape or kind, or, in the first step, what :meth:`transition` returned.
            RuntimeError: no reset yet.
        """
        reward, final_obs = self._take(action)
        return self._result(reward, final_obs)

    def step_into(self, action: Tensor, rows: StepRows) -> dict[str, Any]:
        """``step``, written into ``rows``."""
        self._store(*self._take(action), rows)
        return {}

    def _take(self, action: Tensor) -> tuple[Array, Array | None]:
        """Advance the memory by one step; the reward, and the last observations where episodes may have ended."""
        if not self._memory:
            raise RuntimeError(f"{self.name}: call reset() before step()")
        shape = (self.num_envs, *(self.single_action_space.shape or ()))
        real = isinstance(self.single_action_space, spaces.Box)
        if action.shape != shape or action.is_floating_point() != real:
            raise ValueError(
                f"{self.name}: expected {'floating-point' if real else 'integer'} actions of shape {shape}, got "
                f"{action.dtype} of shape {tuple(action.shape)}"
            )
        rows = self._action_inward(action.detach())
        disabled = self.autoreset_mode == AutoresetMode.DISABLED
        fresh = self._memory[0] if disabled else self.initial(self._generator, self.num_envs)
        noise = self.draw_noise(self._noise_generator, self.num_envs)
        if not self._checked:
            self._check_transition(self._memory[0], rows, noise)
            self._checked = True
        self._memory, reward, final_obs = self._advance(self._memory, rows, fresh, noise)
        return reward, final_obs

    def _result(self, reward: Array, final_obs: Array | None) -> StepResult:
        _, _, terminated, truncated, obs = self._memory
        return StepResult(
            self._obs_outward(obs),
            self._outward(reward),
            self._outward(terminated),
            self._outward(truncated),
            None if final_obs is None else self._obs_outward(final_obs),
        )

    def _store(self, reward: Array, final_obs: Array | None, rows: StepRows) -> None:
        rows.write(self._result(reward, final_obs))

    def close(self) -> None:
        """Nothing to release."""

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future, as tensors: a copy that loads it continues bit for bit.

        Raises:
            RuntimeError: no reset yet.
        """
        if not self._memory:
            raise RuntimeError(f"{self.name}: there is no state before the first reset()")
        values = {name: _map(lambda x: self._outward(x).clone(), x) for name, x in zip(_MEMORY, self._memory)}
        streams = {"generator": self._generator, "noise_generator": self._noise_generator}
        return values | {name: stream.get_state() for name, stream in streams.items()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an environment of the same task, size and types.

        Raises:
            ValueError: the state belongs to another task, number of copies or dtype.
        """
        expected = _map(self._outward, self.initial(torch.Generator(self.device), self.num_envs))
        if _kinds(values["state"]) != _kinds(expected):
            raise ValueError(
                f"{self.name}: expected a state of {_told(expected)}, got {_told(values['state'])}; build the "
                "environment with the same id, num_envs and dtype"
            )
        self._memory = tuple(
            _map(lambda x: self._inward(x.to(self.device, copy=True)), values[name]) for name in _MEMORY
        )
        restore_generator(self._generator, values["generator"])
        restore_generator(self._noise_generator, values["noise_generator"])

    # How arrays go in and out; a subclass that computes with other arrays overrides these.

    def _inward(self, tensor: Tensor) -> Array:
        return tensor

    def _outward(self, array: Array) -> Tensor:
        if not isinstance(array, Tensor):
            raise TypeError(
                f"{self.name}: expected tensors from its functions, got {type(array).__name__} (initial()?)"
            )
        return array

    def _action_inward(self, action: Tensor) -> Array:
        return action.float() if action.is_floating_point() else action

    def _obs_outward(self, obs: Array) -> Tree:
        observation: Tree = obs
        return observation

    def _where(self, mask: Array, chosen: Array, other: Array) -> Array:
        """``chosen`` in the copies where ``mask`` ``[N]`` is set, ``other`` elsewhere."""
        if isinstance(chosen, dict):
            return {name: self._where(mask, value, other[name]) for name, value in chosen.items()}
        return torch.where(mask.view(-1, *[1] * (chosen.dim() - 1)), chosen, other)

    def _is_nowhere(self, mask: Array) -> bool:
        """Whether ``mask`` ``[N]`` is nowhere set, where the host knows without waiting; else False."""
        return False

    def _float32(self, values: Array) -> Array:
        """Floating-point numbers of an observation or a reward in float32; integers as they are."""
        return _map(lambda x: x.float() if x.is_floating_point() else x, values)

    def _copied(self, values: Array) -> Array:
        return _map(torch.clone, values)

    # Inside.

    def _whole_step(
        self, memory: tuple[Array, ...], action: Array, fresh: Array, noise: Array | None
    ) -> tuple[tuple[Array, ...], Array, Array | None]:
        """The whole step as one pure function. ``fresh`` are initial states, drawn for every copy since the host does
        not know which ones it will need."""
        where = self._where
        state, steps, was_terminated, was_truncated, obs = memory
        successor, reward, terminated = self.transition(state, action, noise)
        successor_obs = self._float32(self.observe(successor))
        taken = steps + 1
        truncated = taken >= self._limit

        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            done = terminated | truncated
            if self._is_nowhere(done):
                # not the observation itself, which may be the state: callers must not be able to change that
                kept = (successor, taken, terminated, truncated)
                return (*kept, self._copied(successor_obs)), self._float32(reward), successor_obs
            first_obs = self._float32(self.observe_initial(fresh))
            kept = (where(done, fresh, successor), taken * ~done, terminated, truncated)
            return (*kept, where(done, first_obs, successor_obs)), self._float32(reward), successor_obs

        ended = was_terminated | was_truncated
        reward = self._float32(where(~ended, reward, 0.0))
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            first_obs = self._float32(self.observe_initial(fresh))
            kept = (where(ended, fresh, successor), taken * ~ended, terminated & ~ended, truncated & ~ended)
            return (*kept, where(ended, first_obs, successor_obs)), reward, None

        flags = (where(ended, was_terminated, terminated), where(ended, was_truncated, truncated))
        kept = (where(ended, state, successor), where(ended, steps, taken), *flags)
        return (*kept, where(ended, obs, successor_obs)), reward, None

    def _check_obs(self, obs: Tree) -> None:
        """Raises:
        ValueError: observations of another structure, shape, type or device than the space says.
        """
        space = self.single_observation_space
        leaves: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        found = obs if isinstance(obs, dict) else {"": obs}
        if found.keys() != leaves.keys():
            raise ValueError(f"{self.name}: expected observations {sorted(leaves)}, got {sorted(found)} from observe()")
        for key, leaf in leaves.items():
            dtype = torch.from_numpy(np.zeros((), leaf.dtype)).dtype
            dtype = torch.float32 if dtype.is_floating_point else dtype
            expected = ((self.num_envs, *(leaf.shape or ())), dtype, self.device.type)
            got = (tuple(found[key].shape), found[key].dtype, found[key].device.type)
            if got != expected:
                raise ValueError(
                    f"{self.name}: expected observations{f' {key!r}' if key else ''} of shape, type and device "
                    f"{expected}, got {got}; mend observe() or initial(), or single_observation_space"
                )

    def _check_transition(self, state: Array, action: Array, noise: Array | None) -> None:
        """Raises:
        ValueError: results that ``where`` would broadcast or cast without a word, or arguments written in place.
        """
        before = self._copied(state)
        result = self.transition(state, action, noise)
        if not isinstance(result, tuple) or len(result) != 3:
            got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
            raise ValueError(f"{self.name}: expected (state, reward, terminated) from transition(), got {got}")
        successor, reward, terminated = result
        if _kinds(successor) != _kinds(state):
            raise ValueError(
                f"{self.name}: expected successors of {_told(state)} from transition(), got {_told(successor)}"
            )
        for name, value in (("reward", reward), ("terminated", terminated)):
            if getattr(value, "shape", None) != (self.num_envs,):
                raise ValueError(
                    f"{self.name}: expected {name} of shape ({self.num_envs},) from transition(), got {_told(value)}"
                )
        if str(terminated.dtype).removeprefix("torch.") != "bool":
            raise ValueError(f"{self.name}: expected terminated in bool from transition(), got {terminated.dtype}")
        old = _leaves(before)  # NaN is not equal to itself
        changed = [key for key, x in _leaves(state).items() if not bool(((x == old[key]) | (x != x)).all())]
        if changed:
            self._memory = (before, *self._memory[1:])
            raise ValueError(
                f"{self.name}: transition() changed the state it was given{f' ({changed})' if changed[0] else ''}; "
                "expected new tensors: write x = x + 1, not x += 1"
            )


def _map(function: Callable[[Any], Any], values: Array) -> Array:
    return {key: function(x) for key, x in values.items()} if isinstance(values, dict) else function(values)


def _leaves(values: Array) -> dict[str, Any]:
    return values if isinstance(values, dict) else {"": values}


def _kinds(values: Array) -> dict[str, Any]:
    return {key: (tuple(getattr(x, "shape", ())), getattr(x, "dtype", type(x))) for key, x in _leaves(values).items()}


def _told(values: Array) -> str:
    kinds = {key: f"shape {shape} and {dtype}" for key, (shape, dtype) in _kinds(values).items()}
    return kinds[""] if kinds.keys() == {""} else str(kinds)
