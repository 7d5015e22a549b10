"""A data set on the device as one matrix: many batches are one gather."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from ccrl.batched_env import Tree
from ccrl.data import Batching, Data
from ccrl.replay import ReplayBuffer

__all__ = ["PackedRows"]

_AHEAD = 64
"""Batches that are drawn at a time."""


class PackedRows:
    """The rows of a full ring of vectors, all columns side by side as float32, for learners that read one batch after
    another: a draw per column and step costs a small network a tenth of its time.

    Batches have the columns ``names`` of the ring, ``[1, B, ...]``, drawn uniformly with replacement.

    :raises ValueError: a column that is no vector or number per row.
    """

    def __init__(self, ring: ReplayBuffer, names: tuple[str, ...]) -> None:
        rows = ring.rows()
        parts: list[Tensor] = []
        self._widths: list[int] = []
        self._flat: list[bool] = []
        for name in names:
            column = rows[name]
            if not isinstance(column, Tensor) or column.dim() > 2:
                raise ValueError(f"PackedRows: {name!r}: expected a number or a vector per row")
            self._flat.append(column.dim() == 1)
            parts.append(column.float().reshape(len(column), -1))
            self._widths.append(parts[-1].shape[1])
        self.names, self.table = names, torch.cat(parts, 1)
        self._counted: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.table)

    def sample(self, spec: Batching, generator: Generator | None) -> Data:
        """One batch."""
        return next(self.batches(spec, 1, generator))

    def batches(self, spec: Batching, count: int, generator: Generator | None) -> Iterator[Data]:
        """``count`` batches. :raises ValueError: for another unit than transitions, or size "full"."""
        if spec.unit != "transition" or spec.size == "full":
            raise ValueError(f"replay: expected Batching('transition', size=B), got {spec}")
        size, device = int(spec.size), self.table.device
        for start in range(0, count, _AHEAD):
            number = min(_AHEAD, count - start)
            index = torch.randint(len(self.table), (number * size,), generator=generator, device=device)
            drawn = self.table.index_select(0, index).view(number, 1, size, -1)
            for batch in drawn.unbind():
                columns: dict[str, Tree] = {
                    name: part.squeeze(-1) if flat else part
                    for name, part, flat in zip(self.names, batch.split(self._widths, -1), self._flat)
                }
                data = Data({**columns, **self._counts(size)}, raw=frozenset({"valid", "n_valid"}), scalars=_SCALARS)
                data.microbatch = spec.microbatch
                yield data

    def _counts(self, size: int) -> dict[str, Tensor]:
        if size not in self._counted:
            valid = torch.ones((1, size), device=self.table.device)
            self._counted[size] = {"valid": valid, "n_valid": valid.sum()}
        return self._counted[size]


_SCALARS = frozenset({"n_valid"})
