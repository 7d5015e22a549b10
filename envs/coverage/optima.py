"""Paths of known quality on gridworlds: greedy, a beam, and the optimum of small instances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccrl.wrappers.set_reward import SetReward, SetState
from envs.coverage.grid import GridWorld

__all__ = ["Path", "best_path", "greedy_path"]


class Path(NamedTuple):
    """A path and what it is worth."""

    value: float
    """``F`` of its cells."""
    cells: list[int]
    """All of them, the start first."""
    exact: bool
    """Whether no path of the same length is worth more."""


def greedy_path(env: SetReward) -> Path:
    """The next move is always the one of the largest marginal gain; the first in the order of the actions among equal
    ones."""
    return _search(env, 1)._replace(exact=False)


def best_path(env: SetReward, width: int = 100_000) -> Path:
    """The best path of ``max_episode_steps`` moves from the start, over sets of states that can still differ.

    After every move only the best path to each pair of a cell and a set is kept. As long as these are at most ``width``
    the search is exact; from there on it is a beam of the ``width`` paths worth most, whose result is a lower bound.

    Raises:
        ValueError: a width below 1, an environment without a fixed start, or with random moves.
    """
    if width < 1:
        raise ValueError(f"best_path: expected width >= 1, got {width}")
    return _search(env, width)


def _search(env: SetReward, width: int) -> Path:
    world, function = env.env, env.function
    if not isinstance(world, GridWorld) or world.start is None or world.stochasticity > 0.0:
        raise ValueError("expected a SetReward around a GridWorld with a fixed start and stochasticity 0")
    assert world.max_episode_steps is not None
    cell = torch.tensor([world.start], device=world.device)
    empty = function.initial(1)
    value = function.gain(empty, cell).double()
    state, paths, exact = function.insert(empty, cell), cell.unsqueeze(1), True
    for _ in range(world.max_episode_steps):
        count, actions = len(cell), world.moves.shape[1]
        parent = torch.arange(count, device=cell.device).repeat_interleave(actions)
        cell = world.moves[cell].flatten()
        state = _take(state, parent)
        value = value[parent] + function.gain(state, cell)
        state = function.insert(state, cell)
        paths = torch.cat([paths[parent], cell.unsqueeze(1)], 1)
        kept = _distinct(function, state, cell, value) if width > 1 else torch.arange(len(cell), device=cell.device)
        if len(kept) > width:
            # stable, so that equal paths are taken in the order of the actions
            kept = kept[value[kept].sort(descending=True, stable=True).indices[:width]]
            exact = False
        cell, value, state, paths = cell[kept], value[kept], _take(state, kept), paths[kept]
    best = int(value.argmax())
    return Path(float(value[best]), paths[best].tolist(), exact)


def _distinct(function: Any, state: SetState, cell: Tensor, value: Tensor) -> Tensor:
    """Rows, one of the largest value for every pair of cell and set."""
    key = torch.cat([cell.unsqueeze(1).double(), function.key(state).double()], 1)
    order = value.sort(descending=True, stable=True).indices
    _, group = torch.unique(key[order], dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(order), device=cell.device)
    first = first.scatter_reduce(0, group, torch.arange(len(order), device=cell.device), "amin")
    return order[first].sort().values


def _take(state: SetState, rows: Tensor) -> SetState:
    return {name: x.index_select(0, rows) for name, x in state.items()}
