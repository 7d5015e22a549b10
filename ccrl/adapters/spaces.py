"""What the adapters share: which spaces are supported, and how observations and actions cross between NumPy and torch.

Supported observations: ``Box``, ``Discrete``, ``MultiDiscrete``, ``MultiBinary`` and a flat ``Dict`` of them; actions:
the same without ``Dict``.
Floating-point observations become float32, integers keep their type, and each is copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from torch import Tensor

from ccrl.batched_env import Tree

__all__ = ["action_array", "batch_buffer", "check_action_space", "check_batch", "float32_space", "numpy_act", "store",
           "to_numpy"]  # fmt: skip


_INTEGERS = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def float32_space(space: Space[Any], *, where: str, nested: bool = False) -> Space[Any]:
    """The space of the tensors made from ``space``: the same, with floating-point boxes in float32.

    Raises:
        TypeError: a space that is not supported.
        ValueError: a ``Discrete`` that does not start at 0, or a space without a number in it.
    """
    if isinstance(space, spaces.Dict) and not nested:
        if not space.spaces:
            raise ValueError(f"{where}: expected at least one observation, got an empty Dict")
        return spaces.Dict({key: float32_space(leaf, where=where, nested=True) for key, leaf in space.spaces.items()})
    if isinstance(space, spaces.Discrete):
        if space.start != 0:  # policies encode 0 .. n - 1: other numbers would all look alike
            raise ValueError(
                f"{where}: expected a Discrete observation that starts at 0, got {space}; subtract its start "
                "(gymnasium.wrappers.TransformObservation)"
            )
        return space
    if isinstance(space, spaces.MultiBinary) or (isinstance(space, spaces.MultiDiscrete) and not space.start.any()):
        return space
    if isinstance(space, spaces.Box):
        if not np.prod(space.shape):
            raise ValueError(f"{where}: expected an observation of at least one number, got {space}")
        if not np.issubdtype(space.dtype, np.floating):
            return space
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    raise TypeError(
        f"{where}: expected observations from a Box, Discrete, MultiDiscrete (from 0), MultiBinary or a flat Dict of "
        f"these, got {space}; wrap the environment (gymnasium.wrappers.FlattenObservation turns most spaces into a Box)"
    )


def check_action_space(space: Space[Any], *, where: str) -> None:
    """Raises:
    TypeError: neither ``Box`` of floating-point numbers nor ``Discrete``, ``MultiDiscrete`` or ``MultiBinary``.
    ValueError: a ``Discrete`` or ``MultiDiscrete`` that does not start at 0, or a ``Box`` without numbers.
    """
    if not isinstance(space, (spaces.Box, *_INTEGERS)):
        raise TypeError(
            f"{where}: expected actions from a Box, Discrete, MultiDiscrete or MultiBinary, got {space}; wrap the "
            "environment (gymnasium.wrappers.TransformAction)"
        )
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        # cut to integers on the way to the environment, Gaussian actions would not be those whose density is learnt
        raise TypeError(
            f"{where}: expected actions from a Box of floating-point numbers, got {space}; make the space Discrete, or "
            "a Box of float32 and round inside the environment"
        )
    if isinstance(space, spaces.Box) and not np.prod(space.shape):
        raise ValueError(f"{where}: expected an action of at least one number, got {space}")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete) and np.any(space.start):
        raise ValueError(
            f"{where}: expected an action space that starts at 0, got {space}; wrap the environment: "
            "gymnasium.wrappers.TransformAction(env, lambda a: a + start, the space from 0)"
        )


def batch_buffer(space: Space[Any], num_envs: int, device: torch.device) -> Tree:
    """Zeros ``[N, ...]`` for the observations of a space that :func:`float32_space` returned."""
    if isinstance(space, spaces.Dict):
        leaves = {key: batch_buffer(leaf, num_envs, device) for key, leaf in space.spaces.items()}
        return {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    dtype = torch.from_numpy(np.zeros((), space.dtype)).dtype
    return torch.zeros((num_envs, *(space.shape or ())), dtype=dtype, device=device)


def check_batch(buffer: Tree, value: Any, *, where: str) -> None:
    """A batch of observations as a ``reset`` returned it, before :func:`store` would broadcast what is too small.

    Raises:
        ValueError: another shape than the space has, or a key that is missing.
    """
    for key, leaf in buffer.items() if isinstance(buffer, dict) else [("", buffer)]:
        found = value if not key else value.get(key) if isinstance(value, Mapping) else None
        shape = None if found is None else np.shape(found)
        if shape != tuple(leaf.shape):
            raise ValueError(
                f"{where}: expected {f'observations {key!r}' if key else 'observations'} of shape {tuple(leaf.shape)} "
                f"from reset(), as its observation space says, got {'none' if shape is None else shape}; mend the "
                "environment or its space"
            )


def store(buffer: Tree, value: Any, row: int | None = None) -> None:
    """Copy a batch of observations (or one observation, into ``row``) from NumPy; the cast happens on the way."""
    if isinstance(buffer, dict):
        for key, leaf in buffer.items():
            store(leaf, value[key], row)
    else:
        (buffer if row is None else buffer[row]).copy_(torch.as_tensor(np.asarray(value)))


def to_numpy(tree: Tree) -> Any:
    """A NumPy copy of an observation, which later steps do not change."""
    if isinstance(tree, dict):
        return {key: to_numpy(leaf) for key, leaf in tree.items()}
    return np.array(tree.detach().cpu().numpy())


def action_array(action: Tensor, space: Space[Any], num_envs: int, *, where: str) -> Any:
    """``[N, *shape]`` actions as NumPy numbers of the space's own type.

    Raises:
        ValueError: another shape, or floating-point numbers for a space of integers (or the reverse).
    """
    shape = (num_envs, *(space.shape or ()))
    discrete = isinstance(space, _INTEGERS)
    if tuple(action.shape) != shape or action.is_floating_point() == discrete:
        raise ValueError(
            f"{where}: expected {'integer' if discrete else 'floating-point'} actions of shape {shape}, got "
            f"{action.dtype} of shape {tuple(action.shape)}"
        )
    array = action.detach().cpu().numpy()
    if array.dtype == space.dtype:
        return array
    array = array.astype(space.dtype)
    # rounding may have crossed a bound: 0.3 in float32 is above 0.3 in float64
    return np.clip(array, space.low, space.high) if isinstance(space, spaces.Box) else array


def numpy_act(
    act: Callable[[Tree], Tensor],
    space: Space[Any],
    observation: NDArray[Any] | dict[str, NDArray[Any]],
    device: torch.device,
) -> NDArray[Any]:
    """Actions in NumPy for one observation of ``space`` or for a batch of them, whichever was given.

    Raises:
        ValueError: neither the shape of one observation nor that of a batch, a key that is missing, or NaN.
    """
    nested = isinstance(space, spaces.Dict)
    leaves: dict[str, Space[Any]] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    if nested and not (isinstance(observation, Mapping) and leaves.keys() <= observation.keys()):
        got = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
        raise ValueError(f"observation: expected a dict with the keys {sorted(leaves)}, got {got}")
    arrays = {key: _array(observation[key] if nested else observation, leaf, key) for key, leaf in leaves.items()}
    batched = {array.ndim > len(leaf.shape or ()) for array, leaf in zip(arrays.values(), leaves.values())}
    if len(batched) > 1:
        raise ValueError("observation: expected one observation or a batch, got one of some keys, a batch of others")
    single = batched == {False}

    def tensor(x: NDArray[Any]) -> Tensor:
        batch = torch.as_tensor(x[None] if single else x)
        return batch.to(device, torch.float32 if batch.is_floating_point() else batch.dtype)

    tree: Tree = {key: tensor(x) for key, x in arrays.items()} if nested else tensor(arrays[""])
    action: NDArray[Any] = act(tree).cpu().numpy()
    return action[0] if single else action


def _array(value: Any, space: Space[Any], key: str) -> NDArray[Any]:
    name, shape = f"observation{f' {key!r}' if key else ''}", space.shape or ()
    expected = f"{name}: expected shape {shape} or a batch of shape {('n', *shape)}".replace("'n'", "n")
    if isinstance(value, tuple) and any(isinstance(part, Mapping) for part in value):
        raise ValueError(f"{expected}, got a tuple with a dict; reset() returns the observation and an info: take [0]")
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise TypeError(f"{expected} of numbers, got {array.dtype}")
    if array.ndim - len(shape) not in (0, 1) or array.shape[array.ndim - len(shape) :] != shape:
        raise ValueError(f"{expected}, got {array.shape}")
    if array.dtype.kind == "f" and np.isnan(array).any():  # the actions of a NaN look like others
        raise ValueError(f"{expected} of numbers, got NaN")
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):  # policies would take all others for one state
        count = space.n if isinstance(space, spaces.Discrete) else space.nvec
        if ((array < 0) | (array >= count)).any():
            raise ValueError(f"{name}: expected one of {space}, or a batch of them, got {array.tolist()}")
    return array
