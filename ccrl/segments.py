"""Segments: what a checkpoint shares with the ones before it, as files that are written once and never changed.

A replay memory of a million rows need not be in every checkpoint. Inside ``into(folder)`` a ring's state is a list of
segments in that folder, and only the rows that came since the last one are written. ``resolve`` reads them again.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccrl.experiment import checkpoint

__all__ = ["into", "leaving_out", "left_out", "prune", "read", "resolve", "target", "write"]

SUFFIX = ".segment"
_target: ContextVar[Path | None] = ContextVar("segments", default=None)
_left_out: ContextVar[bool] = ContextVar("left_out", default=False)


@contextlib.contextmanager
def into(folder: Path) -> Iterator[None]:
    """States taken inside may put immutable parts into ``folder``."""
    token = _target.set(folder)
    try:
        yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def leaving_out() -> Iterator[None]:
    """States taken inside come without such parts: what is saved acts, and begins with an empty replay memory."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def left_out() -> bool:
    """Whether this is inside ``leaving_out``."""
    return _left_out.get()


def target() -> Path | None:
    """The folder of ``into``, or None."""
    return _target.get()


def write(folder: Path, name: str, columns: Mapping[str, Any]) -> str:
    """Write ``columns`` as ``folder/name.segment``, whole or not at all; the file's name, which is another where there
    is such a file: of another memory, or of the same one before its rows were lost or replaced."""
    names = itertools.chain([f"{name}{SUFFIX}"], (f"{name}_{i}{SUFFIX}" for i in itertools.count(1)))
    found = next(each for each in names if not (folder / each).exists())
    checkpoint.save(folder / found, {"columns": columns})
    return found


def read(folder: Path, name: str) -> dict[str, Any]:
    """:raises FileNotFoundError: it is not there: the checkpoint was moved without its segments.
    :raises CheckpointError: it is damaged."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise FileNotFoundError(
            f"expected the segment {path}, which holds rows of the replay memory; copy the folder {folder.name} with "
            "the checkpoint"
        )
    columns: dict[str, Any] = checkpoint.load(path)["columns"]
    return columns


def resolve(state: Any, folder: Path) -> Any:
    """``state`` with the columns of segments in place of their names."""
    if not isinstance(state, dict):
        return state
    if "segments" not in state:
        return {k: resolve(v, folder) for k, v in state.items()}
    parts = [_cut(read(folder, s["name"]), s["first"] - s["start"]) for s in state["segments"]]
    columns = {k: _joined([p[k] for p in parts]) for k in parts[0]} if parts else {}
    return {k: v for k, v in state.items() if k != "segments"} | {"rows": columns}


def prune(folder: Path, needed: set[str]) -> None:
    """Delete the segments that no checkpoint needs."""
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name not in needed:
            path.unlink(missing_ok=True)


def _cut(columns: dict[str, Any], first: int) -> dict[str, Any]:
    return {k: {n: x[first:] for n, x in v.items()} if isinstance(v, dict) else v[first:] for k, v in columns.items()}


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
