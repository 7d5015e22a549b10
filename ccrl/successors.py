"""What lies after every row of a rollout: the observation that came next, or the last one of an episode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import tree_map

__all__ = ["Successors"]


@dataclass(frozen=True)
class Successors:
    """What lies after every row, without storing observations twice.

    ``stream`` is ``[T+1, N, ...]``; ``rows`` ``[M, ...]`` are final observations, ``slot`` ``[T, N]`` int64 says which
    row follows a step (-1: simply ``stream[t+1]``; -2: unknown, the environment hides it, the state itself stands in).
    """

    stream: Tree
    rows: Tree
    slot: Tensor

    def values(self, fn: Callable[[Tree], Tensor]) -> tuple[Tensor, Tensor]:
        steps, width = self.slot.shape
        flat = tree_map(lambda x: x.reshape(-1, *x.shape[2:]), self.stream)
        stream = fn(flat)
        stream = stream.reshape(steps + 1, width, *stream.shape[1:])
        value, after = stream[:-1], stream[1:]
        final = fn(self.rows) if _rows(self.rows) else None
        return value, self.patch(after, value, final)

    def obs(self) -> Tree:
        if isinstance(self.stream, dict):
            assert isinstance(self.rows, dict)
            return {k: self.patch(v[1:], v[:-1], self.rows[k]) for k, v in self.stream.items()}
        assert isinstance(self.rows, Tensor)
        return self.patch(self.stream[1:], self.stream[:-1], self.rows)

    def patch(self, after: Tensor, here: Tensor, final: Tensor | None) -> Tensor:
        """``after [T, N, ...]`` (of the next rows) with ``final [M, ...]`` (of ``rows``) where an episode ended, and
        ``here`` (of the rows themselves) where the environment hides its end."""
        slot = self.slot.reshape(*self.slot.shape, *(1,) * (after.dim() - 2))
        out = torch.where(slot == -2, here, after)
        if final is None or not final.shape[0]:
            return out
        picked = final.index_select(0, self.slot.clamp_min(0).flatten()).reshape(after.shape)
        return torch.where(slot >= 0, picked, out)


def _rows(tree: Tree) -> int:
    first = next(iter(tree.values())) if isinstance(tree, dict) else tree
    return first.shape[0]
