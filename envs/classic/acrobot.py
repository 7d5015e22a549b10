"""Acrobot swing-up (Sutton 1996; the equations of the book by Sutton and Barto), as Gymnasium's Acrobot-v1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from envs.classic.base import ClassicEnv, cos, sin, square

DT, GRAVITY, PI = 0.2, 9.8, math.pi
MASS, LENGTH, CENTRE, INERTIA = 1.0, 1.0, 0.5, 1.0  # of both links: kg, m, m, kg m^2
MAX_SPEEDS = (4 * PI, 9 * PI)


class Acrobot(ClassicEnv):
    """State: two joint angles (rad, 0 hanging, the second relative to the first) and their velocities. Observation:
    cosine and sine of each angle, velocities. Actions: torque -1, 0, 1 on the second joint. Reward: -1 before the goal.
    """

    id = "Acrobot-v1"
    default_max_episode_steps = 500
    uniforms = 4

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([1.0, 1.0, 1.0, 1.0, *MAX_SPEEDS], dtype=np.float32)
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(3)
        self._max_speed = torch.tensor(MAX_SPEEDS, dtype=self.dtype, device=self.device)[:, None]

    def initial_state(self, uniform: Tensor) -> Tensor:
        # Gymnasium starts from float32 numbers.
        return (uniform * 0.2 - 0.1).to(torch.float32).to(self.dtype)

    def dynamics(self, state: Tensor, action: Tensor) -> Tensor:
        torque = (action - 1).to(self.dtype)
        k1 = _derivative(state, torque)
        k2 = _derivative(state + DT / 2.0 * k1, torque)
        k3 = _derivative(state + DT / 2.0 * k2, torque)
        k4 = _derivative(state + DT * k3, torque)
        state = state + DT / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles, speeds = state[:2], state[2:]
        turns = torch.ceil((angles.abs() - PI) / (2 * PI)).clamp(min=0.0)
        angles = angles - torch.sign(angles) * turns * (2 * PI)
        return torch.cat((angles, torch.maximum(torch.minimum(speeds, self._max_speed), -self._max_speed)))

    def terminated(self, state: Tensor) -> Tensor:
        return -cos(state[0]) - cos(state[1] + state[0]) > 1.0

    def reward(self, state: Tensor, action: Tensor, terminated: Tensor) -> Tensor:
        return terminated.to(self.dtype) - 1.0

    def observe(self, state: Tensor) -> Tensor:
        cosines, sines = cos(state[:2]), sin(state[:2])
        return torch.stack((cosines[0], sines[0], cosines[1], sines[1], state[2], state[3]))

    def observe_initial(self, state: Tensor) -> Tensor:
        return self.observe(state.to(torch.float32))


def _derivative(state: Tensor, torque: Tensor) -> Tensor:
    """``d state / dt`` of ``[4, N]``; the order of operations is part of the parity with Gymnasium."""
    theta1, theta2, speed1, speed2 = state
    cosine, sine = cos(theta2), sin(theta2)
    lever = MASS * LENGTH * CENTRE
    d1 = MASS * CENTRE**2 + MASS * (LENGTH**2 + CENTRE**2 + 2 * LENGTH * CENTRE * cosine) + INERTIA + INERTIA
    d2 = MASS * (CENTRE**2 + LENGTH * CENTRE * cosine) + INERTIA
    phi2 = MASS * CENTRE * GRAVITY * cos(theta1 + theta2 - PI / 2.0)
    phi1 = (
        -lever * square(speed2) * sine
        - 2 * lever * speed2 * speed1 * sine
        + (MASS * CENTRE + MASS * LENGTH) * GRAVITY * cos(theta1 - PI / 2)
        + phi2
    )
    acceleration2 = (torque + d2 / d1 * phi1 - lever * square(speed1) * sine - phi2) / (
        MASS * CENTRE**2 + INERTIA - square(d2) / d1
    )
    acceleration1 = -(d2 * acceleration2 + phi1) / d1
    return torch.stack((speed1, speed2, acceleration1, acceleration2))
