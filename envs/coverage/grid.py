"""Batched gridworlds for rewards of the set of visited cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.settings import Count, Natural, Unit, checked
from ccrl.torch_env import Array, TorchEnv

__all__ = ["GridWorld", "Observation", "coordinates"]

Observation = Literal["raw", "scaled", "history"]
_MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


def coordinates(size: tuple[int, int]) -> Tensor:
    """``[n, 2]`` int64: x and y of every cell; the cell ``(x, y)`` has the number ``x * size[1] + y``."""
    x, y = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


class GridWorld(TorchEnv):
    """Cells ``x * Ny + y``; actions 0 stay, 1 +y, 2 +x, 3 -y, 4 -x; a move into a wall or over the border stays.

    Its own reward is 0: wrap it (``ccrl.wrappers.SetReward``). Episodes have ``max_episode_steps`` moves.

    Args:
        size: ``(Nx, Ny)``.
        start: number of the first cell; ``None``: uniform over the free cells.
        walls: numbers of the cells that cannot be entered.
        stochasticity: with this probability a uniformly drawn action is executed in place of the policy's. The policy's
            own action is what rollouts store, so that no random one is reinforced.
        observation: ``raw``: the cell's number and the time, as floats. ``scaled``: x, y and time, each in [-1, 1].
            ``history``: the numbers of all cells so far, -1 where there is none yet (``max_episode_steps + 1`` floats).

    Raises:
        ValueError: a start or wall outside of the grid, a start on a wall, or a probability outside of [0, 1].
    """

    id = "ccrl/GridWorld-v0"
    default_max_episode_steps = 19

    @checked
    def __init__(
        self,
        num_envs: Count = 1,
        *,
        size: tuple[Count, Count] = (10, 10),
        start: Natural | None = 0,
        walls: Sequence[int] = (),
        stochasticity: Unit = 0.0,
        observation: Observation = "raw",
        **options: Any,
    ) -> None:
        super().__init__(num_envs, **options)
        self.size, self.cells = (int(size[0]), int(size[1])), int(size[0]) * int(size[1])
        free = torch.ones(self.cells, dtype=torch.bool)
        if min(self.size) < 1 or any(not 0 <= w < self.cells for w in walls):
            raise ValueError(f"{self.name}: expected walls among a grid's cells, got size {size} and walls {walls}")
        free[list(walls)] = False
        if not bool(free.any()):
            raise ValueError(f"{self.name}: expected a cell that is no wall, got walls everywhere")
        if start is not None and not (0 <= start < self.cells and bool(free[start])):
            raise ValueError(f"{self.name}: expected a free cell below {self.cells} as start, got {start}")
        if self.max_episode_steps is None:
            raise ValueError(f"{self.name}: expected max_episode_steps, got None")
        self.start, self.stochasticity, self.observation = start, stochasticity, observation
        self.free = free.to(self.device)
        self.moves = self._table(free).to(self.device)
        """``[n, 5]``: where an action leads."""
        self._xy = coordinates(self.size).to(self.device)
        self._free_cells = free.nonzero().squeeze(1).to(self.device)
        limit = self.max_episode_steps
        self.single_action_space = spaces.Discrete(len(_MOVES))
        if observation == "raw":
            low, high = np.zeros(2), np.array([self.cells - 1.0, limit])
        elif observation == "scaled":
            low, high = -np.ones(3), np.ones(3)
        else:
            low, high = -np.ones(limit + 1), np.full(limit + 1, self.cells - 1.0)
        self.single_observation_space = spaces.Box(low.astype(np.float32), high.astype(np.float32))

    def _table(self, free: Tensor) -> Tensor:
        xy, table = coordinates(self.size), []
        for dx, dy in _MOVES:
            x, y = xy[:, 0] + dx, xy[:, 1] + dy
            inside = (x >= 0) & (x < self.size[0]) & (y >= 0) & (y < self.size[1])
            target = torch.where(inside, x * self.size[1] + y, torch.arange(self.cells))
            table.append(torch.where(free[target], target, torch.arange(self.cells)))
        return torch.stack(table, 1)

    def initial(self, generator: torch.Generator, n: int) -> Array:
        if self.start is None:
            drawn = torch.randint(len(self._free_cells), (n,), generator=generator, device=self.device)
            cell = self._free_cells[drawn]
        else:
            cell = torch.full((n,), self.start, device=self.device)
        state = {"cell": cell, "time": torch.zeros_like(cell)}
        if self.observation == "history":
            assert self.max_episode_steps is not None
            history = torch.full((n, self.max_episode_steps + 1), -1, device=self.device)
            state["history"] = history.index_copy(1, torch.zeros_like(cell[:1]), cell.unsqueeze(1))
        return state

    def draw_noise(self, generator: torch.Generator, n: int) -> Array | None:
        if self.stochasticity == 0.0:
            return None
        return torch.rand(n, 2, generator=generator, device=self.device)

    def transition(self, state: Array, action: Tensor, noise: Array | None) -> tuple[Array, Tensor, Tensor]:
        if noise is not None:
            other = (noise[:, 1] * len(_MOVES)).long().clamp_max(len(_MOVES) - 1)
            action = torch.where(noise[:, 0] < self.stochasticity, other, action)
        cell, time = self.moves[state["cell"], action], state["time"] + 1
        after = {"cell": cell, "time": time}
        if "history" in state:
            place = time.clamp_max(state["history"].shape[1] - 1).unsqueeze(1)
            after["history"] = state["history"].scatter(1, place, cell.unsqueeze(1))
        never = torch.zeros_like(cell, dtype=torch.bool)
        return after, torch.zeros_like(cell, dtype=torch.float32), never

    def observe(self, state: Array) -> Tree:
        if self.observation == "history":
            history: Tensor = state["history"].float()
            return history
        if self.observation == "raw":
            return torch.stack([state["cell"], state["time"]], 1).float()
        assert self.max_episode_steps is not None
        limits = (max(self.size[0] - 1, 1), max(self.size[1] - 1, 1), self.max_episode_steps)
        xyt = torch.cat([self._xy[state["cell"]], state["time"].unsqueeze(1)], 1)
        return 2.0 * xyt / xyt.new_tensor(limits) - 1.0

    def element(self, obs: Tree) -> Tensor:
        """The number of the cell ``[N]`` int64 that an observation shows."""
        assert isinstance(obs, Tensor)
        if self.observation == "raw":
            return obs[:, 0].long()
        if self.observation == "history":
            last = (obs >= 0).sum(1, keepdim=True) - 1
            return obs.gather(1, last.clamp_min(0)).squeeze(1).long()
        limits = obs.new_tensor([max(self.size[0] - 1, 1), max(self.size[1] - 1, 1)])
        xy = ((obs[:, :2] + 1.0) * limits / 2.0).round().long()
        return xy[:, 0] * self.size[1] + xy[:, 1]
