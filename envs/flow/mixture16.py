"""Tasks in 16 dimensions (any number): one Gaussian, and mixtures with a reward model that can be hacked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from ccrl.settings import Count, Natural, Positive, checked
from envs.flow.mixture import MixtureTask, bump

__all__ = ["Mixture16", "Normal", "linear_reward_model"]


class Normal(MixtureTask):
    """``N(0, std^2 I)``; the reward is the first coordinate.

    Args:
        dimensions: of a sample.
        conditions: all alike: groups of samples to compare.
        std: of every dimension.
    """

    @checked
    def __init__(self, dimensions: Count = 16, conditions: Count = 1, std: Positive = 1.0) -> None:
        super().__init__("normal", torch.zeros(1, dimensions), torch.full((1,), std), torch.ones(conditions, 1))

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        return sample[:, 0]


class Mixture16(MixtureTask):
    """Gaussians at random places; condition ``c`` wants mode ``c`` and gets data of all of them.

    ``gold`` is the smooth bump at the wanted mode. ``reward="proxy"`` is a reward model fitted to it: the linear
    regression of the gold reward on data, whose coefficients are found by least squares on ``fitted`` samples. On the
    data it ranks the modes right. It has no maximum, so what is optimised against it leaves the data: the reward rises
    and the gold reward falls.

    Args:
        dimensions: of a sample.
        modes: Gaussians.
        conditions: number of conditions, at most ``modes``.
        std: of a Gaussian.
        spread: deviation of the modes' coordinates.
        width: of the gold bump.
        reward: proxy or gold.
        fitted: samples that the reward model is fitted on.
        seed: of the modes.
    """

    @checked
    def __init__(
        self,
        dimensions: Count = 16,
        modes: Count = 6,
        conditions: Count = 4,
        std: Positive = 0.3,
        spread: Positive = 1.0,
        width: Positive = 2.0,
        reward: Literal["proxy", "gold"] = "proxy",
        fitted: Count = 4096,
        seed: Natural = 0,
    ) -> None:
        if conditions > modes:
            raise ValueError(f"mixture16: expected at most as many conditions as modes, got {conditions} and {modes}")
        generator = torch.Generator().manual_seed(seed)
        means = spread * torch.randn(modes, dimensions, generator=generator)
        super().__init__("mixture16", means, torch.full((modes,), std),
                         torch.full((conditions, modes), 1.0 / modes))  # fmt: skip
        self.kind, self.width = reward, width
        self.coefficients = linear_reward_model(self, fitted, generator)
        """``[C, D + 1]``, the intercept last."""

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        return bump(sample, self.means.to(sample)[label], self.width)

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        if self.kind == "gold":
            return self.gold(sample, label)
        found = self.coefficients.to(sample)[label]
        return (sample * found[:, :-1]).sum(1) + found[:, -1]


def linear_reward_model(task: MixtureTask, n: int, generator: Generator) -> Tensor:
    """Least-squares coefficients ``[C, D + 1]`` of ``task.gold`` on ``n`` data samples per condition."""
    rows = []
    for c in range(task.conditions):
        label = torch.full((n,), c)
        x = task.data(label, generator)
        inputs = torch.cat([x, torch.ones(n, 1)], 1).double()
        target = task.gold(x, label).double()
        rows.append(torch.linalg.lstsq(inputs, target.unsqueeze(1)).solution.squeeze(1))
    return torch.stack(rows).float()
