"""An underpowered car in a valley (Moore 1990), as Gymnasium's MountainCar-v0 and MountainCarContinuous-v0."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from ccrl.settings import Finite, checked
from envs.classic.base import Array, ClassicEnv

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

    @checked
    def __init__(self, num_envs: int = 1, *, goal_velocity: Finite = 0.0, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([MAX_POSITION, MAX_SPEED], dtype=np.float32)
        low = np.array([MIN_POSITION, -MAX_SPEED], dtype=np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space: spaces.Space[Any] = spaces.Discrete(3)
        self.goal_velocity = goal_velocity

    def initial_state(self, uniform: Array) -> Array:
        position = uniform * 0.2 - 0.6
        return self.xp.concatenate((position, self.xp.zeros_like(position)))

    def dynamics(self, state: Array, action: Array) -> Array:
        position, velocity = state
        push = self.real(action - 1) * 0.001
        velocity = velocity + (push + self.xp.cos(3 * position) * -SLOPE)
        return self.move(position, self.xp.clip(velocity, -MAX_SPEED, MAX_SPEED))

    def move(self, position: Array, velocity: Array) -> Array:
        """Drive on for one step; the left end of the track stops the car."""
        position = self.xp.clip(position + velocity, MIN_POSITION, MAX_POSITION)
        stopped = (position <= MIN_POSITION) & (velocity < 0)
        return self.xp.stack((position, self.xp.where(stopped, 0.0, velocity)))

    def terminated(self, state: Array) -> Array:
        return (state[0] >= self.goal_position) & (state[1] >= self.goal_velocity)

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        return self.xp.full_like(state[0], -1.0)


class MountainCarContinuous(MountainCar):
    """As :class:`MountainCar` with a force in [-1, 1]; reward 100 at the goal, minus a tenth of the squared action
    (not of the clipped one).

    Gymnasium keeps this state in float32. The float64 version follows it there: a float64 array of float32 numbers.
    """

    id = "MountainCarContinuous-v0"
    default_max_episode_steps = 999
    # The comparison in Gymnasium is one of float32 numbers, and the float32 next to 0.45 is less than 0.45.
    goal_position = float(np.float32(0.45))

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def dynamics(self, state: Array, action: Array) -> Array:
        position, velocity = state
        push = self.xp.clip(action[0], -1.0, 1.0) * 0.0015
        angle = 3 * position
        # A start position may have more digits than float32 has (Gymnasium's do); all later ones do not.
        angle = self.xp.where(position == self._rounded(position), self._rounded(angle), angle)
        velocity = self._rounded(velocity + (push - self.single(SLOPE * self.xp.cos(angle))))
        velocity = self._rounded(self.xp.clip(velocity, -MAX_SPEED, MAX_SPEED))
        return self._rounded(self.move(position, velocity))

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        effort = self.real(action[0])
        return self.xp.where(terminated, 100.0, 0.0) - effort * effort * 0.1

    def _rounded(self, x: Array) -> Array:
        return self.real(self.single(x))


class MountainCarTwoActions(MountainCar):
    """As :class:`MountainCar` with full throttle left (0) or right (1), a track that ends at the goal (0.5), and reward
    0 on the step that reaches it: the task of Bayesian actor-critic (docs/bac.md)."""

    id = "ccrl/MountainCarTwoActions-v0"

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([self.goal_position, MAX_SPEED], dtype=np.float32)
        low = np.array([MIN_POSITION, -MAX_SPEED], dtype=np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)

    def dynamics(self, state: Array, action: Array) -> Array:
        return super().dynamics(state, 2 * action)

    def move(self, position: Array, velocity: Array) -> Array:
        position, velocity = super().move(position, velocity)
        return self.xp.stack((self.xp.clip(position, MIN_POSITION, self.goal_position), velocity))

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        return self.real(terminated) - 1.0
