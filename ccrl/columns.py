"""Which columns of a batch a function reads: compiled and vectorised code takes only those along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import Data

__all__ = ["columns_read"]


def columns_read(fn: Callable[[Data], object], batch: Data) -> list[str]:
    """Names of the columns that ``fn(batch)`` reads, sorted; ``fn`` is called once."""
    recorder = _Recorder(dict(batch), sequence=batch.sequence, scalars=batch.scalars)
    fn(recorder)
    return sorted(recorder.read)


class _Recorder(Data):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read: set[str] = set()
        self.made: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.made:
            self.read.add(name)
        return super().__getitem__(name)

    def _with(self, columns: Mapping[str, Tree], successors: bool = True) -> Data:
        # what is read from an overlay is read from the batch: a compiled step would lack it
        found = _Recorder.__new__(_Recorder)
        made = self.made | (columns.keys() - self._columns.keys())
        found.__dict__ = super()._with(columns, successors).__dict__ | {"read": self.read, "made": made}
        return found
