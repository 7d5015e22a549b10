"""Windows of consecutive rows of a data set: sequences for diffusion and recurrent policies."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ccrl.data import Batching, Data
from ccrl.offline.dataset import Array, Dataset

__all__ = ["Windows", "select_windows", "valid_windows"]


def valid_windows(done: Array, length: int) -> NDArray[np.int64]:
    """Starts of windows of ``length`` rows whose first ``length - 1`` rows do not end an episode (``done [M]``)."""
    if length < 1:
        raise ValueError(f"windows: expected a length >= 1, got {length}")
    count = len(done) - length + 1
    if count < 1:
        return np.zeros(0, np.int64)
    before = np.r_[0, np.cumsum(np.asarray(done, dtype=np.int64))]
    starts = np.arange(count)
    found: NDArray[np.int64] = starts[before[starts + length - 1] == before[starts]]
    return found


def select_windows(terminated: Array, truncated: Array, length: int, stride: int = 1) -> NDArray[np.int64]:
    """Starts of windows as Policy-Guided Diffusion takes them (Jackson et al. 2024, their code).

    Every ``stride``-th of the valid ones, and those at the start of an episode, and those that end in a terminal, but
    none that ends in a time-out: a model of rows must not learn that episodes stop there.
    """
    if stride < 1:
        raise ValueError(f"windows: expected a stride >= 1, got {stride}")
    terminated, truncated = (np.asarray(x, dtype=bool) for x in (terminated, truncated))
    done = terminated | truncated
    valid = valid_windows(done, length)
    first = np.r_[True, done[:-1]]
    last = valid + length - 1
    chosen = (np.arange(len(valid)) % stride == 0) | first[valid] | terminated[last]
    found: NDArray[np.int64] = valid[chosen & ~(truncated & ~terminated)[last]]
    return found


class Windows:
    """A full ring of windows ``[T, B]``: rows are gathered from the flat data at the draw, so windows that overlap cost
    no memory.

    :param starts: the first row of every window; None: every window inside an episode.
    :raises ValueError: no window of that length.
    """

    def __init__(
        self,
        data: Dataset,
        length: int,
        starts: NDArray[np.int64] | None = None,
        device: torch.device | str = "cpu",
        **replaced: Array,
    ) -> None:
        ends = np.r_[np.diff(data.episode) > 0, True]
        starts = valid_windows(ends, length) if starts is None else starts
        if not len(starts):
            raise ValueError(f"{data.name}: expected an episode of at least {length} rows, found none; shorten windows")
        self.length, self.device = length, torch.device(device)
        columns = data.columns() | replaced
        self._columns = {k: torch.as_tensor(v, device=self.device) for k, v in columns.items()}
        self._columns["alive"] = (~self._columns["terminated"]).float()
        self.starts = torch.as_tensor(starts, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, windows: Tensor) -> dict[str, Tensor]:
        """Columns ``[T, B, ...]`` of the windows with these numbers ``[B]``."""
        steps = torch.arange(self.length, device=self.device).unsqueeze(-1)
        rows = steps + self.starts[windows]
        return {k: v[rows] for k, v in self._columns.items()}

    def sample(self, spec: Batching, generator: Generator | None) -> Data:
        """``[T, B]``, uniformly with replacement. :raises ValueError: for another unit than sequences."""
        if spec.unit != "sequence" or spec.size == "full":
            raise ValueError(f"windows: expected Batching('sequence', size=B), got {spec}")
        uniform = torch.rand(int(spec.size), generator=generator, dtype=torch.float64, device=self.device)
        columns = self.take((uniform * len(self)).long())
        valid = torch.ones_like(columns["reward"])
        counts = {"valid": valid, "n_valid": valid.sum(), "n_sequences": valid.new_tensor(float(spec.size))}
        data = Data(columns | counts, raw=frozenset(counts), scalars=frozenset({"n_valid", "n_sequences"}))
        data.microbatch = spec.microbatch
        return data
