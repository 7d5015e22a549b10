"""InvertedPendulum-v5 and InvertedDoublePendulum-v5: keep a pole on a cart upright."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative
from envs.mujoco.in_place import Arrays, Write, clip
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

    def in_place(self, state: State, out: Arrays) -> Write:
        qpos, qvel = state.qpos.numpy(), state.qvel.numpy()
        angle, (first, last) = qpos[:, 1], np.split(out.obs, [qpos.shape[1]], axis=1)

        def write() -> None:
            first[...] = qpos
            last[...] = qvel
            upright = (np.abs(angle) <= 0.2) & np.isfinite(qpos.sum(1) + qvel.sum(1))
            np.logical_not(upright, out=out.terminated)
            out.reward[...] = upright

        return write


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

    def in_place(self, state: State, out: Arrays) -> Write:
        qpos, qvel, force = state.qpos.numpy(), state.qvel.numpy(), state.qfrc_constraint.numpy()[:, :1]
        tip, angles, reward = state.site_xpos.numpy()[:, 0], state.qpos[:, 1:], self.healthy_reward
        sine, cosine = torch.empty(angles.shape, dtype=angles.dtype), torch.empty(angles.shape, dtype=angles.dtype)
        sines, cosines = sine.numpy(), cosine.numpy()
        (x, y), cart = (tip[:, 0], tip[:, 2]), qpos[:, :1]
        v1, v2, k = qvel[:, 1], qvel[:, 2], angles.shape[1]
        at = np.cumsum([1, k, k, qvel.shape[1]])
        o_cart, o_sine, o_cosine, o_speed, o_force = np.split(out.obs, at, axis=1)
        forces = out.obs[:, 1 + 2 * k :]

        def write() -> None:
            torch.sin(angles, out=sine)
            torch.cos(angles, out=cosine)
            o_cart[...] = cart
            o_sine[...] = sines
            o_cosine[...] = cosines
            o_speed[...] = qvel
            o_force[...] = force
            clip(forces, (-10.0, 10.0), forces)
            np.less_equal(y, 1.0, out=out.terminated)
            alive, lean = np.logical_not(out.terminated) * reward, y - 2.0
            out.reward[...] = alive - (0.01 * (x * x) + lean * lean) - (1e-3 * (v1 * v1) + 5e-3 * (v2 * v2))

        return write

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.reset_noise_scale
        return (
            self.init_qpos + self.uniform(n, self.init_qpos, -s, s, generator),
            self.init_qvel + self.normal(n, self.init_qvel, s, generator),
        )
