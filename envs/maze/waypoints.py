"""Controllers that collect maze data: along the shortest way of cells to a target (Fu et al. 2020, appendix)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from envs.maze.point import PointMaze

__all__ = ["Tour", "Waypoints"]


class Waypoints:
    """``(state [N, 4], target [N, 2]) -> action [N, 2]``: ``clip(10 (w - p) - v, -1, 1)``, ``w`` the next cell's place
    on the shortest way, in the target's own cell the target."""

    def __init__(self, env: PointMaze) -> None:
        self.env = env
        self._next = _next_cells(env.walls.cpu()).to(env.device)

    def __call__(self, state: Tensor, target: Tensor) -> Tensor:
        position, velocity = state[:, :2], state[:, 2:]
        (row, column), (goal_row, goal_column) = self.env.cell(position).unbind(-1), self.env.cell(target).unbind(-1)
        following = self._next[goal_row, goal_column, row, column]
        there = (row == goal_row) & (column == goal_column)
        waypoint = torch.where(there.unsqueeze(-1), target, following.to(position))
        return (10.0 * (waypoint - position) - velocity).clamp(-1.0, 1.0)


class Tour:
    """``(state [N, 4], target [N, 2]) -> action [N, 2]`` as the controller of D4RL's maze2d data: ``w`` is passed
    within ``NEAR`` before the next one counts, and is each cell's place less ``U(0, .2)`` in both coordinates, the last
    one the target itself. It remembers ``w``; a copy whose target changes starts a new tour where it is.

    Args:
        generator: of the places' shifts.
    """

    NEAR, SHIFT = 0.1, 0.2

    def __init__(self, env: PointMaze, generator: torch.Generator) -> None:
        self.env, self.generator = env, generator
        self._next = _next_cells(env.walls.cpu()).to(env.device)
        self._target = torch.full((env.num_envs, 2), torch.nan, device=env.device)
        self._place = self._target.clone()
        self._cell = torch.zeros((env.num_envs, 2), dtype=torch.int64, device=env.device)

    def __call__(self, state: Tensor, target: Tensor) -> Tensor:
        position, velocity = state[:, :2], state[:, 2:]
        new = (target != self._target).any(-1)
        near = torch.linalg.vector_norm(self._place - position, dim=-1) < self.NEAR
        passed = near & (self._place != target).any(-1) & ~new
        self._target = target.to(position).clone()
        self._advance(torch.where(new.unsqueeze(-1), self.env.cell(position), self._cell), new | passed)
        return (10.0 * (self._place - position) - velocity).clamp(-1.0, 1.0)

    def _advance(self, cell: Tensor, which: Tensor) -> None:
        (row, column), goal = cell.unbind(-1), self.env.cell(self._target)
        following = self._next[goal[:, 0], goal[:, 1], row, column]
        shift = self.SHIFT * torch.rand(following.shape, generator=self.generator, device=following.device)
        last = (following == goal).all(-1, keepdim=True)
        place = torch.where(last, self._target, following.to(shift) - shift)
        self._place = torch.where(which.unsqueeze(-1), place, self._place)
        self._cell = torch.where(which.unsqueeze(-1), following, self._cell)


def _next_cells(walls: Tensor) -> Tensor:
    """``[R, C, R, C, 2]``: from a cell (the last pair) towards a goal (the first), the next cell; itself where there is
    no way."""
    rows, columns = walls.shape
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    found = grid.expand(rows, columns, rows, columns, 2).clone()
    for goal in torch.nonzero(~walls).tolist():
        seen, queue = {tuple(goal)}, deque([tuple(goal)])
        while queue:
            i, j = queue.popleft()
            for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= a < rows and 0 <= b < columns and not walls[a, b] and (a, b) not in seen:
                    seen.add((a, b))
                    found[goal[0], goal[1], a, b] = torch.tensor([i, j])
                    queue.append((a, b))
    return found
