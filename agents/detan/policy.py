"""Greedy for the expected utility of stock plus return."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data, tree_map
from ccrl.distributional import Objective
from ccrl.policies import QuantilePolicy
from ccrl.policies.observations import observation_groups, observation_spaces
from ccrl.wrappers.stock import STOCK

__all__ = ["StockPolicy"]

TIE = 1e-8
"""Utilities closer than this are equal: with ``f = min(x, 0)`` and a stock that cannot be lost every action has 0."""


class StockPolicy(QuantilePolicy):
    """Epsilon-greedy on ``mean_i f(c + theta_i(s, c, a))``; ties are broken at random where noise is given.

    ``evaluate`` computes ``quantiles`` ``[T', B, A, N]``, of vectors ``[T', B, A, N, m]``.

    :param skip: a key of the observation that is no input (reward vectors, which the stock holds already).
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        objective: Objective,
        low: Tensor,
        high: Tensor,
        n_quantiles: int,
        skip: str | None = None,
        **network: Any,
    ) -> None:
        keys = observation_groups(list(observation_spaces(observation_space)))["actor"]
        super().__init__(
            observation_space, action_space, n_quantiles=n_quantiles * max(objective.dims, 1),
            encoders={STOCK: _StockEncoder(low, high)}, groups={"actor": [key for key in keys if key != skip]},
            **network,
        )  # fmt: skip
        self.n_quantiles, self.objective = n_quantiles, objective

    def quantiles(self, obs: Tree) -> Tensor:
        """``[B, A, N]`` or ``[B, A, N, m]``."""
        tail = (self.objective.dims,) if self.objective.dims else ()
        out: Tensor = self.actor.net(self.features(obs, "actor"))
        return out.reshape(-1, self.n_out, self.n_quantiles, *tail)

    def utilities(self, obs: Tree, quantiles: Tensor | None = None) -> Tensor:
        """``mean_i f(c + theta_i(s, c, a))`` ``[B, A]`` float64."""
        assert isinstance(obs, dict)
        stock = obs[STOCK].double()
        wide = stock[:, None, None] if not self.objective.dims else stock[:, None, None, :]
        theta = self.quantiles(obs) if quantiles is None else quantiles
        return self.objective.utility(wide + theta.double()).mean(-1)

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """``[n, 2 + A]``: whether to explore, where to, and the order among equals."""
        return torch.rand((n, 2 + self.n_out), generator=generator, device=device)

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        utilities = self.utilities(obs)
        top = utilities >= utilities.amax(-1, keepdim=True) - TIE
        if noise is None:
            return {"action": top.long().argmax(-1)}
        best = torch.where(top, noise[:, 2:], -1.0).argmax(-1)
        uniform = (noise[:, 1] * self.n_out).long().clamp_max(self.n_out - 1)
        return {"action": torch.where(noise[:, 0] < self.epsilon, uniform, best)}

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        found = self.quantiles(tree_map(lambda x: x.flatten(0, 1), batch["obs"]))
        return {"quantiles": found.reshape(*batch.shape, *found.shape[1:])}


class _StockEncoder(nn.Module):
    """The stock clipped to its range and scaled to [-1, 1]."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.float())
        self.register_buffer("high", high.float())
        self.width = low.numel()

    def forward(self, stock: Tensor) -> Tensor:
        inside = stock.to(self.low.dtype).clamp(self.low, self.high)
        scaled = (2.0 * inside - self.low - self.high) / (self.high - self.low)
        return scaled.reshape(len(scaled), -1)
