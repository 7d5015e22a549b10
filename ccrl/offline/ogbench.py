"""OGBench's files (Park et al. 2024): whole trajectories of one length, without rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ccrl.offline.arrays import from_arrays, read_archive
from ccrl.offline.dataset import Array, DataError, Dataset
from ccrl.packages import require

__all__ = ["load_ogbench", "make_ogbench"]

_NEEDED = ("observations", "actions", "terminals")


def load_ogbench(path: str | Path, reward: Callable[[Array], Array] | None = None) -> Dataset:
    """The transitions of an ``.npz`` file of OGBench.

    ``terminals`` marks the last observation of a trajectory: it belongs to no transition, and the row before it is a
    time-out (no state of these tasks is terminal). Files of single tasks have ``rewards`` and ``masks`` (0: the task is
    done, a terminal); for others ``reward`` computes them.

    :param reward: ``next_obs [M, S] -> [M]``.
    :raises DataError: a key is missing, or neither the file nor the caller has rewards.
    """
    raw = read_archive(path)
    if missing := [k for k in _NEEDED if k not in raw]:
        raise DataError(f"{path}: expected the keys {list(_NEEDED)}, missing {missing}; got {sorted(raw)}")
    ends = raw["terminals"].reshape(-1).astype(bool).copy()
    ends[-1] = True
    rows = np.flatnonzero(~ends)
    if not len(rows):
        raise DataError(f"{path}: column 'terminals': expected 0 in some rows, got an end in every one")
    following = raw["observations"][rows + 1]
    if reward is None and "rewards" not in raw:
        raise DataError(f"{path}: expected 'rewards' in the file (single tasks have them), or reward=; got neither")
    values = raw["rewards"][rows] if reward is None else np.asarray(reward(following))
    done = raw["masks"][rows] == 0 if "masks" in raw else np.zeros(len(rows), dtype=bool)
    episode = np.cumsum(np.r_[False, ends[:-1]])[rows]
    last = ends[rows + 1]
    # a task that is done goes on in the file: its rows are episodes of their own from there
    episode = episode + np.cumsum(np.r_[False, (done & ~last)[:-1]])
    return from_arrays(
        {"obs": raw["observations"][rows], "action": raw["actions"][rows], "reward": values, "terminated": done,
         "truncated": last & ~done, "episode": episode, "next_obs": following}, str(path),
    )  # fmt: skip


def make_ogbench(name: str, **options: Any) -> Any:
    """The Gymnasium environment ``name`` of OGBench (``pointmaze-medium-navigate-v0``), nothing downloaded.

    :raises ImportError: without the extra ``ogbench``.
    """
    return require("ogbench", "ogbench").make_env_and_datasets(name, env_only=True, **options)
