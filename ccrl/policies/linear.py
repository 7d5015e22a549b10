"""Gaussian policies with a linear mean and one standard deviation, parametrised as in control theory."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.policies.actions import box_bounds, to_box
from ccrl.policies.distributions import GAUSSIAN, Distribution
from ccrl.policies.parametric import ParametricPolicy, box_width

__all__ = ["LinearGaussianPolicy"]


class LinearGaussianPolicy(ParametricPolicy):
    """``a ~ N(K x, sigma^2 I)`` with parameters ``gain = K [A, O]`` and, unless it is fixed, ``std = sigma``, in this
    order.

    ``sigma`` itself is the parameter, not its logarithm: the scores for ``A = O = 1`` are ``(a - K x) x / sigma^2`` and
    ``((a - K x)^2 - sigma^2) / sigma^3``. With ``gain_range`` and ``std_range`` both are squashed into intervals
    instead, ``low + (high - low) / (1 + e^k)`` of free parameters ``k`` (as BPG's experiments on the LQR do).

    :param gain, std: initial values.
    :param fixed_std: the standard deviation is a constant.
    :raises ValueError: if an initial value lies outside its range, or a space is not a Box of one axis.
    """

    distribution: Distribution = GAUSSIAN
    constant_std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        gain: float = 0.0,
        std: float = 1.0,
        fixed_std: bool = False,
        gain_range: tuple[float, float] | None = None,
        std_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.n_out = box_width(action_space, "action")
        self.action_shape = (self.n_out,)
        for name, bound in zip(("low", "high"), box_bounds(action_space)):
            self.register_buffer(name, bound, persistent=False)
        self.gain_range, self.std_range = gain_range, std_range
        if std <= 0:
            raise ValueError(f"std: expected a positive number, got {std}")
        k = _free("gain", gain, gain_range)
        self.gain = nn.Parameter(torch.full((self.n_out, box_width(observation_space, "observation")), k))
        if fixed_std:
            self.register_buffer("constant_std", torch.tensor(float(std)))
        else:
            self.std = nn.Parameter(torch.tensor(_free("std", std, std_range)))

    def params(self, obs: Tensor) -> dict[str, Tensor]:
        std = _squashed(self.std, self.std_range) if hasattr(self, "std") else self.constant_std
        mean = obs.to(self.gain.dtype) @ _squashed(self.gain, self.gain_range).T
        return {"mean": mean, "log_std": std.log().expand_as(mean)}

    def to_env(self, action: Tensor) -> Tensor:
        """Clipped onto the bounds of the action space."""
        return to_box(action, self.low, self.high, squash=False)


def _squashed(k: Tensor, ends: tuple[float, float] | None) -> Tensor:
    return k if ends is None else ends[0] + (ends[1] - ends[0]) * torch.sigmoid(-k)


def _free(name: str, value: float, ends: tuple[float, float] | None) -> float:
    """The free parameter of an initial value."""
    if ends is None:
        return float(value)
    low, high = ends
    if not low < value < high:
        raise ValueError(f"{name}: expected a start inside its range {ends}, got {value}")
    return math.log((high - value) / (value - low))
