"""Steering a ship through a gate (Ghavamzadeh and Mahadevan 2003)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from ccrl.settings import Count, checked
from envs.classic.base import Array, ClassicEnv

__all__ = ["ShipSteering"]

SPEED, DT, DELAY = 3.0, 0.2, 5.0
MAX_TURN = math.pi / 12
SAILING, PASSED, LOST = 0.0, 1.0, 2.0
EDGE = 1e-4
"""The start lies on the edge of the field, and the cosine of a rounded pi / 2 is negative in float32."""


class ShipSteering(ClassicEnv):
    """A ship of constant speed answers its rudder late. State and observation: position ``x, y``, heading, turning
    rate; the heading counts from the x axis, as in MushroomRL (others count from the y axis). Action: desired turning
    rate, +- 15 degrees per second, clipped. An action lasts for ``substeps`` integration steps.

    The small field of MushroomRL: 150 x 150, start ``(0, 0)`` with heading ``pi / 2``, gate from (100, 120) to
    (120, 100). Reward -1 per action, 0 on passing the gate, -100 on leaving the field; both end the episode. A state
    passes the gate when the segment it moved along crosses it.

    Args:
        substeps: integration steps per action.
    """

    id = "ccrl/ShipSteering-v0"
    default_max_episode_steps = 5000
    uniforms = 1
    field = 150.0
    gate = ((100.0, 120.0), (120.0, 100.0))

    @checked
    def __init__(self, num_envs: int = 1, *, substeps: Count = 3, **options: Any) -> None:
        super().__init__(num_envs, **options)
        high = np.array([self.field, self.field, math.pi, MAX_TURN], dtype=np.float32)
        low = np.array([0.0, 0.0, -math.pi, -MAX_TURN], dtype=np.float32)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.Box(-MAX_TURN, MAX_TURN, (1,), np.float32)
        self.substeps = substeps

    def initial_state(self, uniform: Array) -> Array:
        zero = self.xp.zeros_like(uniform[0])
        return self.xp.stack((zero, zero, zero + math.pi / 2, zero, zero + SAILING))

    def dynamics(self, state: Array, action: Array) -> Array:
        target = self.xp.clip(self.real(action[0]), -MAX_TURN, MAX_TURN)
        for _ in range(self.substeps):
            # a ship that passed the gate or left the field stays where it is: later sub-steps are not sailed
            state = self.xp.where(state[4] == SAILING, self._sail(state, target), state)
        return state

    def _sail(self, state: Array, target: Array) -> Array:
        x, y, heading, rate, _ = state
        to_x = x + DT * SPEED * self.xp.cos(heading)
        to_y = y + DT * SPEED * self.xp.sin(heading)
        turned = self.xp.remainder(heading + DT * rate + math.pi, 2 * math.pi) - math.pi
        outside = (to_x < -EDGE) | (to_x > self.field) | (to_y < -EDGE) | (to_y > self.field)
        passed = self.xp.where(self._crosses(x, y, to_x, to_y), PASSED, SAILING)
        status = self.real(self.xp.where(outside, LOST, passed))
        to_x, to_y = (self.xp.clip(p, 0.0, self.field) for p in (to_x, to_y))
        return self.xp.stack((to_x, to_y, turned, rate + DT * (target - rate) / DELAY, status))

    def _crosses(self, x: Array, y: Array, to_x: Array, to_y: Array) -> Array:
        """Whether the segment from ``(x, y)`` meets the gate; both ends count."""
        (start_x, start_y), (end_x, end_y) = self.gate
        gate_x, gate_y, move_x, move_y = end_x - start_x, end_y - start_y, to_x - x, to_y - y
        away_x, away_y = x - start_x, y - start_y
        cross = gate_x * move_y - gate_y * move_x
        safe = self.xp.where(cross == 0, 1.0, cross)
        along_gate = (away_x * move_y - away_y * move_x) / safe
        along_move = (away_x * gate_y - away_y * gate_x) / safe
        inside = (along_gate >= 0) & (along_gate <= 1) & (along_move >= 0) & (along_move <= 1)
        return inside & (cross != 0)

    def terminated(self, state: Array) -> Array:
        return state[4] != SAILING

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        status = self.dynamics(state, action)[4]
        return self.xp.where(status == PASSED, 0.0, self.xp.where(status == LOST, -100.0, -1.0))

    def observe(self, state: Array) -> Array:
        return state[:4]
