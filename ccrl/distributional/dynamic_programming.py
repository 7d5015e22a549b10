"""Distributional value and policy iteration on a grid of stocks, batched over states and stocks, on any device.

Laws of the return ``G(s, c)`` are kept for every state ``[S]`` and every stock ``[S, C]`` of that state's grid, as at
most ``K`` weighted atoms. A stock between two of the grid takes the mixture of their laws, one outside the nearest
end's. With every reachable stock in the grid, and no more atoms than fit, the result is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccrl.distributional.laws import Law, compress, wasserstein
from ccrl.distributional.mdp import FiniteMDP
from ccrl.distributional.objectives import Objective, outer_search

__all__ = ["StockGrid", "Sweep", "reachable_stocks", "shortfall_range"]


class Sweep(NamedTuple):
    """Laws ``[S, C, K]``, and the actions ``[S, C]`` int64 that made them."""

    law: Law
    action: Tensor


class StockGrid:
    """A finite process with stocks on a grid: Bellman operators on laws, value iteration, policy iteration.

    :param stocks: the grid, ``[C]`` for all states or ``[S, C]``, increasing along the last axis.
    :param atoms: ``K``, atoms per law; laws of more become their ``K`` quantiles.
    :raises ValueError: rewards that are vectors (their laws on a grid: ``ExactOracle``), a grid that does not increase,
        or a discount that the objective cannot have.
    """

    def __init__(self, mdp: FiniteMDP, stocks: Tensor, objective: Objective, gamma: float, *, atoms: int = 64) -> None:
        objective.check_discount(gamma)
        if mdp.dims or objective.dims:
            raise ValueError("StockGrid: expected rewards that are numbers; vectors are for ExactOracle and DetaN")
        stocks = stocks.expand(mdp.states, -1) if stocks.dim() == 1 else stocks
        if stocks.shape[0] != mdp.states or stocks.dim() != 2 or bool((stocks.diff(dim=-1) < 0).any()):
            raise ValueError(f"stocks: expected [C] or [{mdp.states}, C], increasing, got {tuple(stocks.shape)}")
        if atoms < 1:
            raise ValueError(f"atoms: expected >= 1, got {atoms}")
        self.mdp, self.objective, self.gamma, self.size = mdp, objective, gamma, atoms
        self.stocks = stocks.contiguous()
        low, high, share = self._neighbours()
        self._low, self._high, self._share = low, high, share
        self._exact = not bool((share > 0).any())

    def _neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every successor stock ``(c + R) / gamma`` ``[S, C, A, O]``: two places in the grid, the second's share."""
        after = (self.stocks[:, :, None, None] + self.mdp.reward[:, None]) / self.gamma
        grid = self.stocks[self.mdp.successor]  # [S, A, O, C]
        wanted = after.permute(0, 2, 3, 1).contiguous()
        last = grid.shape[-1] - 1
        high = torch.searchsorted(grid.contiguous(), wanted - 1e-9).clamp_max(last)
        low = (high - 1).clamp_min(0)
        left, right = grid.gather(-1, low), grid.gather(-1, high)
        share = ((wanted - left) / (right - left).clamp_min(1e-300)).clamp(0.0, 1.0)
        # a stock of the grid, and what lies outside, has one neighbour
        one = ((wanted - right).abs() < 1e-9) | (wanted > right) | (high == 0)
        low = torch.where(one, high, low)
        share = torch.where(one | (low == high), torch.zeros_like(share), share)
        places = (x.permute(0, 3, 1, 2) for x in (low, high, share))
        low, high, share = places
        return low, high, share

    # -- operators ---------------------------------------------------------------------------------------------------

    def start(self, value: float = 0.0) -> Law:
        """``eta_0``: the return is ``value``, everywhere."""
        atoms = torch.full((*self.stocks.shape, 1), value, dtype=self.stocks.dtype, device=self.stocks.device)
        return Law(atoms, torch.ones_like(atoms))

    def of_action(self, law: Law, action: Tensor) -> Law:
        """Laws ``[S, C, *]`` of ``R + gamma G(S', (c + R) / gamma)`` after ``action`` ``[S, C]``, uncompressed."""
        states, stocks = self.stocks.shape
        row = torch.arange(states, device=action.device)[:, None]
        column = torch.arange(stocks, device=action.device)[None, :]
        p, r = self.mdp.probability[row, action], self.mdp.reward[row, action]  # [S, C, O]
        after, ends = self.mdp.successor[row, action], self.mdp.ends[row, action]
        low, high, share = (x[row, column, action] for x in (self._low, self._high, self._share))
        parts = [(low, 1.0 - share)] if self._exact else [(low, 1.0 - share), (high, share)]
        atoms, weights = [], []
        for place, part in parts:
            x = torch.where(ends[..., None], 0.0, law.atoms[after, place])  # [S, C, O, K]
            atoms.append((r[..., None] + self.gamma * x).flatten(2))
            weights.append(((p * part)[..., None] * law.weights[after, place]).flatten(2))
        return Law(torch.cat(atoms, -1), torch.cat(weights, -1))

    def utilities(self, law: Law) -> Tensor:
        """``E f(c + Z(s, c, a))`` ``[S, C, A]``."""
        found = []
        for a in range(self.mdp.actions):
            z = self.of_action(law, torch.full(self.stocks.shape, a, dtype=torch.int64, device=self.stocks.device))
            found.append((z.weights * self.objective.utility(self.stocks[..., None] + z.atoms)).sum(-1))
        return torch.stack(found, -1)

    def greedy(self, law: Law) -> Tensor:
        """The best action ``[S, C]``; ties within 1e-10 go to the lowest number."""
        q = self.utilities(law)
        return (q >= q.amax(-1, keepdim=True) - 1e-10).long().argmax(-1)

    def evaluate_once(self, law: Law, action: Tensor) -> Law:
        """One application of the policy's operator: a gamma-contraction in the largest 1-Wasserstein distance."""
        return compress(self.of_action(law, action), self.size)

    def improve(self, law: Law) -> Sweep:
        """One application of the optimality operator: greedy action, then its operator. No contraction by itself."""
        action = self.greedy(law)
        return Sweep(self.evaluate_once(law, action), action)

    # -- iterations --------------------------------------------------------------------------------------------------

    def value_iteration(self, sweeps: int, law: Law | None = None) -> Sweep:
        """``sweeps`` applications of the optimality operator, from ``law`` (None: return 0).

        With ``f`` L-Lipschitz and gamma < 1 the loss is at most ``L gamma^sweeps`` times the distance of the first laws
        to those of policies; over a finite horizon it is 0 after as many sweeps.
        """
        sweep = Sweep(self.start() if law is None else law, torch.zeros_like(self.stocks, dtype=torch.int64))
        for _ in range(sweeps):
            sweep = self.improve(sweep.law)
        return sweep

    def evaluate(self, action: Tensor, sweeps: int, tolerance: float = 1e-12) -> Law:
        """The policy's laws: ``sweeps`` applications of its operator, fewer where the laws have stopped moving."""
        law = self.start()
        for _ in range(sweeps):
            new = self.evaluate_once(law, action)
            if float(wasserstein(new, law).max()) <= tolerance:
                return new
            law = new
        return law

    def policy_iteration(self, sweeps: int, action: Tensor | None = None, rounds: int = 100) -> tuple[Sweep, int]:
        """Evaluate in ``sweeps`` applications, then act greedily, until no action improves; also the rounds it took.

        :raises RuntimeError: not stable after ``rounds``.
        """
        action = (
            torch.zeros(self.stocks.shape, dtype=torch.int64, device=self.stocks.device) if action is None else action
        )
        for done in range(1, rounds + 1):
            law = self.evaluate(action, sweeps)
            q = self.utilities(law)
            own = q.gather(-1, action[..., None]).squeeze(-1)
            # only strict improvements: two policies of equal value would take turns for ever
            better = torch.where(q.amax(-1) > own + 1e-10, self.greedy(law), action)
            if bool((better == action).all()):
                return Sweep(law, action), done
            action = better
        raise RuntimeError(f"policy iteration: expected a stable policy within {rounds} rounds; raise rounds")

    # -- results -----------------------------------------------------------------------------------------------------

    def values(self, law: Law) -> Tensor:
        """``E f(c + G(s, c))`` ``[S, C]``."""
        return (law.weights * self.objective.utility(self.stocks[..., None] + law.atoms)).sum(-1)

    def search(self, law: Law, state: int = 0, starts: Sequence[float] | None = None) -> tuple[float, float]:
        """``(c_0*, value)`` from ``state``, over the state's grid or those of its stocks that are among ``starts``."""
        grid, values = self.stocks[state], self.values(law)[state]
        if starts is not None:
            wanted = torch.tensor(list(starts), dtype=grid.dtype, device=grid.device)
            chosen = ((grid[:, None] - wanted).abs() < 1e-9).any(-1)
            grid, values = grid[chosen], values[chosen]
        elif not self.objective.searched:
            place = (grid - float(self.objective.start)).abs().argmin()  # type: ignore[arg-type]
            return float(grid[place]), float(values[place])
        start, value = outer_search(self.objective, grid, values)
        return float(start), float(value)


