"""Statistics per group of columns: labels ``[N]``, groups of any size, no loop over groups.

In float64 whatever comes in: a z-score divides by differences of nearly equal rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccrl.data import Data

__all__ = ["Groups", "components", "per_step"]


class Groups:
    """Columns with equal labels belong together.

    :param label: ``[N]`` integers, any; groups are numbered in the order of their labels.
    """

    def __init__(self, label: Tensor) -> None:
        index: Tensor
        count: Tensor
        _, index, count = torch.unique(label, return_inverse=True, return_counts=True)
        self.index = index
        """``[N]``: number of each column's group."""
        self.count = count.double()
        """``[Q]``: columns per group."""

    def sum(self, x: Tensor) -> Tensor:
        """``[Q]`` of ``x`` ``[N]``."""
        return torch.zeros_like(self.count).index_add(0, self.index, x.double())

    def mean(self, x: Tensor) -> Tensor:
        """``[Q]`` of ``x`` ``[N]``."""
        return self.sum(x) / self.count

    def constant(self, x: Tensor) -> Tensor:
        """``[Q]`` bool: all columns of the group have one value (a group of one always)."""
        x = x.double()
        high = torch.full_like(self.count, -torch.inf).scatter_reduce(0, self.index, x, "amax")
        low = torch.full_like(self.count, torch.inf).scatter_reduce(0, self.index, x, "amin")
        return high == low

    def z_score(self, x: Tensor, *, ddof: int = 1, eps: float = 0.0, single: str = "zero") -> Tensor:
        """``(x - mean) / (std + eps)`` inside the groups, ``[N]``.

        Equal values give exactly 0, whatever the rounding of their mean; a group of one too, or ``x / (1 + eps)`` with
        ``single="keep"`` (mean 0, deviation 1).
        """
        x = x.double()
        centred = x - self.mean(x)[self.index]
        std = (self.sum(centred.square()) / (self.count - ddof).clamp_min(1.0)).sqrt()[self.index]
        constant = self.constant(x)[self.index]
        # where constant the divisor may be 0 with eps = 0; its quotient is not used
        result = torch.where(constant, 0.0, centred / torch.where(constant, 1.0, std + eps))
        return torch.where(self.count[self.index] == 1, x / (1.0 + eps), result) if single == "keep" else result


def components(data: Data) -> Tensor:
    """``[N, C]``: the reward's components, or the episode's reward where nothing else is known (control episodes)."""
    return data["reward_components"] if "reward_components" in data else data["episode_reward"].unsqueeze(1)


def per_step(data: Data, advantage: Tensor) -> Data:
    """``advantage`` ``[T, N]`` on the valid rows from one number per column ``[N]``, in the type of
    ``episode_reward``."""
    advantage = advantage.to(data["episode_reward"].dtype)
    return data.derive(advantage=advantage.expand(data.shape[0], -1) * data["valid"])
