"""Cart-pole balancing (Barto, Sutton and Anderson 1983), as Gymnasium's CartPole-v1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from ccrl.settings import checked
from envs.classic.base import Array, ClassicEnv

GRAVITY, FORCE, DT = 9.8, 10.0, 0.02
POLE_MASS, TOTAL_MASS, HALF_LENGTH = 0.1, 1.1, 0.5
MASS_LENGTH = POLE_MASS * HALF_LENGTH
MAX_X, MAX_ANGLE = 2.4, 12 * 2 * math.pi / 360


class CartPole(ClassicEnv):
    """State and observation: cart position (m), its velocity, pole angle (rad), its velocity. Actions: left, right.

    Args:
        sutton_barto_reward: 0 per step and -1 for falling, instead of 1 per step (the falling one included).
    """

    id = "CartPole-v1"
    default_max_episode_steps = 500
    uniforms = 4

    @checked
    def __init__(self, num_envs: int = 1, *, sutton_barto_reward: bool = False, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([2 * MAX_X, np.inf, 2 * MAX_ANGLE, np.inf], dtype=np.float32)
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.sutton_barto_reward = sutton_barto_reward

    def initial_state(self, uniform: Array) -> Array:
        return uniform * 0.1 - 0.05

    def dynamics(self, state: Array, action: Array) -> Array:
        _, x_dot, theta, theta_dot = state
        force = self.real(self.xp.where(action == 1, FORCE, -FORCE))
        cosine, sine = self.xp.cos(theta), self.xp.sin(theta)
        push = (force + MASS_LENGTH * (theta_dot * theta_dot) * sine) / TOTAL_MASS
        theta_acc = (GRAVITY * sine - cosine * push) / (
            HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * (cosine * cosine) / TOTAL_MASS)
        )
        x_acc = push - MASS_LENGTH * theta_acc * cosine / TOTAL_MASS
        return state + DT * self.xp.stack((x_dot, x_acc, theta_dot, theta_acc))

    def terminated(self, state: Array) -> Array:
        return (abs(state[0]) > MAX_X) | (abs(state[2]) > MAX_ANGLE)

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        if self.sutton_barto_reward:
            return -self.real(terminated)
        return self.xp.ones_like(state[0])