def reachable_stocks(mdp: FiniteMDP, horizon: int, gamma: float, starts: Sequence[float], state: int = 0) -> Tensor:
    """The grid ``[horizon * S, C]`` of ``mdp.timed(horizon)`` with every stock that any actions reach from ``starts``
    in ``state`` at step 0; shorter rows repeat their last stock."""
    at: dict[int, set[float]] = {state: {round(float(c), 10) for c in starts}}
    rows: list[list[float]] = []
    for _ in range(horizon):
        rows += [sorted(at.get(s, {0.0})) for s in range(mdp.states)]
        after: dict[int, set[float]] = {}
        for s, stocks in at.items():
            for a in range(mdp.actions):
                for _, r, nxt in mdp.outcomes(s, a):
                    if nxt is not None:
                        after.setdefault(nxt, set()).update(round((c + r) / gamma, 10) for c in stocks)
        at = after
    most = max(len(row) for row in rows)
    return torch.tensor([row + [row[-1]] * (most - len(row)) for row in rows], dtype=torch.float64)


def shortfall_range(low: float, high: float) -> tuple[float, float]:
    """Stocks outside which the best action of ``f(x) = min(x, 0)`` no longer changes, for returns in ``[low, high]``:
    below ``-high`` it is the mean's, above ``-low`` any action is best. :raises ValueError: ``low > high``."""
    if low > high:
        raise ValueError(f"expected low <= high, got {low} and {high}")
    return -high, -low
