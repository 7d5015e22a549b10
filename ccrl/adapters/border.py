"""The border between one Gymnasium environment and everything that keeps what it returned."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ccrl.adapters.plain_state import load_plain_state, plain_state

__all__ = ["Border", "ReusedArrays", "borders_of", "check_arrays", "put_borders"]


class Border(gymnasium.Wrapper[Any, Any, Any, Any]):  # type: ignore[misc]
    """The outermost wrapper of a copy.

    * Observations and infos are copied. An environment may write each observation into one array; Gymnasium's and SB3's
      vector environments keep a reference to the last observation over the reset and would hand out the next
      episode's first one in its place.
    * Results are checked before they are cast: the text ``"False"`` is true, ``"1.0"`` is a number, and observations of
      another shape fail far from where they were made.
    * Its state can be taken and put back, see :func:`ccrl.adapters.plain_state.plain_state`.

    Args:
        env: one environment, with or without wrappers.
        index: its place among the copies.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], index: int = 0) -> None:
        super().__init__(env)
        self.index = index
        inner = env.unwrapped
        self.label = f"{type(inner).__name__} ({env.spec.id})" if env.spec is not None else type(inner).__name__
        for name in ("observation_space", "action_space"):
            if not isinstance(space := getattr(env, name, None), spaces.Space):
                raise TypeError(f"{self.label}: expected a space of gymnasium.spaces as {name}, got {space!r}")
        _check_arguments(self.label, inner)
        if inner is not env:  # wrappers in between would fail at unpacking, without a name
            _probe(inner, "reset", functools.partial(_checked_reset, self.label))
            _probe(inner, "step", functools.partial(_checked_step, self.label))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Raises:
        ValueError: no pair of an observation of the space and a dict.
        """
        obs, info = _checked_reset(self.label, self.env.reset(seed=seed, options=options))
        return _copied(obs, self.env.observation_space, f"{self.label}: reset()"), dict(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Raises:
        ValueError: other than five values, or a reward, flag or observation of another kind.
        """
        obs, reward, terminated, truncated, info = _checked_step(self.label, self.env.step(action))
        if reward.__class__ is not float:
            reward = _number(reward, self.label)
        if terminated.__class__ is not bool:
            terminated = _flag(terminated, "terminated", self.label)
        if truncated.__class__ is not bool:
            truncated = _flag(truncated, "truncated", self.label)
        obs = _copied(obs, self.env.observation_space, f"{self.label}: step()")
        return obs, reward, terminated, truncated, dict(info)

    def border_note(self) -> str | None:
        """Why the state of this copy cannot be had, ``None`` where it can."""
        return plain_state(self.env)[1]

    def border_state(self) -> dict[str, Any]:
        """Its state as plain data."""
        return plain_state(self.env)[0]

    def load_border_state(self, states: list[dict[str, Any]]) -> None:
        """Put back the own one of all copies' states (processes of Gymnasium are called with equal arguments)."""
        load_plain_state(self.env, states[self.index])


