"""InvertedPendulum-v5 and InvertedDoublePendulum-v5: keep a pole on a cart upright."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative
from envs.mujoco.task import MujocoTask, State

__all__ = ["InvertedDoublePendulum", "InvertedPendulum"]


@dataclass
class InvertedPendulum(MujocoTask):
    """Reward 1 while the pole is within 0.2 rad of upright. Observation ``[N, 4]``: qpos, qvel."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: Count = 2
    reset_noise_scale: Nonnegative = 0.01

    camera: ClassVar = {"distance": 2.04}

    def observe(self, state: State) -> Tensor:
        return torch.cat((state.qpos, state.qvel), 1)

    def terminated(self, state: State) -> Tensor:
        # A sum is NaN or infinite where an element is; abs(NaN) <= 0.2 is already False.
        finite = torch.isfinite(state.qpos.sum(1) + state.qvel.sum(1))
        return ~((state.qpos[:, 1].abs() <= 0.2) & finite)

    def reward(self, state: State) -> Tensor:
        return (~state.terminated).to(state.qpos.dtype)


@dataclass
class InvertedDoublePendulum(MujocoTask):
    """Two poles on a cart: a bonus while the tip is above 1 m, minus its distance from (0, 2) and the joint speeds.
    Observation ``[N, 9]``: cart position, sines and cosines of the angles, qvel and the cart's constraint force."""

    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: Count = 5
    healthy_reward: float = 10.0
    reset_noise_scale: Nonnegative = 0.1

    fields = ("site_xpos", "qfrc_constraint")
    camera: ClassVar = {"distance": 4.1225, "lookat": (0.0, 0.0, 0.1225)}

    def observe(self, state: State) -> Tensor:
        angles = state.qpos[:, 1:]
        forces = torch.cat((state.qvel, state.qfrc_constraint[:, :1]), 1).clamp_(-10, 10)
        return torch.cat((state.qpos[:, :1], angles.sin(), angles.cos(), forces), 1)

    def terminated(self, state: State) -> Tensor:
        return state.site_xpos[:, 0, 2] <= 1

    def reward(self, state: State) -> Tensor:
        x, y = state.site_xpos[:, 0, 0], state.site_xpos[:, 0, 2]
        v1, v2 = state.qvel[:, 1], state.qvel[:, 2]
        alive = (~state.terminated).to(x.dtype) * self.healthy_reward
        return alive - (0.01 * x**2 + (y - 2) ** 2) - (1e-3 * v1**2 + 5e-3 * v2**2)

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.reset_noise_scale
        return (
            self.init_qpos + self.uniform(n, self.init_qpos, -s, s, generator),
            self.init_qvel + self.normal(n, self.init_qvel, s, generator),
        )
