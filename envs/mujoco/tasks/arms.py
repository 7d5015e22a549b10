"""Reacher-v5 and Pusher-v5: bring the arm's tip, or an object, to a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
import torch
from torch import Tensor

from ccrl.settings import Count
from envs.mujoco.in_place import Arrays, Write, sum_of_squares
from envs.mujoco.task import MujocoTask, State

__all__ = ["Pusher", "Reacher"]


class Arm(MujocoTask):
    """Named bodies, and joints of the last degrees of freedom that belong to goal and object and start at rest."""

    fields = ("xpos",)
    bodies: ClassVar[tuple[str, ...]]

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.body_ids = [model.body(name).id for name in self.bodies]

    def positions(self, state: State) -> list[Tensor]:
        """World positions of ``bodies``, ``[N, 3]`` each."""
        return [state.xpos[:, i] for i in self.body_ids]

    @staticmethod
    def distance_in_place(a: Tensor, b: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Write]:
        """``a - b`` ``[N, 3]``, its length ``[N]``, and what brings them up to date."""
        offset, length = torch.empty(a.shape, dtype=a.dtype), torch.empty(len(a), dtype=a.dtype)
        end, start, between = a.numpy(), b.numpy(), offset.numpy()

        def update() -> None:
            np.subtract(end, start, out=between)
            torch.linalg.vector_norm(offset, dim=1, out=length)

        return between, length.numpy(), update


@dataclass
class Reacher(Arm):
    """A two-joint arm and a target in the plane. Observation ``[N, 10]``: cosines and sines of the angles, target
    position, joint speeds, vector from the target to the fingertip."""

    xml_file: str = "reacher.xml"
    frame_skip: Count = 2
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    max_episode_steps: ClassVar = 50
    bodies: ClassVar = ("fingertip", "target")

    def observe(self, state: State) -> Tensor:
        theta = state.qpos[:, :2]
        fingertip, target = self.positions(state)
        return torch.cat(
            (theta.cos(), theta.sin(), state.qpos[:, 2:], state.qvel[:, :2], (fingertip - target)[:, :2]), 1
        )

    def reward(self, state: State) -> Tensor:
        fingertip, target = self.positions(state)
        distance: Tensor = torch.linalg.vector_norm(fingertip - target, dim=1)
        return -self.reward_dist_weight * distance - self.reward_control_weight * state.ctrl.square().sum(1)

    def in_place(self, state: State, out: Arrays) -> Write:
        theta, target, speed = state.qpos[:, :2], state.qpos.numpy()[:, 2:], state.qvel.numpy()[:, :2]
        cosine, sine = torch.empty(theta.shape, dtype=theta.dtype), torch.empty(theta.shape, dtype=theta.dtype)
        cosines, sines = cosine.numpy(), sine.numpy()
        offset, distance, measure = self.distance_in_place(*self.positions(state))
        between, (control, count) = offset[:, :2], sum_of_squares(state.ctrl)
        ends = np.cumsum([2, 2, target.shape[1], 2])
        o_cosine, o_sine, o_target, o_speed, o_between = np.split(out.obs, ends, axis=1)
        near, weight = -self.reward_dist_weight, self.reward_control_weight

        def write() -> None:
            torch.cos(theta, out=cosine)
            torch.sin(theta, out=sine)
            measure()
            count()
            o_cosine[...] = cosines
            o_sine[...] = sines
            o_target[...] = target
            o_speed[...] = speed
            o_between[...] = between
            out.reward[...] = near * distance - weight * control

        return write

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The target is uniform on the disc of radius 0.2: Gymnasium's rejection from the square, in closed form."""
        qpos = self.init_qpos + self.uniform(n, self.init_qpos, -0.1, 0.1, generator)
        qvel = self.init_qvel + self.uniform(n, self.init_qvel, -0.005, 0.005, generator)
        area, turn = self.uniform(n, self.init_qpos[:2], 0.0, 1.0, generator).unbind(1)
        angle = 2 * torch.pi * turn
        qpos[:, -2:] = 0.2 * area.sqrt()[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
        qvel[:, -2:] = 0.0
        return qpos, qvel


@dataclass
class Pusher(Arm):
    """A seven-joint arm that pushes a cylinder to a goal. Observation ``[N, 23]``: joint angles and speeds, positions
    of the arm's tip, of the object and of the goal."""

    xml_file: str = "pusher_v5.xml"
    frame_skip: Count = 5
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1

    max_episode_steps: ClassVar = 100
    bodies: ClassVar = ("tips_arm", "object", "goal")
    candidates: ClassVar = 64

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.table, self.corner = tensor((0.3, 0.4)), tensor((0.3, 0.2))

    def observe(self, state: State) -> Tensor:
        return torch.cat((state.qpos[:, :7], state.qvel[:, :7], *self.positions(state)), 1)

    def reward(self, state: State) -> Tensor:
        tip, item, goal = self.positions(state)
        near: Tensor = torch.linalg.vector_norm(item - tip, dim=1)
        far: Tensor = torch.linalg.vector_norm(item - goal, dim=1)
        control = state.ctrl.square().sum(1)
        return -(self.reward_dist_weight * far + self.reward_control_weight * control + self.reward_near_weight * near)

    def in_place(self, state: State, out: Arrays) -> Write:
        tip, item, goal = self.positions(state)
        sources = [state.qpos.numpy()[:, :7], state.qvel.numpy()[:, :7], tip.numpy(), item.numpy(), goal.numpy()]
        ends = np.cumsum([x.shape[1] for x in sources])[:-1]
        pairs = list(zip(np.split(out.obs, ends, axis=1), sources))
        _, near, reach = self.distance_in_place(item, tip)
        _, far, push = self.distance_in_place(item, goal)
        control, count = sum_of_squares(state.ctrl)
        weights = self.reward_dist_weight, self.reward_control_weight, self.reward_near_weight

        def write() -> None:
            for part, source in pairs:
                part[...] = source
            reach()
            push()
            count()
            out.reward[...] = -(weights[0] * far + weights[1] * control + weights[2] * near)

        return write

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The object is uniform on [-0.3, 0] x [-0.2, 0.2] outside the disc of radius 0.17 around the goal at the
        origin. A fixed number of candidates replaces Gymnasium's open loop, which would wait for the device in every
        round; each lies in the disc with probability 0.38, all of them with 1e-27."""
        qpos = self.init_qpos.repeat(n, 1)
        qvel = self.init_qvel + self.uniform(n, self.init_qvel, -0.005, 0.005, generator)
        xy = self.uniform(n, self.init_qpos.new_empty(self.candidates, 2), 0.0, 1.0, generator)
        xy = xy * self.table - self.corner
        chosen = (torch.linalg.vector_norm(xy, dim=2) > 0.17).to(torch.uint8).argmax(1)
        qpos[:, -4:-2] = xy[torch.arange(n, device=xy.device), chosen]
        qpos[:, -2:] = 0.0
        qvel[:, -4:] = 0.0
        return qpos, qvel
