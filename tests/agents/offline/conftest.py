"""A small data set: a point on a line whose reward prefers actions that the data seldom has."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from ccrl.offline import Dataset, from_arrays
from ccrl.testing.agent_contract import SpacesEnv


class Line(SpacesEnv):
    """Two observations, one action in [-2, 2]; never ends."""

    def __init__(self, num_envs: int = 1) -> None:
        super().__init__(gymnasium.spaces.Box(-9, 9, (2,)), gymnasium.spaces.Box(-2, 2, (1,)))
        self.num_envs = num_envs


def make_line_data(count: int = 400) -> Dataset:
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(count, 2)) * [1.0, 3.0] + [2.0, 0.0]
    action = np.clip(rng.normal(size=(count, 1)) * 0.5 + 0.5, -2, 2)
    end = np.arange(count) % 10 == 9
    return from_arrays({
        "obs": obs, "action": action, "reward": -np.abs(action[:, 0] - 1.0), "next_obs": rng.normal(size=(count, 2)),
        "terminated": end & (np.arange(count) % 20 == 9), "truncated": end & (np.arange(count) % 20 == 19),
    }, "line")  # fmt: skip


@pytest.fixture
def line_data() -> Dataset:
    return make_line_data()


@pytest.fixture
def line_env() -> Line:
    return Line()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
