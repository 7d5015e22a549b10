"""The data sets of the studies: made once per folder, kept as Minari data sets that Minari itself opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs
from ccrl.experiment.evaluation import evaluate
from ccrl.offline import Dataset, load_minari
from scripts.make_dataset import Maze, Pendulum, uniform, write
from scripts.studies.flow.control import medium

__all__ = ["SETS", "DataSet", "opened"]

HOPPER_EXPERT = 3234.3
"""Return of the expert that D4RL's scores of Hopper are relative to (Fu et al. 2020)."""


@dataclass(frozen=True)
class DataSet:
    """A task and how its data are made: ``make(transitions, folder)``."""

    env: str
    make: Callable[[int, Path], Dataset]
    hidden: tuple[int, ...]
    """Widths of the networks that are trained on it."""
    episodes: int = 100
    """Episodes of an evaluation."""
    most: int = 100_000
    """Transitions, unless fewer are asked for."""


def _maze(maze: str) -> Callable[[int, Path], Dataset]:
    def make(steps: int, out: Path) -> Dataset:
        copies = max(1, min(50, steps // 200))
        return Maze(maze=maze, steps=steps, num_envs=copies).make()  # type: ignore[arg-type]

    return make


def _pendulum(steps: int, out: Path) -> Dataset:
    return replace(Pendulum(steps=steps).make(), scores=(5.0, 1000.0))


def _hopper(steps: int, out: Path) -> Dataset:
    env = envs.make("Hopper-v5", 10)
    act = uniform(env, 0)
    random = evaluate(lambda obs, deterministic: act(obs), env, 100)  # type: ignore[arg-type]
    env.close()
    data = medium(out / "hopper-medium.npz")
    return replace(data, scores=(float(random.returns.mean()), HOPPER_EXPERT))


SETS: dict[str, DataSet] = {
    "u_maze": DataSet("ccrl/PointMazeU-v0", _maze("u_maze"), (128, 128)),
    "medium_maze": DataSet("ccrl/PointMazeMedium-v0", _maze("medium"), (128, 128)),
    "pendulum": DataSet("InvertedPendulum-v5", _pendulum, (128, 128), episodes=40, most=10_000),
    "hopper": DataSet("Hopper-v5", _hopper, (256, 256), episodes=20),
}
"""Name -> data: a noisy controller's walk to random targets in two mazes, a scaled-down noisy regulator of the
pendulum, drawn episodes of a PPO policy at a third of a long run's return."""


def opened(name: str, out: Path, steps: int) -> Dataset:
    """The data set ``name`` with at most ``steps`` transitions, from ``out/minari``; made where there is none."""
    kind = SETS[name]
    steps = min(steps, kind.most)
    root = out / "minari"
    root.mkdir(parents=True, exist_ok=True)
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    found = f"ccrl/{name}-{steps}-v0"
    whole = root / f"{found.replace('/', '-')}.whole"
    if not whole.exists():
        # a killed run must not leave half a data set
        shutil.rmtree(root / found, ignore_errors=True)
        write(kind.make(steps, out), f"minari:{found}", kind.env)
        whole.touch()
    return load_minari(found)
