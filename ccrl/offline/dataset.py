"""A data set: flat transitions whose successors, terminals and time-outs are exact, checked row by row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ccrl.replay import ReplayBuffer

__all__ = ["Array", "DataError", "Dataset"]

Array = NDArray[Any]


class DataError(ValueError):
    """A file or array that is no data set; the message names it, the row and the column."""


@dataclass(frozen=True)
class Dataset:
    """``M`` transitions in the order they happened, episode after episode.

    ``obs, next_obs [M, S]`` and ``action [M, A]`` float32 (discrete actions: int64 ``[M]``), ``reward [M]`` float32,
    ``terminated, truncated [M]`` bool, ``episode [M]`` int64 (does not decrease). ``next_obs`` is the true successor of
    every row; what a file cannot give a successor for is not in the set. A time-out is no terminal: bootstrapping
    reads ``terminated`` alone. A row that ends an episode without either flag is the end of the recording.

    :raises DataError: columns of other lengths or shapes, a number that is not finite, episodes out of order, or a row
        that goes on after its episode has ended.
    """

    obs: Array
    action: Array
    reward: Array
    next_obs: Array
    terminated: Array
    truncated: Array
    episode: Array
    name: str = "dataset"
    scores: tuple[float, float] | None = None
    """Reference returns: of the random policy and of the expert."""
    extra: dict[str, Array] = field(default_factory=dict)
    """More columns of the file, ``[M, ...]``."""

    def __post_init__(self) -> None:
        count = len(self.reward)
        if count == 0:
            raise DataError(f"{self.name}: expected at least one transition, got none")
        forms = {"obs": 2, "next_obs": 2, "reward": 1, "terminated": 1, "truncated": 1, "episode": 1}
        for name, column in self.columns().items():
            if len(column) != count:
                raise DataError(
                    f"{self.name}: column {name!r}: expected {count} rows as 'reward' has, got {len(column)}"
                )
            if name in forms and column.ndim != forms[name]:
                raise DataError(
                    f"{self.name}: column {name!r}: expected {forms[name]} axes, got shape {tuple(column.shape)}"
                )
            check_finite(self.name, name, column)
        if self.obs.shape != self.next_obs.shape:
            raise DataError(
                f"{self.name}: column 'next_obs': expected shape {self.obs.shape} as 'obs' has, got "
                f"{self.next_obs.shape}"
            )
        step = np.diff(self.episode)
        if (step < 0).any():
            row = int(np.flatnonzero(step < 0)[0]) + 1
            raise DataError(
                f"{self.name}: row {row}, column 'episode': expected a number >= {self.episode[row - 1]}, got "
                f"{self.episode[row]}; sort the rows by episode and step"
            )
        ended = (self.terminated | self.truncated)[:-1] & (step == 0)
        if ended.any():
            row = int(np.flatnonzero(ended)[0])
            flag = "terminated" if self.terminated[row] else "truncated"
            raise DataError(
                f"{self.name}: row {row}, column {flag!r}: expected the last row of episode {self.episode[row]}, but "
                "the next row goes on with it; give every episode a number of its own"
            )

    def columns(self) -> dict[str, Array]:
        """All columns by name."""
        names = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "episode")
        return {name: getattr(self, name) for name in names} | self.extra

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def starts(self) -> NDArray[np.int64]:
        """The first row of every episode."""
        return np.flatnonzero(np.r_[True, np.diff(self.episode) > 0])

    def returns(self, gamma: float = 1.0) -> NDArray[np.float64]:
        """Of every episode, discounted by ``gamma`` from its start, ``[E]`` (whether it ended or the recording did)."""
        starts = self.starts
        step = np.arange(len(self)) - np.repeat(starts, np.diff(np.r_[starts, len(self)]))
        found: NDArray[np.float64] = np.add.reduceat(self.reward.astype(np.float64) * gamma**step, starts)
        return found

    def select(self, rows: Array) -> Dataset:
        """The rows of an index or a mask, in order."""
        extra = {k: v[rows] for k, v in self.extra.items()}
        own: dict[str, Any] = {k: v[rows] for k, v in self.columns().items() if k not in extra}
        return replace(self, **own, extra=extra)

    def best(self, share: float, gamma: float = 0.99) -> Dataset:
        """The episodes of the highest discounted returns, ``share`` of them (at least one), in their old order.

        :raises ValueError: a share outside (0, 1].
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"best: expected a share in (0, 1], got {share}")
        returns = self.returns(gamma)
        # .29 of 100 is 28.999999999999996
        kept = np.argsort(-returns, kind="stable")[: max(1, int(share * len(returns) + 1e-9))]
        chosen = np.zeros(len(returns), dtype=bool)
        chosen[kept] = True
        lengths = np.diff(np.r_[self.starts, len(self)])
        return self.select(np.repeat(chosen, lengths))

    def next_action(self) -> tuple[Array, NDArray[np.float32]]:
        """The action that followed every row in its episode ``[M, A]``, and 1 where there was one, else 0 (``[M]``)."""
        follows = np.r_[np.diff(self.episode) == 0, False]
        following = np.where(follows[:, None], np.roll(self.action, -1, axis=0), self.action)
        return following.astype(np.float32), follows.astype(np.float32)

    def ring(self, device: torch.device | str = "cpu", **replaced: Array) -> ReplayBuffer:
        """A full ring of steps on ``device``; ``replaced`` are further columns, or others in place of these."""
        return ReplayBuffer.from_arrays(self.columns() | replaced, device)


def check_finite(where: str, name: str, column: Array) -> None:
    """:raises DataError: naming the first row, and the entry where the column has more than one axis."""
    if column.dtype.kind not in "fiub":
        raise DataError(f"{where}: column {name!r}: expected numbers, got {column.dtype}")
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        place = np.argwhere(~np.isfinite(column))[0]
        entry = f"{name}{[int(i) for i in place[1:]]}" if len(place) > 1 else name
        raise DataError(
            f"{where}: row {int(place[0])}, column {entry!r}: expected a finite number, got {column[tuple(place)]}"
        )