class ReusedArrays:
    """Warns, once, where an environment seems to write all observations into one array and a vector environment kept a
    reference to it over the reset. For environments inside processes, where no :class:`Border` can be put."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._suspects, self._done = 0, False

    def check(self, obs: Any, final_obs: Any, rows: NDArray[Any]) -> None:
        """Of the copies ``rows`` an episode ended. An environment may end where it starts, now and then."""
        if self._done:
            return
        for row in rows.tolist():
            same = _same_row(obs, final_obs, row)
            self._suspects = self._suspects + 1 if same else 0
            self._done = self._done or not same
        if self._suspects >= 3:
            self._done = True
            warnings.warn(
                f"{self.name}: the last observation of {self._suspects} episodes equals the first one of the next; if "
                "the environment writes its observations into one array, let it return copies, or build it with "
                "ccrl.adapters.from_gymnasium, which copies them",
                stacklevel=3,
            )


def _same_row(obs: Any, final_obs: Any, row: int) -> bool:
    if isinstance(obs, dict):
        return all(_same_row(obs[key], final_obs[key], row) for key in obs)
    return bool((obs[row] == final_obs[row]).all())


def check_arrays(where: str, num_envs: int, numbers: dict[str, Any], flags: dict[str, Any]) -> None:
    """What a vector environment returned in its first step, before it is broadcast or cast without a word.

    Raises:
        ValueError: another shape than ``[N]``, or another type than numbers or bool.
    """
    for name, array in (numbers | flags).items():
        found, expected = np.asarray(array), "bool" if name in flags else "numbers"
        if found.shape != (num_envs,) or found.dtype.kind not in ("b" if name in flags else "fiub"):
            raise ValueError(
                f"{where}: expected {name} of shape ({num_envs},) in {expected}, got {found.dtype} of shape "
                f"{found.shape}; mend the environment"
            )


def put_borders(envs: list[Any]) -> None:
    """Put each environment of a list of single ones into a :class:`Border`, in place."""
    envs[:] = [env if isinstance(env, Border) else Border(env, index) for index, env in enumerate(envs)]


def borders_of(make: Callable[[], gymnasium.Env[Any, Any]], num_envs: int) -> list[Callable[[], Border]]:
    """``num_envs`` functions that make an environment each, inside a :class:`Border`."""
    return [lambda index=index: Border(make(), index) for index in range(num_envs)]  # type: ignore[misc]


def _probe(inner: Any, name: str, check: Callable[[Any], Any]) -> None:
    """The first call of a method of the innermost environment is checked; then the method is as it was."""
    method = getattr(inner, name)

    def first(*args: Any, **kwargs: Any) -> Any:
        if name in vars(inner):
            delattr(inner, name)
        return check(method(*args, **kwargs))

    if name not in vars(inner):
        setattr(inner, name, first)


def _check_arguments(label: str, inner: Any) -> None:
    try:
        inspect.signature(inner.reset).bind(seed=None, options=None)
    except TypeError:
        raise ValueError(
            f"{label}: expected reset(self, *, seed=None, options=None), got reset{inspect.signature(inner.reset)}; "
            "take both, and call super().reset(seed=seed)"
        ) from None
    except ValueError:  # compiled, without a signature
        pass


def _checked_reset(label: str, result: Any) -> tuple[Any, Mapping[str, Any]]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise ValueError(
            f"{label}: expected (observation, info) from reset(), got {_told(result)}; return the observation and a "
            "dict, as Gymnasium's environments do since version 0.26"
        )
    return result


def _checked_step(label: str, result: Any) -> tuple[Any, Any, Any, Any, Mapping[str, Any]]:
    if not (isinstance(result, tuple | list) and len(result) == 5 and isinstance(result[4], Mapping)):
        old = "; split done into terminated (the task is over) and truncated (a time limit)"
        raise ValueError(
            f"{label}: expected (observation, reward, terminated, truncated, info) from step(), got {_told(result)}"
            f"{old if isinstance(result, tuple) and len(result) == 4 else '; mend the environment'}"
        )
    return result  # type: ignore[return-value]


def _number(value: Any, label: str) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiub":
        raise ValueError(
            f"{label}: expected a number as reward from step(), got {_told(value)}; mend the environment, or wrap it "
            "(gymnasium.wrappers.TransformReward)"
        )
    return float(array.reshape(()))


def _flag(value: Any, name: str, label: str) -> bool:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf" or array.reshape(()) not in (0, 1):
        raise ValueError(
            f"{label}: expected True or False as {name} from step(), got {_told(value)}, which counts as "
            f"{'true' if _truth(value) else 'false'} in Python; mend the environment"
        )
    return bool(array.reshape(()))


def _truth(value: Any) -> bool:
    try:
        return bool(value)
    except ValueError:  # of an array with several elements
        return True


def _copied(obs: Any, space: gymnasium.Space[Any], where: str) -> Any:
    """An observation that later steps do not change, as the space has it.

    Raises:
        ValueError: another shape, a missing key, or numbers that the type of the space cannot hold.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, Mapping) or not space.spaces.keys() <= obs.keys():
            got = sorted(map(str, obs)) if isinstance(obs, Mapping) else _told(obs)
            raise ValueError(f"{where}: expected an observation with the keys {sorted(space.spaces)}, got {got}")
        return {key: _copied(obs[key], leaf, f"{where}, observation {key!r}") for key, leaf in space.spaces.items()}
    if space.shape is None or space.dtype is None:
        return obs
    array: NDArray[Any] = np.array(obs)
    if array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
        whole = array.dtype.kind in "iu" and np.dtype(space.dtype).kind in "iu"  # Python's integers have 64 bits
        if array.shape != space.shape or not whole:
            raise ValueError(
                f"{where}: expected an observation of shape {space.shape} and {np.dtype(space.dtype)}, as its space "
                f"says, got {_told(obs)}; mend the environment or its space"
            )
    return array.astype(space.dtype, copy=False)


def _told(value: Any) -> str:
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} values"
    if isinstance(value, np.ndarray):
        return f"shape {value.shape} and {value.dtype}"
    return f"a {type(value).__name__}"
