"""A gridworld as a generation task: a sample is an action in the plane, the condition a cell; several actions are
right.

An agent steps to the neighbour that its action points at. From most cells two of the four neighbours are one step
nearer to a goal: a Gaussian policy's mean lies between them, a flow has both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.settings import Count, Positive, checked
from envs.flow.mixture import MixtureTask

__all__ = ["MOVES", "GridActions"]

MOVES = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
"""Unit vectors (right, down, left, up) as (row, column)."""


class GridActions(MixtureTask):
    """``width x width`` cells with goals in two opposite corners; the data are the four moves, equally often.

    The reward is 1 for an action that brings the cell nearer to its nearest goal and 0 otherwise, times
    ``exp(-(|a| - 1)^2 / (2 * 0.25^2))``: actions of the wrong length count less. Conditions are the cells that are no
    goal. ``gold`` is the share of right actions, whatever their length.

    Args:
        width: of the grid.
        std: of the moves in the data.
    """

    @checked
    def __init__(self, width: Count = 5, std: Positive = 0.25) -> None:
        if width < 3:
            raise ValueError(f"gridworld: expected width >= 3, got {width}")
        cells = torch.cartesian_prod(torch.arange(width), torch.arange(width))
        goals = torch.tensor([[0, 0], [width - 1, width - 1]])
        free = ~(cells.unsqueeze(1) == goals).all(-1).any(-1)
        self.cells = cells[free]
        """``[C, 2]``: row and column of every condition."""
        self.width = width
        here = _far(self.cells, goals)
        after = (self.cells.unsqueeze(1) + MOVES.long()).clamp(0, width - 1)
        self.right = _far(after, goals) < here.unsqueeze(1)
        """``[C, 4]`` bool: which of the moves are right."""
        weights = torch.full((len(self.cells), 4), 0.25)
        super().__init__("gridworld", MOVES, torch.full((4,), std), weights)

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        """1 for a right action, ``[N]``."""
        chosen = (sample @ MOVES.to(sample).T).argmax(1)
        right: Tensor = self.right.to(sample.device)[label].gather(1, chosen.unsqueeze(1)).squeeze(1)
        return right.to(sample.dtype)

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        length: Tensor = sample.square().sum(1).sqrt()
        return self.gold(sample, label) * (-(length - 1.0).square() / (2.0 * 0.25**2)).exp()

    def both(self, sample: Tensor, label: Tensor) -> Tensor:
        """Smallest share of a right move among the samples of every cell that has two of them, ``[C']``: 0.5 where a
        policy uses both alike, 0 where it forgot one."""
        chosen = (sample @ MOVES.to(sample).T).argmax(1)
        count = torch.zeros(self.conditions, 4, device=sample.device)
        count.index_put_((label, chosen), torch.ones(len(label), device=sample.device), accumulate=True)
        right = self.right.to(sample.device)
        two = right.sum(1) == 2
        share = torch.where(right, count, torch.inf)[two].amin(1)
        found: Tensor = share / torch.where(right, count, 0.0)[two].sum(1).clamp_min(1.0)
        return found


def _far(cells: Tensor, goals: Tensor) -> Tensor:
    """Steps to the nearest goal, ``[...]``."""
    found: Tensor = (cells.unsqueeze(-2) - goals).abs().sum(-1).amin(-1)
    return found
