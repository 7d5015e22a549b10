"""An underpowered car in a valley (Moore 1990), as Gymnasium's MountainCar-v0 and MountainCarContinuous-v0."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.classic.base import ClassicEnv, cos

MIN_POSITION, MAX_POSITION, MAX_SPEED, SLOPE = -1.2, 0.6, 0.07, 0.0025


class MountainCar(ClassicEnv):
    """State and observation: position and velocity. Actions: push left, nothing, right. Reward -1 per step.

    Args:
        goal_velocity: the least velocity at the goal that counts.
    """

    id = "MountainCar-v0"
    default_max_episode_steps = 200
    uniforms = 1
    goal_position = 0.5

    def __init__(self, num_envs: int = 1, *, goal_velocity: float = 0.0, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([MAX_POSITION, MAX_SPEED], dtype=np.float32)
        low = np.array([MIN_POSITION, -MAX_SPEED], dtype=np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space: spaces.Space[Any] = spaces.Discrete(3)
        self.goal_velocity = goal_velocity

    def initial_state(self, uniform: Tensor) -> Tensor:
        position = uniform * 0.2 - 0.6
        return torch.cat((position, torch.zeros_like(position)))

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        position, velocity = state
        push = (action - 1).to(self.dtype) * 0.001
        velocity = (velocity + (push + cos(3 * position) * -SLOPE)).clamp(-MAX_SPEED, MAX_SPEED)
        return self.move(position, velocity)

    def move(self, position: Tensor, velocity: Tensor) -> Tensor:
        """Drive on for one step; the left end of the track stops the car."""
        position = (position + velocity).clamp(MIN_POSITION, MAX_POSITION)
        stopped = (position <= MIN_POSITION) & (velocity < 0)
        return torch.stack((position, torch.where(stopped, 0.0, velocity)))

    def terminated(self, state: Tensor) -> Tensor:
        return (state[0] >= self.goal_position) & (state[1] >= self.goal_velocity)

    def reward(self, state: Tensor, action: Tensor, terminated: Tensor) -> Tensor:
        return torch.full_like(state[0], -1.0)


class MountainCarContinuous(MountainCar):
    """As :class:`MountainCar` with a force in [-1, 1]; reward 100 at the goal, minus a tenth of the squared action
    (not of the clipped one).

    Gymnasium keeps this state in float32. The float64 version follows it there: float64 tensors of float32 numbers.
    """

    id = "MountainCarContinuous-v0"
    default_max_episode_steps = 999
    # The comparison in Gymnasium is one of float32 numbers, and the float32 next to 0.45 is less than 0.45.
    goal_position = float(np.float32(0.45))

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        position, velocity = state
        push = action[0].clamp(-1.0, 1.0) * 0.0015
        angle = 3 * position
        # A start position may have more digits than float32 has (Gymnasium's do); all later ones do not.
        angle = torch.where(position == self._rounded(position), self._rounded(angle), angle)
        velocity = self._rounded(velocity + (push - (SLOPE * cos(angle)).to(torch.float32)))
        velocity = self._rounded(velocity.clamp(-MAX_SPEED, MAX_SPEED))
        return self._rounded(self.move(position, velocity))

    def reward(self, state: Tensor, action: Tensor, terminated: Tensor) -> Tensor:
        effort = action[0].to(self.dtype)
        return torch.where(terminated, 100.0, 0.0) - effort * effort * 0.1

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(torch.float32).to(self.dtype)
