"""Gibbs (softmax) policies that are linear in fixed features, and those features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.policies.distributions import CATEGORICAL, Distribution
from ccrl.policies.parametric import ParametricPolicy, box_width

__all__ = ["GibbsPolicy", "OneHot", "RBFGrid"]


class OneHot(nn.Module):
    """``[B, 1]`` state indices (or Discrete observations ``[B]``) -> indicators ``[B, n]``: tabular policies."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.width = n

    def forward(self, obs: Tensor) -> Tensor:
        states = torch.arange(self.width, device=obs.device)
        return (obs.reshape(-1, 1).round().long() == states).to(torch.get_default_dtype())


class RBFGrid(nn.Module):
    """Radial basis functions ``exp(-|x - c|^2 / (2 width^2))`` on a grid over a box, after scaling it to ``[0, 1]^D``.

    Centres are ``(i - 1/2) / per_axis``; the default width is that of the BAC mountain car (docs/bac.md).

    :param low, high: the box, ``[D]`` each, finite.
    :param per_axis: centres per dimension: ``per_axis ** D`` features.
    """

    low: Tensor
    high: Tensor
    centres: Tensor

    def __init__(
        self, low: Sequence[float], high: Sequence[float], per_axis: int = 4, width: float = 1.3 * 0.25
    ) -> None:
        super().__init__()
        ends = torch.as_tensor([list(low), list(high)], dtype=torch.float32)
        if not bool(ends.isfinite().all()) or not bool((ends[0] < ends[1]).all()):
            raise ValueError(f"RBFGrid: expected finite low < high, got {list(low)} and {list(high)}")
        if per_axis < 1 or width <= 0:
            raise ValueError(f"RBFGrid: expected per_axis >= 1 and width > 0, got {per_axis} and {width}")
        self.register_buffer("low", ends[0], persistent=False)
        self.register_buffer("high", ends[1], persistent=False)
        axis = [(i + 0.5) / per_axis for i in range(per_axis)]
        centres = torch.tensor(list(itertools.product(axis, repeat=ends.shape[1])))
        self.register_buffer("centres", centres, persistent=False)
        self.per_axis, self.scale = per_axis, width
        self.width = centres.shape[0]

    def forward(self, obs: Tensor) -> Tensor:
        unit = (obs - self.low) / (self.high - self.low)
        distance = (unit.unsqueeze(1) - self.centres).square().sum(-1)
        return torch.exp(distance * (-0.5 / self.scale**2))


class GibbsPolicy(ParametricPolicy):
    """``pi(a|x) = softmax_a <theta_a, features(x)>``; parameters ``theta [n_actions, width]``, 0 at the start.

    :param features: a module ``[B, O] -> [B, width]`` with an attribute ``width``; None: the observation itself.
    :param pinned: the last action's logit is fixed at 0 and has no parameters. Without it, logits of a state may be
        shifted together and the Fisher matrix is singular.
    :raises ValueError: for other actions than ``Discrete`` from 0.
    """

    distribution: Distribution = CATEGORICAL
    action_shape: tuple[int, ...] = ()

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        features: nn.Module | None = None,
        pinned: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
            raise ValueError(f"action space: expected Discrete starting at 0, got {action_space}; use another policy")
        self.n_out = int(action_space.n)
        self.features = nn.Identity() if features is None else features
        width = box_width(observation_space, "observation") if features is None else int(features.width)  # type: ignore[arg-type]
        self.theta = nn.Parameter(torch.zeros(self.n_out - pinned, width))

    def params(self, obs: Tensor) -> dict[str, Tensor]:
        logits = self.features(obs).to(self.theta.dtype) @ self.theta.T
        return {"logits": nn.functional.pad(logits, (0, self.n_out - logits.shape[-1]))}
