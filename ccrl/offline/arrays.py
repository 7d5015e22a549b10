"""Plain arrays and a user's own episodes (NPZ, Parquet) as data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ccrl.offline.dataset import Array, DataError, Dataset
from ccrl.packages import require

__all__ = ["from_arrays", "load_npz", "load_parquet", "read_archive"]

_NEEDED = ("obs", "action", "reward", "terminated")
_FLAGS = ("terminated", "truncated")


def from_arrays(arrays: Mapping[str, Any], name: str = "arrays", scores: tuple[float, float] | None = None) -> Dataset:
    """A data set from columns by name: ``obs, action, reward, terminated`` and, where there are, ``truncated, episode,
    next_obs`` and any others.

    Without ``episode``, a new one begins after every row that is terminated or truncated. Without ``next_obs``, the
    successor is the next row's ``obs``; a row that ends an episode has none: terminals keep their own (it is never
    read), time-outs and the last row of a recording are left out.

    :raises DataError: a column is missing, is not numbers, or what ``Dataset`` refuses.
    """
    columns = {k: np.asarray(v) for k, v in arrays.items()}
    if missing := [k for k in _NEEDED if k not in columns]:
        raise DataError(f"{name}: expected the columns {list(_NEEDED)}, missing {missing}; got {sorted(columns)}")
    columns = {k: _typed(name, k, v) for k, v in columns.items()}
    count = len(columns["reward"])
    if wrong := {k: len(v) for k, v in columns.items() if len(v) != count}:
        raise DataError(f"{name}: expected {count} rows in every column as 'reward' has, got {wrong}")
    terminated = columns["terminated"]
    truncated = columns.get("truncated", np.zeros(count, dtype=bool)) & ~terminated
    ended = terminated | truncated
    if "episode" not in columns:
        columns["episode"] = np.cumsum(np.r_[False, ended[:-1]]).astype(np.int64) if count else np.zeros(0, np.int64)
    columns |= {"truncated": truncated}
    known = {*_NEEDED, "truncated", "episode", "next_obs"}
    extra = {k: v for k, v in columns.items() if k not in known}
    given = "next_obs" in columns
    if not given:
        columns["next_obs"] = np.concatenate([columns["obs"][1:], columns["obs"][-1:]])
    made = Dataset(**{k: columns[k] for k in known}, name=name, scores=scores, extra=extra)
    if given:
        return made
    last = np.r_[np.diff(made.episode) > 0, True]
    made.next_obs[last] = made.obs[last]
    kept = ~last | made.terminated
    if not kept.any():
        raise DataError(f"{name}: expected rows with a successor, got {count} that end episodes; add column 'next_obs'")
    return made.select(kept)


def load_npz(path: str | Path) -> Dataset:
    """A NumPy archive with the columns of ``from_arrays``. :raises DataError: as there, or no such archive."""
    return from_arrays(read_archive(path), str(path))


def read_archive(path: str | Path) -> dict[str, Array]:
    """The arrays of a NumPy archive. :raises DataError: there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except Exception as error:  # which one depends on the bits that flipped
        raise DataError(
            f"{path}: expected an .npz archive of plain arrays, got {type(error).__name__}: {error}"
        ) from error


def load_parquet(path: str | Path) -> Dataset:
    """A Parquet table with the columns of ``from_arrays``: vectors as lists, or as ``obs_0, obs_1, ...``.

    :raises DataError: as there, an empty cell, or lists of different lengths.
    """
    reader = require("pyarrow.parquet", "offline")
    try:
        table = reader.read_table(path)
    except Exception as error:  # as above
        raise DataError(f"{path}: expected a Parquet table, got {type(error).__name__}: {error}") from error
    arrays: dict[str, Array] = {}
    numbered: dict[str, dict[int, Array]] = {}
    for name in table.column_names:
        column = table.column(name)
        rows = column.to_pylist()
        if column.null_count:
            row = next(i for i, value in enumerate(rows) if value is None)
            raise DataError(f"{path}: row {row}, column {name!r}: expected a value, got an empty cell")
        if rows and isinstance(rows[0], list):
            width = len(rows[0])
            row = next((i for i, value in enumerate(rows) if len(value) != width), -1)
            if row >= 0:
                raise DataError(f"{path}: row {row}, column {name!r}: expected {width} numbers, got {len(rows[row])}")
        stem, _, number = name.rpartition("_")
        if stem in ("obs", "next_obs", "action") and number.isdigit():
            numbered.setdefault(stem, {})[int(number)] = np.asarray(rows)
        else:
            arrays[name] = np.asarray(rows)
    for stem, parts in numbered.items():
        if sorted(parts) != list(range(len(parts))):
            raise DataError(
                f"{path}: columns {stem}_0 to {stem}_{len(parts) - 1} expected, got numbers {sorted(parts)}"
            )
        arrays[stem] = np.stack([parts[i] for i in range(len(parts))], -1)
    return from_arrays(arrays, str(path))


def _typed(where: str, name: str, column: Array) -> Array:
    """Flags as bool, numbers as float32, episodes and discrete actions as int64, ``[M, 1]`` rewards and flags flat."""
    if column.dtype.kind not in "fiub":
        raise DataError(f"{where}: column {name!r}: expected numbers, got {column.dtype}")
    if name in ("reward", *_FLAGS, "episode") and column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if name in _FLAGS:
        if column.dtype.kind != "b" and not np.isin(column, (0, 1)).all():
            row = int(np.flatnonzero(~np.isin(column, (0, 1)))[0])
            raise DataError(f"{where}: row {row}, column {name!r}: expected 0 or 1, got {column[row]}")
        return column.astype(bool)
    if name == "episode" or (name == "action" and column.ndim == 1 and column.dtype.kind in "iu"):
        return column.astype(np.int64)
    if name in ("obs", "next_obs", "action") and column.ndim == 1:
        column = column[:, None]
    # a copy: the successors of a file without them are written in place
    return column.astype(np.float32) if column.dtype.kind in "fiu" else column
