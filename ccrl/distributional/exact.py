"""The exact finite-horizon oracle: laws of the return of the best policy from every reachable stock, in float64.

Plain Python on purpose: a few thousand states and stocks, and nothing shared with what it checks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccrl.distributional.laws import Law
from ccrl.distributional.mdp import FiniteMDP
from ccrl.distributional.objectives import Objective, outer_search

__all__ = ["ExactOracle", "Solution", "best_stock_free", "law_of", "scalar_value"]

Stock = float | tuple[float, ...]
Policy = Callable[[int, int, Stock], int]
"""``(t, state, stock) -> action``."""

_Atoms = dict[Any, float]


class Solution(NamedTuple):
    """The best start, the objective's value there, the first action, and the law of the return (``[K]``)."""

    start: Stock
    value: float
    action: int
    law: Law


class ExactOracle:
    """The best policy of a stock-augmented process over ``horizon`` steps.

    Backwards in time, ``eta(t, s, c)`` is the law of the return from step ``t`` of the action that is greedy for
    ``E f(c + R + gamma G(s', (c + R) / gamma))``; every reached ``(t, s, c)`` is computed once. Ties within 1e-12 go to
    the action with the lowest number.

    :param gamma: of the stock and of the return.
    :raises ValueError: a discount that the objective cannot have, or vectors of another length than its own.
    """

    def __init__(self, mdp: FiniteMDP, horizon: int, objective: Objective, gamma: float = 1.0) -> None:
        objective.check_discount(gamma)
        if mdp.dims != objective.dims:
            raise ValueError(
                f"{type(objective).__name__}: expected rewards of {objective.dims} numbers, got {mdp.dims}"
            )
        if horizon < 1:
            raise ValueError(f"horizon: expected >= 1, got {horizon}")
        self.mdp, self.horizon, self.objective, self.gamma = mdp, horizon, objective, gamma
        self._rows = [[mdp.outcomes(s, a) for a in range(mdp.actions)] for s in range(mdp.states)]
        self._known: dict[tuple[int, int, Stock], tuple[_Atoms, int]] = {}

    def law(self, state: int, stock: Stock, t: int = 0) -> tuple[Law, int]:
        """The law of the best policy's return from there, and its action (0 after the end)."""
        atoms, action = self._solve(t, state, stock)
        return _law(atoms), action

    def policy(self, t: int, state: int, stock: Stock) -> int:
        """The best action."""
        return self._solve(t, state, stock)[1]

    def attainable(self, state: int) -> list[float]:
        """Every return that some actions have with positive probability, sorted (rewards that are numbers)."""
        at: dict[int, set[float]] = {state: {0.0}}
        done: set[float] = set()
        for t in range(self.horizon):
            after: dict[int, set[float]] = {}
            for s, sums in at.items():
                for _, r, nxt in itertools.chain.from_iterable(self._rows[s]):
                    moved = {round(x + self.gamma**t * r, 12) for x in sums}
                    if nxt is None:
                        done |= moved
                    else:
                        after.setdefault(nxt, set()).update(moved)
            at = after
        return sorted(done.union(*at.values()) if at else done)

    def solve(self, state: int = 0, objective: Objective | None = None) -> Solution:
        """The optimum of the objective from ``state``, with the outer search where the objective has one.

        ``objective`` searches ``c_0`` for another one of the same greedy actions, whose utility is a positive multiple:
        one oracle then serves every CVaR level.

        Exact: for one policy, a function of ``c_0`` with kinks at minus the returns is largest at a kink; smooth
        utilities are searched by turns of policy and ``c_0``, which ends at once where the policy does not depend on
        ``c_0`` (the entropic one).
        """
        f = self.objective if objective is None else objective
        if not f.searched:
            law, action = self.law(state, f.start)
            return Solution(f.start, float((law.weights * f.utility(_shifted(f.start, law))).sum()), action, law)
        if f.degree is None:
            start = 0.0
            for _ in range(100):
                law, _ = self.law(state, start)
                again = float(f.best_start(law.atoms, law.weights))
                if abs(again - start) < 1e-12:
                    break
                start = again
            law, action = self.law(state, start)
            return Solution(start, float(f.value(law.atoms, law.weights)), action, law)
        starts = torch.tensor([-b for b in self.attainable(state)], dtype=torch.float64)
        laws = [self.law(state, c)[0] for c in starts.tolist()]
        inner = torch.stack([(x.weights * f.utility(c + x.atoms)).sum() for c, x in zip(starts, laws)])
        found, value = outer_search(f, starts, inner)
        law, action = self.law(state, float(found))
        return Solution(float(found), float(value), action, law)

    def _solve(self, t: int, state: int, stock: Stock) -> tuple[_Atoms, int]:
        if t == self.horizon:
            return {_zero(stock): 1.0}, 0
        key = (t, state, _rounded(stock))
        if key not in self._known:
            best: tuple[float, _Atoms, int] | None = None
            for action, outcomes in enumerate(self._rows[state]):
                atoms: _Atoms = {}
                for p, r, nxt in outcomes:
                    later = {_zero(stock): 1.0} if nxt is None else self._solve(t + 1, nxt, self.moved(stock, r))[0]
                    for x, q in later.items():
                        total = _rounded(_add(r, x, self.gamma), 12)
                        atoms[total] = atoms.get(total, 0.0) + p * q
                law = _law(atoms)
                value = float((law.weights * self.objective.utility(_shifted(stock, law))).sum())
                if best is None or value > best[0] + 1e-12:
                    best = (value, atoms, action)
            assert best is not None
            self._known[key] = best[1:]
        return self._known[key]

    def moved(self, stock: Stock, reward: Any) -> Stock:
        """``(c + R) / gamma``."""
        if isinstance(stock, tuple):
            return tuple((c + r) / self.gamma for c, r in zip(stock, reward))
        return float((stock + reward) / self.gamma)


