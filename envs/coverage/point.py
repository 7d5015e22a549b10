"""A continuous coverage task: a point with inertia sweeps the unit square."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.settings import Count, Positive, checked
from ccrl.torch_env import Array, TorchEnv
from ccrl.wrappers.set_reward import SetReward
from envs.coverage.functions import Coverage
from envs.coverage.grid import coordinates

__all__ = ["PointMass", "discs", "point_coverage"]


class PointMass(TorchEnv):
    """Accelerations ``[2]`` in [-1, 1] move a point with friction in the unit square, whose border stops it. The
    observation is the position and ten times the velocity, in [-1, 1], and the time. Its own reward is 0.

    ``v' = 0.8 v + 0.02 a,  x' = x + v'``: at most 0.1 per step.

    Args:
        cells: the square is divided into ``cells x cells`` for what :meth:`element` returns.
    """

    id = "ccrl/PointMass-v0"
    default_max_episode_steps = 100

    @checked
    def __init__(self, num_envs: Count = 1, *, cells: Count = 20, **options: Any) -> None:
        super().__init__(num_envs, **options)
        if cells < 1 or self.max_episode_steps is None:
            raise ValueError(f"{self.name}: expected cells >= 1 and a limit, got {cells}, {self.max_episode_steps}")
        self.cells = cells
        self.single_observation_space = spaces.Box(-1.0, 1.0, (5,), np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def initial(self, generator: torch.Generator, n: int) -> Array:
        position = 0.1 + 0.1 * torch.rand(n, 2, generator=generator, device=self.device)
        time = torch.zeros(n, 1, device=self.device)
        return torch.cat([position, torch.zeros_like(position), time], 1)

    def transition(self, state: Array, action: Tensor, noise: Array | None) -> tuple[Array, Tensor, Tensor]:
        position, velocity, time = state[:, :2], state[:, 2:4], state[:, 4:]
        velocity = 0.8 * velocity + 0.02 * action.clamp(-1.0, 1.0)
        moved = position + velocity
        inside = moved.clamp(0.0, 1.0)
        velocity = torch.where(inside == moved, velocity, torch.zeros_like(velocity))
        after = torch.cat([inside, velocity, time + 1.0], 1)
        return after, torch.zeros_like(after[:, 0]), torch.zeros_like(after[:, 0], dtype=torch.bool)

    def observe(self, state: Array) -> Tree:
        assert self.max_episode_steps is not None
        time = (2.0 * state[:, 4:] / self.max_episode_steps - 1.0).clamp_max(1.0)
        return torch.cat([2.0 * state[:, :2] - 1.0, (10.0 * state[:, 2:4]).clamp(-1.0, 1.0), time], 1)

    def element(self, obs: Tree) -> Tensor:
        """The number of the cell ``[N]`` int64 that an observation is in."""
        assert isinstance(obs, Tensor)
        place = ((obs[:, :2] + 1.0) * (0.5 * self.cells)).long().clamp(0, self.cells - 1)
        return place[:, 0] * self.cells + place[:, 1]


def discs(cells: int, radius: float) -> Tensor:
    """``[cells^2, K]`` int64, padded with -1: the cells whose centres are within ``radius`` cells of a cell's."""
    reach, xy = math.floor(radius), coordinates((cells, cells))
    columns = []
    for dx in range(-reach, reach + 1):
        for dy in range(-reach, reach + 1):
            if dx * dx + dy * dy > radius * radius:
                continue
            x, y = xy[:, 0] + dx, xy[:, 1] + dy
            inside = (x >= 0) & (x < cells) & (y >= 0) & (y < cells)
            columns.append(torch.where(inside, x * cells + y, -1))
    return torch.stack(columns, 1)


@checked
def point_coverage(
    num_envs: Count = 1,
    *,
    cells: Count = 20,
    radius: Positive = 1.5,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """The share of the square that discs of ``radius`` cells around the positions have covered.

    Raises:
        ValueError: a radius that is not positive, or what ``PointMass`` refuses.
    """
    env = PointMass(num_envs, cells=cells, **options)
    weights = torch.full((cells * cells,), 1.0 / cells**2, device=env.device)
    return SetReward(env, Coverage(discs(cells, radius).to(env.device), weights), paid=paid)
