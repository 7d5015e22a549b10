"""A corridor beside a hazard: what a policy that left its data costs, and what a correction towards it repairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.torch_env import TorchEnv

__all__ = ["HALF_WIDTH", "HazardCorridor", "cautious_action", "overconfident_action"]

DT, HALF_WIDTH, PENALTY = 0.1, 0.5, 0.5


class HazardCorridor(TorchEnv):
    """State and observation: ``x, y`` (m) and their velocities, ``[N, 4]``; action: two accelerations in [-1, 1].

    ``v <- clip(v + 0.1 a, -1, 1)``, ``p <- p + 0.1 v``; the reward of a step is the progress in ``x``, less 0.5 while
    ``|y| > 0.5``. Episodes start at ``x = 0``, ``y ~ U(-0.2, 0.2)``, at rest; 100 steps, nothing ends them earlier.
    """

    id = "HazardCorridor-v0"
    default_max_episode_steps = 100

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        far = np.array([math.inf, math.inf, 1.0, 1.0], dtype=np.float32)
        self.single_observation_space = spaces.Box(-far, far, dtype=np.float32)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def initial(self, generator: torch.Generator, n: int) -> Tensor:
        y = 0.4 * torch.rand((n, 1), generator=generator, device=self.device) - 0.2
        zero = torch.zeros_like(y)
        return torch.cat([zero, y, zero, zero], -1)

    def transition(self, state: Tensor, action: Tensor, noise: None) -> tuple[Tensor, Tensor, Tensor]:
        velocity = (state[:, 2:] + DT * action.clamp(-1.0, 1.0)).clamp(-1.0, 1.0)
        step = DT * velocity
        position = state[:, :2] + step
        hazard = (position[:, 1].abs() > HALF_WIDTH).to(state.dtype)
        ended = torch.zeros(state.shape[0], dtype=torch.bool, device=state.device)
        return torch.cat([position, velocity], -1), step[:, 0] - PENALTY * hazard, ended


def cautious_action(obs: Tensor) -> Tensor:
    """The behaviour of the data, without its noise: half speed, back to the middle; ``[N, 4] -> [N, 2]``."""
    _, y, vx, vy = obs.unbind(-1)
    return torch.stack([2.0 * (0.5 - vx), -4.0 * y - 3.0 * vy], -1)


def overconfident_action(obs: Tensor) -> Tensor:
    """A policy that has left the data: full speed, and a drift into the hazard; ``[N, 4] -> [N, 2]``."""
    _, _, vx, vy = obs.unbind(-1)
    return torch.stack([2.0 * (1.0 - vx), 0.08 - 0.6 * vy], -1)
