"""OGBench's files (Park et al. 2024): whole trajectories of one length, without rewards; its point mazes' recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ccrl.offline.arrays import from_arrays, read_archive
from ccrl.offline.dataset import Array, DataError, Dataset
from ccrl.packages import require
from ccrl.seeding import stream_seed

__all__ = ["load_ogbench", "make_ogbench", "navigate_ogbench"]

_NEEDED = ("observations", "actions", "terminals")
_REACH = 1.0
"""Distance at which a point maze's goal counts as reached."""


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


def navigate_ogbench(
    env: Any, steps: int, *, noise: float = 0.5, task: int = 1, length: int = 1000, seed: int = 0, name: str = "ogbench"
) -> Dataset:
    """Transitions of a point maze by the recipe ``navigate``, which needs no expert: full speed towards the next cell
    on the shortest way to a random goal, plus ``noise`` times normal numbers, and another goal as soon as one is
    reached. Trajectories start in random cells; their last row is a time-out.

    Rewards are those of a single task: -1, and 0 where a row arrives at the task's goal, which ends an episode
    (``masks`` of OGBench's files) but not the trajectory.

    :param env: of ``make_ogbench("pointmaze-...")``, or what has its ``maze_map, task_infos, ij_to_xy, xy_to_ij,
        get_oracle_subgoal, get_xy, set_xy``.
    :param steps: at least so many transitions, in whole trajectories of ``length``.
    :raises ValueError: no point maze, or a task that it has not.
    """
    base = env.unwrapped
    if not hasattr(base, "get_oracle_subgoal") or env.action_space.shape != (2,):
        raise ValueError(f"{name}: expected a point maze of OGBench, got {base}")
    if not 1 <= task <= len(base.task_infos):
        raise ValueError(f"task: expected 1 to {len(base.task_infos)}, got {task}")
    rng = np.random.default_rng(stream_seed(seed, "data set: ogbench"))
    cells, unit = np.argwhere(base.maze_map == 0), base.ij_to_xy((0, 1))[0] - base.ij_to_xy((0, 0))[0]
    wanted = np.asarray(base.ij_to_xy(base.task_infos[task - 1]["goal_ij"]))
    ways: dict[Any, Array] = {}

    def place() -> Array:
        cell = cells[rng.integers(len(cells))]
        found: Array = np.asarray(base.ij_to_xy((int(cell[0]), int(cell[1])))) + rng.uniform(-1.0, 1.0, 2) * unit / 4
        return found

    rows: list[tuple[Any, ...]] = []
    for _ in range(-(-steps // length)):
        env.reset(seed=int(rng.integers(2**31)))
        base.set_xy(place())
        obs, goal = np.array(base.get_ob()), place()
        for t in range(length):
            xy = base.get_xy()
            key = (base.xy_to_ij(xy), base.xy_to_ij(goal))
            if key[0] != key[1] and key not in ways:
                ways[key] = base.get_oracle_subgoal(xy, goal)[0]  # a search of the whole map
            towards = ways.get(key, goal) - xy
            way = towards / (np.linalg.norm(towards) + 1e-6)
            action = np.clip(way + noise * rng.standard_normal(2), -1.0, 1.0).astype(np.float32)
            following = np.array(env.step(action)[0])
            done = bool(np.linalg.norm(base.get_xy() - wanted) <= _REACH)
            rows.append((obs, action, float(done) - 1.0, following, done, t == length - 1 and not done))
            obs = following
            if np.linalg.norm(base.get_xy() - goal) <= _REACH:
                goal = place()
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    columns = {k: np.array([row[i] for row in rows]) for i, k in enumerate(names)}
    ended = columns["terminated"] | columns["truncated"]
    return from_arrays(columns | {"episode": np.cumsum(np.r_[False, ended[:-1]])}, name)
