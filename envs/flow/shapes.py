"""Images of 8 x 8 pixels: five shapes at a few places, a mixture of Gaussians in 64 dimensions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ccrl.settings import Positive, checked
from envs.flow.mixture import MixtureTask

__all__ = ["SHAPES", "Shapes", "draw_shape"]

SHAPES = ("square", "frame", "cross", "triangle", "disc")
"""The condition's number is the shape's place in this list."""


class Shapes(MixtureTask):
    """Pixels are about -1 (dark) and 1 (light); the condition names the shape, its place varies by a pixel.

    ``gold`` is the probability of the condition's shape among all shapes, given the image, times how near the image is
    to the nearest clean one (``exp(-||x - m||^2 / (2 * 64 * 0.25))``). ``reward="bright"`` is the mean pixel, a proxy
    that white images satisfy; ``"match"`` is the gold reward.

    Args:
        std: of the noise on every pixel.
        reward: see above.
    """

    shape = (8, 8)
    """Of an image, for pictures."""

    @checked
    def __init__(self, std: Positive = 0.2, reward: Literal["match", "bright"] = "match") -> None:
        places = [(dy, dx) for dy in (0, 1) for dx in (0, 1)]
        means = torch.stack([draw_shape(name, *place) for name in SHAPES for place in places])
        weights = torch.zeros(len(SHAPES), len(means))
        for i in range(len(SHAPES)):
            weights[i, i * len(places) : (i + 1) * len(places)] = 1.0 / len(places)
        super().__init__("shapes", means, torch.full((len(means),), std), weights)
        self.kind = reward

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        squared = torch.cdist(sample, self.means.to(sample)).square()
        own = self.weights.to(sample)[label] > 0.0
        # templates are far apart against the pixel noise: one temperature keeps the share of a shape off 0 and 1
        share = torch.where(own, (-squared / 8.0).softmax(1), 0.0).sum(1)
        near = squared.masked_fill(~own, torch.inf).amin(1)
        return share * (-near / (2.0 * 64.0 * 0.25)).exp()

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        return self.gold(sample, label) if self.kind == "match" else sample.mean(1)


def draw_shape(name: str, dy: int = 0, dx: int = 0) -> Tensor:
    """The clean image ``[64]`` of a shape, moved by ``dy`` rows and ``dx`` columns (0 or 1)."""
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    y, x = y - dy - 1, x - dx - 1  # a box of 6 x 6 pixels, from 0 to 5
    inside = (y >= 0) & (y < 6) & (x >= 0) & (x < 6)
    edge = (y == 0) | (y == 5) | (x == 0) | (x == 5)
    light = {
        "square": (y > 0) & (y < 5) & (x > 0) & (x < 5),
        "frame": edge,
        "cross": (y == x) | (y + x == 5),
        "triangle": (2 * (x - 2.5).abs() <= y) & (y < 6),
        "disc": (x - 2.5).square() + (y - 2.5).square() < 6.6,
    }[name]
    return torch.where(light & inside, 1.0, -1.0).flatten()
