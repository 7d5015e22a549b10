"""D4RL's HDF5 files (Fu et al. 2020), versions 0 to 2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccrl.offline.arrays import from_arrays
from ccrl.offline.dataset import Array, DataError, Dataset
from ccrl.offline.scores import reference_scores
from ccrl.packages import require

__all__ = ["load_d4rl", "qlearning_rows", "read_hdf5"]

_NEEDED = ("observations", "actions", "rewards", "terminals")


def load_d4rl(
    path: str | Path, *, horizon: int | None = None, parity: bool = False, terminate_on_end: bool = False
) -> Dataset:
    """The transitions of a file.

    The successor of a row is the next row of the file (the key ``next_observations`` of some files holds the reset
    observation at an episode's end and is not used), so a row that ends by time-out has none and is left out; so is the
    last row of the file. Terminal rows stay: their successor is never read.

    :param horizon: time limit of the task, for files without the key ``timeouts`` (version 0); None: such a file's
        episodes end with terminals alone.
    :param parity: the rows of ``d4rl.qlearning_dataset``, with its quirks (see ``qlearning_rows``).
    :param terminate_on_end: with ``parity``: keep the rows that end by time-out, whose successor is then the first
        observation of the next episode.
    :raises DataError: no such file, a key is missing, or a bad row.
    """
    raw = read_hdf5(path)
    if missing := [k for k in _NEEDED if k not in raw]:
        raise DataError(f"{path}: expected the keys {list(_NEEDED)}, missing {missing}; got {sorted(raw)}")
    count = len(raw["observations"])
    flat = {k: v.reshape(count) if v.ndim == 2 and v.shape == (count, 1) else v for k, v in raw.items()}
    terminated = flat["terminals"].astype(bool)
    timeouts = flat["timeouts"].astype(bool) if "timeouts" in flat else None
    columns: dict[str, Array] = {
        "obs": flat["observations"], "action": flat["actions"], "reward": flat["rewards"], "terminated": terminated,
    }  # fmt: skip
    scores = reference_scores(Path(path).stem)
    if not parity:
        if terminate_on_end:
            raise DataError("load_d4rl: terminate_on_end is a setting of parity=True")
        columns["truncated"] = _limits(terminated, horizon) if timeouts is None else timeouts
        return from_arrays(columns, str(path), scores)
    rows, ends = qlearning_rows(terminated, timeouts, horizon, terminate_on_end)
    episode = np.cumsum(np.r_[False, ends[:-1]])[rows]
    following = np.minimum(rows + 1, count - 1)
    columns = {k: v[rows] for k, v in columns.items()} | {
        "truncated": ends[rows] & ~terminated[rows], "episode": episode, "next_obs": flat["observations"][following],
    }  # fmt: skip
    return from_arrays(columns, str(path), scores)


def qlearning_rows(
    terminated: Array, timeouts: Array | None, horizon: int | None, terminate_on_end: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows that ``d4rl.qlearning_dataset`` keeps, and for every row of the file whether an episode ends there.

    Without ``timeouts`` a row is the last of its episode when a counter of steps reaches ``horizon - 1``. The counter
    starts again at 0 after a row that was left out, but at 1 after a terminal row: a quirk of the original, kept.
    """
    count, step = len(terminated), 0
    kept, ends = list[int](), np.asarray(terminated, dtype=bool).copy()
    for row in range(count - 1):
        last = bool(timeouts[row]) if timeouts is not None else horizon is not None and step == horizon - 1
        ends[row] |= last
        if last and not terminate_on_end:
            step = 0
            continue
        if terminated[row] or last:
            step = 0
        kept.append(row)
        step += 1
    return np.asarray(kept, dtype=np.int64), ends


def read_hdf5(path: str | Path) -> dict[str, Array]:
    """All arrays of a file by their whole key (``infos/qpos``). :raises DataError: no such file, or of another kind."""
    h5py = require("h5py", "offline")
    found: dict[str, Array] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape:
            found[name] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file.visititems(take)
    except OSError as error:
        raise DataError(f"{path}: expected an HDF5 file, got {error}") from error
    return found


def _limits(terminated: Mapping[int, bool] | Array, horizon: int | None) -> NDArray[np.bool_]:
    """Rows at which an episode reaches ``horizon`` steps."""
    ends, step = np.zeros(len(terminated), dtype=bool), 0
    for row in range(len(terminated)):
        step += 1
        ends[row] = step == horizon
        if ends[row] or terminated[row]:
            step = 0
    return ends
