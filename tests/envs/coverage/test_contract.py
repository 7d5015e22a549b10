"""Every coverage task is a batched environment in all three reset modes, and resumes bit for bit."""

from __future__ import annotations

from typing import ClassVar

import pytest

import envs
from ccrl.testing import EnvContract
from envs.coverage import GridWorld, PointMass, ant_coverage, grid_coverage, grid_items, point_coverage


class TestGridWorld(EnvContract):
    env = GridWorld
    options: ClassVar = {"size": (8, 9), "start": None, "observation": "scaled", "max_episode_steps": 7}
    time_limit = 7


class TestPointMass(EnvContract):
    env = PointMass
    options: ClassVar = {"max_episode_steps": 9}
    time_limit = 9


class TestGridCoverage(EnvContract):
    random_starts = False
    env = grid_coverage
    options: ClassVar = {"size": (4, 5), "max_episode_steps": 6, "observation": "history", "stochasticity": 0.3}
    time_limit = 6


class TestGridItems(EnvContract):
    random_starts = False
    env = grid_items
    options: ClassVar = {"max_episode_steps": 6}
    time_limit = 6


class TestPointCoverage(EnvContract):
    env = point_coverage
    options: ClassVar = {"max_episode_steps": 9}
    time_limit = 9


class TestAntCoverage(EnvContract):
    env = ant_coverage
    options: ClassVar = {"max_episode_steps": 5}
    time_limit = 5


@pytest.mark.parametrize(
    "id", ["AntCoverage", "GridCoverage", "GridDesign", "GridFacility", "GridItems", "PointCoverage", "TwoRooms"]
)
def test_every_task_has_an_id(id):
    if id == "GridDesign":
        pytest.importorskip("gpytorch")
    env = envs.make(f"ccrl/{id}-v0", 2, max_episode_steps=3)
    env.reset(seed=0)
    assert env.num_envs == 2
    env.close()