def law_of(mdp: FiniteMDP, policy: Policy, horizon: int, gamma: float = 1.0, state: int = 0, start: Stock = 0.0) -> Law:
    """The exact law of the return of any policy that sees step, state and stock; probabilities of equal returns are
    summed, so it is as many atoms as there are returns."""

    def move(stock: Stock, reward: Any) -> Stock:
        if isinstance(stock, tuple):
            return tuple((c + r) / gamma for c, r in zip(stock, reward))
        return float((stock + reward) / gamma)

    # (state, stock, return so far) -> probability
    at: dict[tuple[int, Stock, Any], float] = {(state, start, _zero(start)): 1.0}
    done: _Atoms = {}
    for t in range(horizon):
        after: dict[tuple[int, Stock, Any], float] = {}
        for (s, stock, total), weight in at.items():
            for p, r, nxt in mdp.outcomes(s, policy(t, s, stock)):
                new = _rounded(_add(total, r, gamma**t), 12)
                if nxt is None or t + 1 == horizon:
                    done[new] = done.get(new, 0.0) + weight * p
                else:
                    key = (nxt, _rounded(move(stock, r)), new)
                    after[key] = after.get(key, 0.0) + weight * p
        at = after
    return _law(done)


def scalar_value(
    mdp: FiniteMDP, horizon: int, objective: Objective, gamma: float, state: int, stock: Stock, t: int = 0
) -> float:
    """``max E f(c + G)`` by a recursion on numbers, for homogeneous utilities of degree 1 (any with gamma 1):
    ``V(T, c) = f(c)``, ``V(t, s, c) = gamma max_a E V(t + 1, s', (c + R) / gamma)``. It knows no laws, so it checks
    the oracle that does."""
    known: dict[tuple[int, int, Stock], float] = {}
    oracle = ExactOracle(mdp, horizon, objective, gamma)

    def terminal(c: Stock) -> float:
        return float(objective.utility(torch.tensor(c, dtype=torch.float64)))

    def value(t: int, s: int, c: Stock) -> float:
        if t == horizon:
            return terminal(c)
        key = (t, s, _rounded(c))
        if key not in known:
            known[key] = gamma * max(
                sum(
                    p * (terminal(oracle.moved(c, r)) if nxt is None else value(t + 1, nxt, oracle.moved(c, r)))
                    for p, r, nxt in mdp.outcomes(s, a)
                )
                for a in range(mdp.actions)
            )
        return known[key]

    return value(t, state, stock)


def best_stock_free(
    mdp: FiniteMDP, horizon: int, objective: Objective, gamma: float = 1.0, state: int = 0, most: int = 20_000
) -> tuple[float, tuple[int, ...]]:
    """``(value, action per step)`` of the best deterministic policy that sees the step alone, by trying them all; the
    baseline of a process whose state is the step.

    :raises ValueError: more than ``most`` policies.
    """
    if mdp.actions**horizon > most:
        raise ValueError(f"best_stock_free: expected at most {most} policies, got {mdp.actions}^{horizon}")
    start = _zero(0.0 if mdp.dims == 0 else (0.0,) * mdp.dims)

    def scored() -> Iterator[tuple[float, tuple[int, ...]]]:
        for plan in itertools.product(range(mdp.actions), repeat=horizon):
            law = law_of(mdp, lambda t, s, c, plan=plan: plan[t], horizon, gamma, state, start)  # type: ignore[misc]
            yield float(objective.value(law.atoms, law.weights)), plan

    return max(scored(), key=lambda found: (round(found[0], 12), tuple(-a for a in found[1])))


def _law(atoms: _Atoms) -> Law:
    rows = sorted(atoms.items())
    return Law(
        torch.tensor([x for x, _ in rows], dtype=torch.float64), torch.tensor([p for _, p in rows], dtype=torch.float64)
    )


def _shifted(stock: Stock, law: Law) -> Tensor:
    return torch.tensor(stock, dtype=torch.float64) + law.atoms


def _zero(stock: Stock) -> Stock:
    return (0.0,) * len(stock) if isinstance(stock, tuple) else 0.0


def _rounded(x: Any, digits: int = 9) -> Any:
    """So that equal stocks and returns, summed in another order, are one."""
    return tuple(round(y, digits) for y in x) if isinstance(x, tuple) else round(x, digits)


def _add(first: Any, second: Any, factor: float) -> Any:
    """``first + factor * second``."""
    if isinstance(first, tuple):
        return tuple(a + factor * b for a, b in zip(first, second))
    return first + factor * second
