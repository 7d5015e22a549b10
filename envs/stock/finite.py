"""Finite tasks over a horizon, each with its ``FiniteMDP`` for the exact computations of ``ccrl.distributional``."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.distributional import (
    CVaR,
    ExactOracle,
    FiniteMDP,
    Homeostasis,
    Objective,
    SoftConstraints,
    Solution,
)
from ccrl.distributional.mdp import Outcome
from ccrl.settings import Count, Range, Unit, checked
from ccrl.torch_env import TorchEnv

__all__ = ["CostBudget", "FiniteEnv", "Homeostat", "RiskGridworld", "SABChain"]

_POSITIVE = Range(0.0, above=True)


class FiniteEnv(TorchEnv):
    """A ``FiniteMDP`` for ``horizon`` steps, from state 0; the last step terminates.

    The observation is one-hot: of the step, ``[horizon + 1]``, followed by that of the state, ``[S]``, where there is
    more than one. Vector rewards: a dict, with ``rewards`` ``[m]`` of the last step (0 at the start), and a scalar
    reward that is their first number.

    :param mdp: the process.
    :param horizon: steps of an episode.
    :raises ValueError: less than one step.
    """

    objective: ClassVar[Objective]
    """What the task is about; ``optimum`` takes any other."""

    def __init__(self, num_envs: int = 1, *, mdp: FiniteMDP, horizon: int, **options: Any) -> None:
        super().__init__(num_envs, **options)
        if horizon < 1:
            raise ValueError(f"horizon: expected >= 1, got {horizon}")
        self.mdp, self.horizon = mdp, horizon
        self._tables = mdp.to(self.device)
        # without the last, which is 1 up to rounding
        self._cumulative = self._tables.probability.cumsum(-1)[..., :-1]
        self.single_action_space = spaces.Discrete(mdp.actions)
        width = horizon + 1 + (mdp.states if mdp.states > 1 else 0)
        box = spaces.Box(0.0, 1.0, (width,), np.float32)
        bound = float(mdp.reward.abs().max())
        earned = spaces.Box(-bound, bound, (mdp.dims,), np.float32) if mdp.dims else None
        self.single_observation_space = box if earned is None else spaces.Dict({"obs": box, "rewards": earned})
        self.rewards = "rewards" if mdp.dims else None
        """What ``ccrl.wrappers.StockEnv`` takes under this name."""

    def initial(self, generator: torch.Generator, n: int) -> dict[str, Tensor]:
        zero = torch.zeros(n, dtype=torch.int64, device=self.device)
        state = {"t": zero, "at": zero}
        if self.mdp.dims:
            state["rewards"] = torch.zeros(n, self.mdp.dims, device=self.device)
        return state

    def draw_noise(self, generator: torch.Generator, n: int) -> Tensor:
        return torch.rand(n, generator=generator, device=self.device, dtype=torch.float64)

    def transition(self, state: Any, action: Tensor, noise: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        tables = self._tables
        # a step of a copy that has finished, which nobody reads, must not leave the tables
        outcome = (noise[:, None] >= self._cumulative[state["at"], action]).sum(-1)
        place = state["at"], action, outcome
        t, reward = state["t"] + 1, tables.reward[place].float()
        after = {"t": t.clamp_max(self.horizon), "at": tables.successor[place]}
        if self.mdp.dims:
            after["rewards"] = reward
            reward = reward[:, 0]
        return after, reward, tables.ends[place] | (t >= self.horizon)

    def observe(self, state: Any) -> Any:
        hot = torch.nn.functional.one_hot(state["t"], self.horizon + 1)
        if self.mdp.states > 1:
            hot = torch.cat([hot, torch.nn.functional.one_hot(state["at"], self.mdp.states)], -1)
        return {"obs": hot.float(), "rewards": state["rewards"]} if self.mdp.dims else hot.float()

    def optimum(self, objective: Objective | None = None, gamma: float = 1.0) -> Solution:
        """The exact optimum of an objective (None: the task's own)."""
        return ExactOracle(self.mdp, self.horizon, objective or type(self).objective, gamma).solve()


class SABChain(FiniteEnv):
    """One state, three actions: 0 earns nothing; 1 earns +1 with probability .75, else -1; 2 earns +3 with .6, else -2.

    The better the tail that is asked for, the bolder the best policy, and the best action depends on what was earned.
    Optima of CVaR: docs/distributional.md.
    """

    id = "ccrl/SABChain-v0"
    objective = CVaR(0.5)

    @checked
    def __init__(self, num_envs: int = 1, *, horizon: Count = 4, **options: Any) -> None:
        mdp = FiniteMDP.of([[[(1.0, 0.0, 0)], [(0.75, 1.0, 0), (0.25, -1.0, 0)], [(0.6, 3.0, 0), (0.4, -2.0, 0)]]])
        super().__init__(num_envs, mdp=mdp, horizon=horizon, **options)


class RiskGridworld(FiniteEnv):
    """A grid with a short way along a cliff and a long way around: -1 per step, ``loss`` more, with probability
    ``slip``, where a step enters a cell beside the cliff, ``goal`` more where it reaches the goal, the end.

        . . .      start below left, goal below right;
        S # G      "#": the cells of the lowest row between them are beside the cliff

    Actions: 0 up, 1 right, 2 down, 3 left; a wall stops the step, which still costs.

    :raises ConfigError: no column between start and goal, or costs and probabilities outside their range.
    """

    id = "ccrl/RiskGridworld-v0"
    objective = CVaR(0.1)

    @checked
    def __init__(
        self,
        num_envs: int = 1,
        *,
        rows: Count = 2,
        columns: Count = 3,
        horizon: Count = 6,
        slip: Unit = 0.1,
        loss: float = 10.0,
        goal: float = 10.0,
        **options: Any,
    ) -> None:
        if rows < 2 or columns < 3:
            raise ValueError(f"{self.id}: expected at least 2 rows and 3 columns, got {rows} and {columns}")
        for name, value in (("loss", loss), ("goal", goal)):
            _POSITIVE.check(name, value)
        self.rows, self.columns = rows, columns

        def outcomes(state: int, action: int) -> list[Outcome]:
            row, column = divmod(state, columns)
            row = min(max(row + (1, 0, -1, 0)[action], 0), rows - 1)
            column = min(max(column + (0, 1, 0, -1)[action], 0), columns - 1)
            if row == 0 and column == columns - 1:
                return [(1.0, goal - 1.0, None)]
            after = row * columns + column
            if row == 0 and column > 0:
                return [(1.0 - slip, -1.0, after), (slip, -1.0 - loss, after)]
            return [(1.0, -1.0, after)]

        mdp = FiniteMDP.of([[outcomes(s, a) for a in range(4)] for s in range(rows * columns)])
        super().__init__(num_envs, mdp=mdp, horizon=horizon, **options)


class Homeostat(FiniteEnv):
    """Two variables, food and water: action 0 rests, 1 eats (+1, 0), 2 drinks (0, +1). After every action the body uses
    one unit of food with probability .25, or one of water with .25. The stock is the deviation from the set-points."""

    id = "ccrl/Homeostat-v0"
    objective = Homeostasis((-1.0, -1.0))

    @checked
    def __init__(self, num_envs: int = 1, *, horizon: Count = 4, **options: Any) -> None:
        def outcomes(food: float, water: float) -> list[Outcome]:
            return [(0.5, (food, water), 0), (0.25, (food - 1.0, water), 0), (0.25, (food, water - 1.0), 0)]

        mdp = FiniteMDP.of([[outcomes(0.0, 0.0), outcomes(1.0, 0.0), outcomes(0.0, 1.0)]])
        super().__init__(num_envs, mdp=mdp, horizon=horizon, **options)


class CostBudget(FiniteEnv):
    """Earn while costs stay within a budget: rewards are ``(earned, -cost)``. Action 0 rests (0, 0), 1 works (1, 0 or
    -1 with .5 each), 2 hurries (3, 0 or -3 with .5 each). The objective is the mean earned less three times the mean
    cost beyond the budget of 3: ``x_0 + 3 min(x_1, 0)`` with ``c_0 = (0, 3)``."""

    id = "ccrl/CostBudget-v0"
    objective = SoftConstraints((-3.0,), trade_off=3.0)

    @checked
    def __init__(self, num_envs: int = 1, *, horizon: Count = 4, **options: Any) -> None:
        table: list[list[Outcome]] = [
            [(1.0, (0.0, 0.0), 0)],
            [(0.5, (1.0, 0.0), 0), (0.5, (1.0, -1.0), 0)],
            [(0.5, (3.0, 0.0), 0), (0.5, (3.0, -3.0), 0)],
        ]
        super().__init__(num_envs, mdp=FiniteMDP.of([table]), horizon=horizon, **options)
