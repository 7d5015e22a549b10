"""Exact occupancy measures of small deterministic tasks with a true and a proxy reward."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Agreement", "ExactTask"]


class Agreement(NamedTuple):
    """How a proxy goes with the true reward under a reference."""

    correlation: float
    """Of the two rewards over the reference's occupancy measure: ``r``."""
    sigma_true: float
    sigma_proxy: float


@dataclass(frozen=True)
class ExactTask:
    """A deterministic Markov decision process without end.

    An occupancy measure is ``mu(s, a) = (1 - gamma) sum_t gamma^t P(s_t = s, a_t = a)``, ``[S, A]``, of sum 1; a return
    is ``sum mu R``, so that it has the scale of a reward.
    """

    successor: Tensor
    """``[S, A]`` int64."""
    true: Tensor
    """``[S, A]`` float64."""
    proxy: Tensor
    """``[S, A]`` float64."""
    start: int
    gamma: float

    @functools.cached_property
    def reachable(self) -> Tensor:
        """Numbers of the states that can be reached from the start, sorted."""
        found = torch.zeros(len(self.successor), dtype=torch.bool)
        found[self.start] = True
        while not bool(found[self.successor[found]].all()):
            found[self.successor[found]] = True
        return found.nonzero().squeeze(1)

    def occupancy(self, policy: Tensor) -> Tensor:
        """``mu`` of ``policy [S, A]`` (rows sum to 1) by one linear solve over the reachable states, differentiable."""
        states, rows = len(self.reachable), self.reachable
        place = torch.zeros(len(self.successor), dtype=torch.int64)
        place[rows] = torch.arange(states)
        to, chosen = place[self.successor[rows]], policy[rows]
        origin = torch.arange(states).unsqueeze(1).expand_as(to)
        flow = torch.zeros(states, states, dtype=policy.dtype)
        flow = flow.index_put((origin.flatten(), to.flatten()), chosen.flatten(), accumulate=True)
        first = torch.zeros(states, dtype=policy.dtype)
        first[place[self.start]] = 1.0 - self.gamma
        visits: Tensor = torch.linalg.solve(torch.eye(states, dtype=policy.dtype) - self.gamma * flow.T, first)
        return torch.zeros_like(policy).index_copy(0, rows, visits.unsqueeze(1) * chosen)

    def greedy(self, reward: Tensor, tolerance: float = 1e-9) -> Tensor:
        """The optimal policy for ``reward [S, A]``, uniform over actions whose values are equal up to ``tolerance``
        (relative to the largest reward, where that is above 1), by policy iteration."""
        slack = tolerance * max(1.0, float(reward.abs().max()))
        states = torch.arange(len(reward))
        choice, eye = reward.argmax(1), torch.eye(len(reward), dtype=torch.float64)
        while True:
            flow = torch.zeros_like(eye)
            flow[states, self.successor[states, choice]] = 1.0
            value = torch.linalg.solve(eye - self.gamma * flow, reward[states, choice])
            q = reward + self.gamma * value[self.successor]
            better, now = q.max(1), q[states, choice]
            # only what is really better: rounding would let equal actions take turns for ever
            improves = better.values > now + 0.1 * slack
            if not bool(improves.any()):
                break
            choice = torch.where(improves, better.indices, choice)
        best: Tensor = (q >= q.amax(1, keepdim=True) - slack).double()
        return best / best.sum(1, keepdim=True)

    def reference(self, share: float = 0.4) -> Tensor:
        """``share`` of the greedy policy for the true reward and ``1 - share`` of the uniform one, ``[S, A]``."""
        actions = self.successor.shape[1]
        return share * self.greedy(self.true) + (1.0 - share) / actions

    def agreement(self, occupancy: Tensor) -> Agreement:
        """Correlation and deviations of the rewards under an occupancy measure; the correlation with a reward that does
        not vary there is NaN."""
        means = [(occupancy * x).sum() for x in (self.true, self.proxy)]
        true, proxy = self.true - means[0], self.proxy - means[1]
        sigma = [float((occupancy * x.square()).sum().sqrt()) for x in (true, proxy)]
        both = sigma[0] * sigma[1]
        return Agreement(float((occupancy * true * proxy).sum()) / both if both else math.nan, *sigma)
