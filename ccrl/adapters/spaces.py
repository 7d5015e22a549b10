"""What the adapters share: which spaces are supported, and how observations and actions cross between NumPy and torch.

Supported observations: ``Box``, ``Discrete`` and a flat ``Dict`` of them. Supported actions: ``Box`` and ``Discrete``.
Floating-point observations become float32, integers keep their type, and each is copied once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from torch import Tensor

from ccrl.batched_env import Tree

__all__ = ["action_array", "batch_buffer", "check_action_space", "float32_space", "numpy_act", "store", "to_numpy"]


def float32_space(space: Space[Any], *, where: str, nested: bool = False) -> Space[Any]:
    """The space of the tensors made from ``space``: the same, with floating-point boxes in float32.

    Raises:
        TypeError: a space that is not supported.
    """
    if isinstance(space, spaces.Dict) and not nested:
        return spaces.Dict({key: float32_space(leaf, where=where, nested=True) for key, leaf in space.spaces.items()})
    if isinstance(space, spaces.Discrete):
        return space
    if isinstance(space, spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            return space
        return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    raise TypeError(
        f"{where}: expected observations from a Box, a Discrete or a flat Dict of these, got {space}; wrap the "
        "environment (gymnasium.wrappers.FlattenObservation turns most spaces into a Box)"
    )


def check_action_space(space: Space[Any], *, where: str) -> None:
    """Raises:
    TypeError: neither ``Box`` nor ``Discrete``.
    ValueError: a ``Discrete`` that does not start at 0.
    """
    if not isinstance(space, spaces.Box | spaces.Discrete):
        raise TypeError(
            f"{where}: expected actions from a Box or a Discrete, got {space}; wrap the environment "
            "(gymnasium.wrappers.TransformAction)"
        )
    if isinstance(space, spaces.Discrete) and space.start != 0:
        raise ValueError(f"{where}: expected a Discrete action space that starts at 0, got {space}")


def batch_buffer(space: Space[Any], num_envs: int, device: torch.device) -> Tree:
    """Zeros ``[N, ...]`` for the observations of a space that :func:`float32_space` returned."""
    if isinstance(space, spaces.Dict):
        leaves = {key: batch_buffer(leaf, num_envs, device) for key, leaf in space.spaces.items()}
        return {key: leaf for key, leaf in leaves.items() if isinstance(leaf, Tensor)}
    dtype = torch.from_numpy(np.zeros((), space.dtype)).dtype
    return torch.zeros((num_envs, *(space.shape or ())), dtype=dtype, device=device)


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
        ValueError: another shape, or floating-point numbers for a ``Discrete`` space (or the reverse).
    """
    shape = (num_envs, *(space.shape or ()))
    discrete = isinstance(space, spaces.Discrete)
    if tuple(action.shape) != shape or action.is_floating_point() == discrete:
        raise ValueError(
            f"{where}: expected {'integer' if discrete else 'floating-point'} actions of shape {shape}, got "
            f"{action.dtype} of shape {tuple(action.shape)}"
        )
    return action.detach().cpu().numpy().astype(space.dtype, copy=False)


def numpy_act(
    act: Callable[[Tree], Tensor],
    space: Space[Any],
    observation: NDArray[Any] | dict[str, NDArray[Any]],
    device: torch.device,
) -> NDArray[Any]:
    """Actions in NumPy for one observation of ``space`` or for a batch of them, whichever was given."""
    first: Any = observation
    leaf = space
    if isinstance(observation, dict) and isinstance(space, spaces.Dict):
        key = next(iter(space))
        first, leaf = observation[key], space[key]
    single = np.ndim(first) == len(leaf.shape or ())

    def tensor(x: NDArray[Any]) -> Tensor:
        batch = torch.as_tensor(np.asarray(x)[None] if single else np.asarray(x))
        return batch.to(device, torch.float32 if batch.is_floating_point() else batch.dtype)

    tree: Tree = (
        {k: tensor(v) for k, v in observation.items()} if isinstance(observation, dict) else tensor(observation)
    )
    action: NDArray[Any] = act(tree).cpu().numpy()
    return action[0] if single else action
