"""A kernel on learnt state features, with a value head on the same layers (DBQPG). Importing it needs GPyTorch.

Features are trained by the marginal likelihood of the Gaussian process (exact, on a random subset of the points) and
by the squared error of the value head. For the policy update everything here is a constant.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ccrl.gp.kernels import AdditiveRBFKernel
from ccrl.gp.solve import Cholesky
from ccrl.policies.encoders import mlp

__all__ = ["DeepKernel", "log_marginal_likelihood"]


def log_marginal_likelihood(gram: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
    """``log N(targets [N]; 0, K + noise I)``, differentiable.

    Written out, because GPyTorch's own would take conjugate gradients of tolerance 1 above 800 points.
    """
    n = targets.shape[0]
    factor = Cholesky(gram + torch.diag_embed(noise.expand(n))).factor
    white: Tensor = torch.linalg.solve_triangular(factor, targets.unsqueeze(-1), upper=False)
    total: Tensor = -0.5 * (white.square().sum() + n * math.log(2.0 * math.pi)) - factor.diagonal().log().sum()
    return total


class DeepKernel(nn.Module):
    """``k_s(x, x') = sum_i exp(-(phi_i(x) - phi_i(x'))^2 / (2 l_i^2))`` with features ``phi`` in [-1, 1].

    :param width: of the observation features.
    :param hidden: layers between, tanh; the last of them feeds the features and the value head.
    :param features: number of ``phi``.
    :param min_noise: lower bound of the learnt noise variance.
    """

    def __init__(
        self, width: int, hidden: Sequence[int] = (64, 48), features: int = 10, min_noise: float = 1e-4
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("DeepKernel: expected at least one hidden layer, got none")
        self.trunk = nn.Sequential(*mlp([width, *hidden], "tanh"), nn.Tanh())
        self.head = nn.Linear(hidden[-1], features)
        self.value = nn.Linear(hidden[-1], 1)
        self.kernel = AdditiveRBFKernel(features)
        self.raw_noise = nn.Parameter(torch.tensor(0.0))
        self.min_noise = min_noise
        self.double()
        self._adam = torch.optim.Adam(
            [
                {"params": [*self.trunk.parameters(), *self.value.parameters()], "weight_decay": 0.0},
                {"params": [*self.head.parameters(), *self.kernel.parameters(), self.raw_noise], "weight_decay": 1e-3},
            ],
            lr=1e-4,
        )

    @property
    def noise(self) -> Tensor:
        """The noise variance, 0-d."""
        return self.min_noise + nn.functional.softplus(self.raw_noise)

    def features(self, x: Tensor) -> Tensor:
        """``phi [N, d]``, each scaled to [-1, 1] over the batch ``x [N, width]``."""
        phi: Tensor = self.head(self.trunk(x))
        low, high = phi.amin(0).detach(), phi.amax(0).detach()
        return 2.0 * (phi - low) / (high - low).clamp_min(1e-12) - 1.0

    def gram(self, phi: Tensor) -> Tensor:
        """``K_s [N, N]`` of features."""
        matrix: Tensor = self.kernel(phi).to_dense()
        return matrix

    def values(self, x: Tensor) -> Tensor:
        """``V [N]``."""
        out: Tensor = self.value(self.trunk(x))
        return out.squeeze(-1)

    def fit(
        self,
        x: Tensor,
        scores: Tensor,
        targets: Tensor,
        returns: Tensor,
        *,
        state_scale: float,
        fisher_scale: float,
        points: int,
        generator: Generator,
        lr: float,
    ) -> dict[str, Tensor]:
        """One Adam step on ``-log p(targets) / N + mean (V - returns)^2``.

        :param x: ``[N, width]``; :param scores: whitened ``[N, k]``, so that the Fisher kernel is their product.
        :param points: how many of the ``N`` enter the likelihood, drawn without replacement.
        """
        chosen = torch.randperm(x.shape[0], generator=generator, device=x.device)[:points]
        part = scores[chosen]
        gram = state_scale * self.gram(self.features(x)[chosen]) + fisher_scale * (part @ part.T)
        likelihood = log_marginal_likelihood(gram, self.noise, targets[chosen]) / chosen.shape[0]
        value_loss = (self.values(x) - returns).square().mean()
        self._adam.zero_grad()
        (value_loss - likelihood).backward()  # type: ignore[no-untyped-call]
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        return {
            "log_likelihood": likelihood.detach(),
            "value_loss": value_loss.detach(),
            "gp_noise": self.noise.detach(),
        }

    def get_extra_state(self) -> Any:
        return copy.deepcopy(self._adam.state_dict())  # the optimiser hands out, and takes, its own tensors

    def set_extra_state(self, state: Any) -> None:
        self._adam.load_state_dict(state)
