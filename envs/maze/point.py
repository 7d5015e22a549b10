"""A point mass in a maze, with the maps, dynamics and rewards of D4RL's maze2d (Fu et al. 2020, arXiv 2004.07219)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.settings import Count, checked
from ccrl.torch_env import TorchEnv

__all__ = ["MAPS", "MASS", "PointMaze", "integrate", "large", "medium", "u_maze"]

MAPS: dict[str, tuple[tuple[str, ...], int]] = {
    "u_maze": (("#####", "#GOO#", "###O#", "#OOO#", "#####"), 300),
    "medium": (
        ("########", "#OO##OO#", "#OO#OOO#", "##OOO###", "#OO#OOO#", "#O#OO#O#", "#OOO#OG#", "########"), 600,
    ),
    "large": (
        ("############", "#OOOO#OOOOO#", "#O##O#O#O#O#", "#OOOOOO#OOO#", "#O####O###O#", "#OO#O#OOOOO#",
         "##O#O#O#O###", "#OO#OOO#OGO#", "############"), 800,
    ),
}  # fmt: skip
"""Name -> rows (``#`` wall, ``O`` free, ``G`` goal) and the time limit."""

MASS = 1000.0 * 4.0 / 3.0 * math.pi * 0.1**3
"""kg: a sphere of radius 0.1 m and density 1000."""
GEAR, DAMPING, DT, MAX_SPEED, RADIUS = 100.0, 1.0, 0.01, 5.0, 0.1
REACH = 0.5
"""Distance at which the goal counts as reached."""
_EDGE = 0.7
"""Cell (i, j) is centred at (i - 0.2, j - 0.2) in the coordinates of the observation, so it begins at i - 0.7."""


def integrate(position: Tensor, velocity: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """One step of 0.01 s without walls, ``[N, 2]`` each: semi-implicit Euler with implicit damping, as MuJoCo's."""
    force = GEAR * action.clamp(-1.0, 1.0)
    velocity = (MASS * velocity.clamp(-MAX_SPEED, MAX_SPEED) + DT * force) / (MASS + DT * DAMPING)
    return position + DT * velocity, velocity


class PointMaze(TorchEnv):
    """State and observation: position (m) and velocity (m/s), ``[N, 4]``. Action: two forces in [-1, 1].

    The reward of a step is 1 within 0.5 of the goal, or ``exp(-distance)`` with ``dense``; no state ends an episode.
    Episodes start in a random free cell (the goal's too), +-0.1, with a velocity of 0.1 N(0, I). Walls stop the disc
    axis by axis, without friction or bounce; D4RL's contacts are MuJoCo's, so its reference scores do not hold here.

    Args:
        maze: a name of ``MAPS``.
        dense: the shaped reward.

    Raises:
        ValueError: an unknown map.
    """

    @checked
    def __init__(
        self,
        num_envs: Count = 1,
        *,
        maze: Literal["u_maze", "medium", "large"] = "u_maze",
        dense: bool = False,
        **options: Any,
    ) -> None:
        rows, limit = MAPS[maze]
        options["max_episode_steps"] = (
            limit if options.get("max_episode_steps") is None else options["max_episode_steps"]
        )
        super().__init__(num_envs, **options)
        self.name, self.maze, self.dense = f"PointMaze({maze})", maze, dense
        self.walls = torch.tensor([[c == "#" for c in row] for row in rows], device=self.device)
        self.free = torch.nonzero(~self.walls)
        self.goal = torch.nonzero(torch.tensor([[c == "G" for c in row] for row in rows], device=self.device))[
            0
        ].float()
        high = np.array([*self.walls.shape, math.inf, math.inf], dtype=np.float32)
        low = np.array([-1.0, -1.0, -math.inf, -math.inf], dtype=np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def initial(self, generator: torch.Generator, n: int) -> Tensor:
        where, shift = (torch.rand(shape, generator=generator, device=self.device) for shape in ((n,), (n, 2)))
        velocity = 0.1 * torch.randn((n, 2), generator=generator, device=self.device)
        cell = self.free[(where * len(self.free)).long().clamp_max(len(self.free) - 1)].float()
        return torch.cat([cell + 0.2 * shift - 0.1, velocity], -1)

    def transition(self, state: Tensor, action: Tensor, noise: None) -> tuple[Tensor, Tensor, Tensor]:
        old = state[:, :2]
        wished, velocity = integrate(old, state[:, 2:], action)
        x = torch.stack([wished[:, 0], old[:, 1]], -1)
        free_x = ~self._hits(x)
        position = torch.where(free_x.unsqueeze(-1), x, old)
        y = torch.stack([position[:, 0], wished[:, 1]], -1)
        free_y = ~self._hits(y)
        position = torch.where(free_y.unsqueeze(-1), y, position)
        velocity = velocity * torch.stack([free_x, free_y], -1)
        ended = torch.zeros(state.shape[0], dtype=torch.bool, device=state.device)
        return torch.cat([position, velocity], -1), self.reward(position), ended

    def reward(self, position: Tensor) -> Tensor:
        """Of having arrived at ``position`` ``[..., 2]``."""
        distance = torch.linalg.vector_norm(position - self.goal.to(position), dim=-1)
        found: Tensor = (-distance).exp() if self.dense else (distance <= REACH).to(position.dtype)
        return found

    def cell(self, position: Tensor) -> Tensor:
        """Row and column of the cell that holds ``position`` ``[..., 2]``, int64."""
        last = torch.tensor(self.walls.shape, device=position.device) - 1
        return torch.minimum((position + _EDGE).floor().long().clamp_min(0), last)

    def _hits(self, position: Tensor) -> Tensor:
        """Whether a corner of the square around the disc is in a wall, ``[N]``."""
        hit = torch.zeros(position.shape[0], dtype=torch.bool, device=position.device)
        for dx in (-RADIUS, RADIUS):
            for dy in (-RADIUS, RADIUS):
                row, column = self.cell(position + position.new_tensor([dx, dy])).unbind(-1)
                hit = hit | self.walls[row, column]
        return hit


u_maze = partial(PointMaze, maze="u_maze")
medium = partial(PointMaze, maze="medium")
large = partial(PointMaze, maze="large")
