"""Tasks in the plane: a ring of Gaussians, two moons."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ccrl.settings import Count, Positive, checked
from envs.flow.mixture import MixtureTask, bump

__all__ = ["Moons", "Ring2d"]


class Ring2d(MixtureTask):
    """Eight Gaussians on a circle, the same for every condition; condition ``c`` wants one of them.

    ``reward="mode"`` is ``exp(-||x - m||^2 / (2 width^2))`` for the mode ``stride c`` of condition ``c``; ``"outward"``
    is the coordinate along that mode, which has no maximum: samples that leave the data are paid for it, while ``gold``
    stays the bump. ``"both"`` has the two as components.

    Rewards of conditions may have scales of their own, as those of tasks that have nothing to do with each other do:
    methods that divide by one deviation for all then learn the small ones last. ``gold`` is not scaled.

    Args:
        modes: Gaussians on the circle.
        conditions: number of conditions.
        radius: of the circle.
        std: of a Gaussian.
        width: of the bump.
        stride: modes between the wanted ones of two conditions.
        reward: see above.
        scales: a factor per condition; empty: 1.

    Raises:
        ValueError: another number of scales than of conditions, or one that is not positive.
    """

    @checked
    def __init__(
        self,
        modes: Count = 8,
        conditions: Count = 4,
        radius: Positive = 2.0,
        std: Positive = 0.15,
        width: Positive = 0.5,
        stride: Count = 2,
        reward: Literal["mode", "outward", "both"] = "mode",
        scales: tuple[float, ...] = (),
    ) -> None:
        factors = tuple(scales) or (1.0,) * conditions
        if len(factors) != conditions or not all(0.0 < x < math.inf for x in factors):
            raise ValueError(f"ring2d: expected a positive scale for each of {conditions} conditions, got {scales}")
        angle = 2.0 * math.pi * torch.arange(modes) / modes
        means = radius * torch.stack([angle.cos(), angle.sin()], 1)
        names = {"mode": ("reward",), "outward": ("outward",), "both": ("mode", "outward")}
        super().__init__("ring2d", means, torch.full((modes,), std),
                         torch.full((conditions, modes), 1.0 / modes), names[reward])  # fmt: skip
        self.kind, self.width, self.radius = reward, width, radius
        self.scales = torch.tensor(factors)
        self.wanted = means[torch.arange(conditions) * stride % modes]
        """``[C, 2]``: the mode that each condition wants."""

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        return bump(sample, self.wanted.to(sample)[label], self.width)

    def score(self, sample: Tensor, label: Tensor) -> Tensor:
        outward = (sample * self.wanted.to(sample)[label]).sum(1) / self.radius**2
        parts = {"mode": (self.gold(sample, label),), "outward": (outward,)}
        found = torch.stack(parts.get(self.kind, (*parts["mode"], *parts["outward"])), 1)
        return found * self.scales.to(sample)[label].unsqueeze(1)

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        return self.score(sample, label).sum(1)


class Moons(MixtureTask):
    """Two interleaved half circles, each of ``points`` narrow Gaussians; the condition names the moon (both: -1).

    The reward is high toward the moon's tips: ``|x - centre of the moon| / radius`` along its axis, in [0, 1] on the
    data and unbounded beyond (``reward="tips"``), or the smooth bump at its right tip (``"tip"``).

    Args:
        points: Gaussians per moon.
        std: of each.
        reward: see above.
    """

    @checked
    def __init__(self, points: Count = 24, std: Positive = 0.08, reward: Literal["tip", "tips"] = "tip") -> None:
        angle = math.pi * (torch.arange(points) + 0.5) / points
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
        means = torch.cat([upper, -upper])
        weights = torch.zeros(2, 2 * points)
        weights[0, :points] = weights[1, points:] = 1.0 / points
        super().__init__("moons", means, torch.full((2 * points,), std), weights)
        self.kind = reward
        self.centre = torch.tensor([-0.5, 0.5])
        self.tip = torch.stack([upper[0], -upper[-1]])

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        return bump(sample, self.tip.to(sample)[label], 0.3)

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        if self.kind == "tip":
            return self.gold(sample, label)
        return (sample[:, 0] - self.centre.to(sample)[label]).abs()
