"""Execution of a sell order: a continuous task whose mean and whose tail want different things."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.distributional import CVaR, Objective, outer_search
from ccrl.settings import Count, Positive, Unit, checked
from ccrl.torch_env import TorchEnv

__all__ = ["Execution", "OrderExecution"]


class Execution(NamedTuple):
    """The best start and the objective there."""

    start: float
    value: float


class OrderExecution(TorchEnv):
    """Sell one unit of an asset within ``horizon`` steps. With k steps left the action a in [0, 1] sells the share
    ``a^(log2 k)`` of what is left, from nothing to everything; 1/2 sells equal parts, ``1 / k``. A sale costs
    ``impact * sold^2``; what remains ``x`` is carried over the step and earns the price's move:

        R_{t+1} = x_{t+1} Z_{t+1} - impact * sold_t^2

    ``Z`` is ``rise`` with probability ``1 - crash``, else ``-fall``. The last step sells the rest before the price
    moves. Written so, the sum of rewards is the proceeds against the first price (Almgren and Chriss 2000), and the
    price itself is no part of the state. With a positive mean of ``Z`` waiting pays on average, and its crashes are
    what the tail is made of. Observation ``[2]``: the share of time that is left, and ``x``.
    """

    id = "ccrl/OrderExecution-v0"
    single_observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
    single_action_space = spaces.Box(0.0, 1.0, (1,), np.float32)

    @checked
    def __init__(
        self,
        num_envs: int = 1,
        *,
        horizon: Count = 5,
        impact: Positive = 1.0,
        rise: Positive = 0.2,
        fall: Positive = 1.0,
        crash: Unit = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_envs, **options)
        self.horizon, self.impact = horizon, impact
        self.rise, self.fall, self.crash = rise, fall, crash

    def initial(self, generator: torch.Generator, n: int) -> Tensor:
        return torch.tensor([0.0, 1.0], device=self.device).expand(n, 2).clone()

    def draw_noise(self, generator: torch.Generator, n: int) -> Tensor:
        return torch.rand(n, generator=generator, device=self.device)

    def transition(self, state: Any, action: Tensor, noise: Any) -> tuple[Tensor, Tensor, Tensor]:
        t, left = state.unbind(1)
        last = t + 1.0 >= self.horizon
        power = torch.log2((self.horizon - t).clamp_min(1.0))
        sold = torch.where(last, left, left * action[:, 0].clamp(0.0, 1.0) ** power)
        after = left - sold
        move = torch.where(noise < self.crash, -self.fall, self.rise)
        return torch.stack((t + 1.0, after), 1), after * move - self.impact * sold**2, last

    def observe(self, state: Any) -> Tensor:
        share = (1.0 - state[:, 0] / self.horizon).clamp_min(0.0)
        return torch.stack((share, state[:, 1]), 1)

    def optimum(self, objective: Objective | None = None, *, inventory: int = 41, stocks: int = 321) -> Execution:
        """The optimum without a discount by a recursion on a grid of inventories and stocks, linear in between:
        ``V(T, c) = f(c)``, ``V(t, x, c) = max over what is sold of E V(t + 1, x', c + R)``.

        The error falls with both numbers; the tests halve the spacings.

        :param objective: of numbers, CVaR at .1 by default.
        :raises ValueError: an objective of vectors, or grids of less than two.
        """
        objective = CVaR(0.1) if objective is None else objective
        if objective.dims:
            raise ValueError(f"optimum: expected an objective of numbers, got one of {objective.dims}")
        if inventory < 2 or stocks < 2:
            raise ValueError(f"optimum: expected grids of 2 or more, got {inventory} and {stocks}")
        x = torch.linspace(0.0, 1.0, inventory, dtype=torch.float64)
        # beyond the largest return, and two falls and one sale at once, f is linear of c + G but for rare histories
        c = torch.linspace(-self.horizon * self.rise, 2.0 * self.fall + self.impact, stocks, dtype=torch.float64)
        f = objective.utility
        # the last step sells everything: V(T - 1, x, c) = f(c - impact x^2)
        value = f(c[None, :] - self.impact * x[:, None] ** 2)
        for _ in range(self.horizon - 1):
            new = torch.full_like(value, -torch.inf)
            for i in range(inventory):
                after = x[: i + 1]  # what is left after the sale
                cost = self.impact * (x[i] - after) ** 2
                expected = torch.zeros(i + 1, stocks, dtype=torch.float64)
                for p, move in ((1.0 - self.crash, self.rise), (self.crash, -self.fall)):
                    expected += p * _interpolate(value[: i + 1], c, c[None, :] + (after * move - cost)[:, None])
                new[i] = expected.amax(0)
            value = new
        if not objective.searched:
            start = float(objective.start)  # type: ignore[arg-type]
            return Execution(start, float(_interpolate(value[-1:], c, torch.tensor([[start]], dtype=torch.float64))))
        best, found = outer_search(objective, c, value[-1])
        return Execution(float(best), float(found))


def _interpolate(values: Tensor, grid: Tensor, at: Tensor) -> Tensor:
    """Rows of ``values`` ``[I, C]`` on ``grid`` ``[C]``, linear at ``at`` ``[I, K]``, continued linearly outside."""
    step = grid[1] - grid[0]
    place = ((at - grid[0]) / step).floor().long().clamp(0, len(grid) - 2)
    share = (at - grid[place]) / step
    left, right = values.gather(1, place), values.gather(1, place + 1)
    return left + share * (right - left)
