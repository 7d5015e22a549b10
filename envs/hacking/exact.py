"""Exact occupancy measures of small deterministic tasks with a true and a proxy reward."""

from __future__ import annotations

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

    def occupancy(self, policy: Tensor) -> Tensor:
        """``mu`` of ``policy [S, A]`` (rows sum to 1) by one linear solve, differentiable."""
        states, actions = self.successor.shape
        origin = torch.arange(states).unsqueeze(1).expand(states, actions)
        flow = torch.zeros(states, states, dtype=policy.dtype)
        flow = flow.index_put((origin.flatten(), self.successor.flatten()), policy.flatten(), accumulate=True)
        first = torch.zeros(states, dtype=policy.dtype)
        first[self.start] = 1.0 - self.gamma
        visits: Tensor = torch.linalg.solve(torch.eye(states, dtype=policy.dtype) - self.gamma * flow.T, first)
        return visits.unsqueeze(1) * policy

    def greedy(self, reward: Tensor, tolerance: float = 1e-9) -> Tensor:
        """The optimal policy for ``reward [S, A]``, uniform over actions whose values are equal up to ``tolerance``."""
        value = torch.zeros(len(reward), dtype=torch.float64)
        while True:
            q = reward + self.gamma * value[self.successor]
            new = q.amax(1)
            if float((new - value).abs().max()) < 1e-4 * tolerance:
                break
            value = new
        best = (q >= q.amax(1, keepdim=True) - tolerance).double()
        return best / best.sum(1, keepdim=True)

    def reference(self, share: float = 0.4) -> Tensor:
        """``share`` of the greedy policy for the true reward and ``1 - share`` of the uniform one, ``[S, A]``."""
        actions = self.successor.shape[1]
        return share * self.greedy(self.true) + (1.0 - share) / actions

    def agreement(self, occupancy: Tensor) -> Agreement:
        """Correlation and deviations of the rewards under an occupancy measure."""
        means = [(occupancy * x).sum() for x in (self.true, self.proxy)]
        true, proxy = self.true - means[0], self.proxy - means[1]
        sigma = [float((occupancy * x.square()).sum().sqrt()) for x in (true, proxy)]
        return Agreement(float((occupancy * true * proxy).sum()) / (sigma[0] * sigma[1]), *sigma)
