"""Acrobot swing-up (Sutton 1996; the equations of the book by Sutton and Barto), as Gymnasium's Acrobot-v1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.classic.base import Array, ClassicEnv

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

    def initial_state(self, uniform: Array) -> Array:
        # Gymnasium starts from float32 numbers.
        return self.real(self.single(uniform * 0.2 - 0.1))

    def dynamics(self, state: Array, action: Array) -> Array:
        torque = self.real(action - 1)
        k1 = self._derivative(state, torque)
        k2 = self._derivative(state + DT / 2.0 * k1, torque)
        k3 = self._derivative(state + DT / 2.0 * k2, torque)
        k4 = self._derivative(state + DT * k3, torque)
        state = state + DT / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles, speed1, speed2 = state[:2], state[2], state[3]
        turns = self.xp.clip(self.xp.ceil((abs(angles) - PI) / (2 * PI)), 0.0, None)
        theta1, theta2 = angles - self.xp.sign(angles) * turns * (2 * PI)
        speed1 = self.xp.clip(speed1, -MAX_SPEEDS[0], MAX_SPEEDS[0])
        speed2 = self.xp.clip(speed2, -MAX_SPEEDS[1], MAX_SPEEDS[1])
        return self.xp.stack((theta1, theta2, speed1, speed2))

    def terminated(self, state: Array) -> Array:
        return -self.xp.cos(state[0]) - self.xp.cos(state[1] + state[0]) > 1.0

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        return self.real(terminated) - 1.0

    def observe(self, state: Array) -> Array:
        cosines, sines = self.xp.cos(state[:2]), self.xp.sin(state[:2])
        return self.xp.stack((cosines[0], sines[0], cosines[1], sines[1], state[2], state[3]))

    def observe_initial(self, state: Array) -> Array:
        return self.observe(self.single(state))

    def _derivative(self, state: Array, torque: Array) -> Array:
        """``d state / dt`` of ``[4, N]``; the order of operations is part of the parity with Gymnasium."""
        theta1, theta2, speed1, speed2 = state
        cos, square = self.xp.cos, self.square
        cosine, sine = cos(theta2), self.xp.sin(theta2)
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
        return self.xp.stack((speed1, speed2, acceleration1, acceleration2))
