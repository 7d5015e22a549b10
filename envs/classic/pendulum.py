"""Pendulum swing-up, as Gymnasium's Pendulum-v1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from ccrl.settings import Finite, checked
from envs.classic.base import Array, ClassicEnv

MAX_SPEED, MAX_TORQUE, DT, MASS, LENGTH = 8.0, 2.0, 0.05, 1.0, 1.0


class Pendulum(ClassicEnv):
    """State: angle (rad, 0 upright, not wrapped) and velocity. Observation: cosine, sine, velocity. Action: torque.

    Args:
        g: gravity in m/s^2.
    """

    id = "Pendulum-v1"
    default_max_episode_steps = 200
    uniforms = 2

    @checked
    def __init__(self, num_envs: int = 1, *, g: Finite = 10.0, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([1.0, 1.0, MAX_SPEED], dtype=np.float32)
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,), np.float32)
        self.g = g

    def initial_state(self, uniform: Array) -> Array:
        angle, velocity = uniform * 2.0 - 1.0
        return self.xp.stack((math.pi * angle, velocity))

    def dynamics(self, state: Array, action: Array) -> Array:
        theta, theta_dot = state
        torque = self.xp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
        gravity = 3 * self.g / (2 * LENGTH) * self.xp.sin(theta)
        theta_dot = theta_dot + (gravity + 3.0 / (MASS * LENGTH**2) * torque) * DT
        theta_dot = self.xp.clip(theta_dot, -MAX_SPEED, MAX_SPEED)
        return self.xp.stack((theta + theta_dot * DT, theta_dot))

    def terminated(self, state: Array) -> Array:
        return state[0] > math.inf

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        theta, theta_dot = state
        torque = self.xp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
        angle = self.xp.remainder(theta + math.pi, 2 * math.pi) - math.pi
        return -(self.square(angle) + 0.1 * self.square(theta_dot) + 0.001 * self._square_torque(torque))

    def _square_torque(self, torque: Array) -> Array:
        if self.xp is np and self.dtype == torch.float64:
            # Gymnasium squares a float32 scalar here, whose last bit no array operation reproduces.
            return np.array([number**2 for number in torque])
        return torque * torque

    def observe(self, state: Array) -> Array:
        theta, theta_dot = state
        return self.xp.stack((self.xp.cos(theta), self.xp.sin(theta), theta_dot))
