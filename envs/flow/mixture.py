"""Data from mixtures of isotropic Gaussians, with exact density and velocity; what every task here is made of."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ccrl.diffusion.closed_form import mixture_log_density, mixture_velocity

__all__ = ["MixtureTask", "bump"]


class MixtureTask:
    """``K`` Gaussians ``N(means[k], std[k]^2 I)``; condition ``c`` draws from them with ``weights[c]``.

    A subclass gives ``reward`` and, where the reward is not what is wanted, ``gold``.

    Args:
        name: of the task.
        means: ``[K, D]``.
        std: ``[K]``.
        weights: ``[C, K]``, rows that sum to 1.
        components: names of the reward's components.
    """

    def __init__(
        self, name: str, means: Tensor, std: Tensor, weights: Tensor, components: tuple[str, ...] = ("reward",)
    ) -> None:
        self.name, self.components = name, components
        self.means, self.std = means.float(), std.float()
        if weights.shape != (weights.shape[0], means.shape[0]) or std.shape != means.shape[:1]:
            raise ValueError(f"{name}: expected means [K, D], std [K] and weights [C, K], got {tuple(means.shape)}, "
                             f"{tuple(std.shape)} and {tuple(weights.shape)}")  # fmt: skip
        every = weights.mean(0, keepdim=True)  # label -1, the last row
        self.weights = torch.cat([weights, every]).float()
        self.size, self.conditions = int(means.shape[1]), int(weights.shape[0])

    # -- data ---------------------------------------------------------------------------------------------------------

    def data(self, label: Tensor, generator: Generator | None) -> Tensor:
        """``[N, D]``, one sample per label ``[N]``."""
        weights = self.weights.to(label.device)[label]
        chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
        noise = torch.randn(len(label), self.size, generator=generator, device=label.device)
        return self.means.to(label.device)[chosen] + self.std.to(label.device)[chosen].unsqueeze(1) * noise

    def velocity(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """The exact velocity ``[N, D]`` at ``x`` ``[N, D]`` and ``time`` ``[N]``."""
        return mixture_velocity(x, time, *self._mixture(x, label))

    def log_density(self, sample: Tensor, label: Tensor) -> Tensor:
        """``[N]``."""
        return mixture_log_density(sample, *self._mixture(sample, label))

    def _mixture(self, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights.to(x)[label].log(), self.means.to(x), self.std.to(x).square()

    # -- rewards ------------------------------------------------------------------------------------------------------

    def score(self, sample: Tensor, label: Tensor) -> Tensor:
        """``[N, C]``."""
        return self.reward(sample, label).unsqueeze(1)

    def reward(self, sample: Tensor, label: Tensor) -> Tensor:
        """What is trained on, ``[N]``."""
        raise NotImplementedError

    def gold(self, sample: Tensor, label: Tensor) -> Tensor:
        """What it stands for, ``[N]``."""
        return self.reward(sample, label)

    def distance(self, sample: Tensor, label: Tensor) -> Tensor:
        """To the nearest mean that the condition has, ``[N]``."""
        far = torch.cdist(sample, self.means.to(sample))
        return far.masked_fill(self.weights.to(sample)[label] == 0.0, torch.inf).amin(1)

    def measure(self, sample: Tensor, label: Tensor) -> dict[str, Tensor]:
        """``gold``, ``distance`` and ``log_density``, ``[N]`` each."""
        return {"gold": self.gold(sample, label), "distance": self.distance(sample, label),
                "log_density": self.log_density(sample, label)}  # fmt: skip


def bump(sample: Tensor, centre: Tensor, width: float) -> Tensor:
    """``exp(-||x - m||^2 / (2 width^2))`` ``[N]``."""
    return (-(sample - centre).square().sum(-1) / (2.0 * width * width)).exp()
