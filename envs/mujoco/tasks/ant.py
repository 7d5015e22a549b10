"""Ant-v5: a quadruped that is paid for forward speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative
from envs.mujoco.in_place import Arrays, Write, bonus, clip, sum_of_squares
from envs.mujoco.task import Bound, MujocoTask, State

__all__ = ["Ant"]


@dataclass
class Ant(MujocoTask):
    """Forward speed of ``main_body`` and a bonus while healthy, minus costs of control and of the clipped contact
    forces. Observation ``[N, 105]``: qpos without x and y, qvel, contact forces on the 13 moving bodies."""

    xml_file: str = "ant.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[Bound, Bound] = (0.2, 1.0)
    contact_force_range: tuple[Bound, Bound] = (-1.0, 1.0)
    reset_noise_scale: Nonnegative = 0.1
    exclude_current_positions_from_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    camera: ClassVar = {"distance": 4.0, "trackbodyid": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.contact_forces = self.include_cfrc_ext_in_observation or self.contact_cost_weight != 0
        self.fields = ("xpos", "cfrc_ext") if self.contact_forces else ("xpos",)

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.body = model.body(self.main_body).id

    def observe(self, state: State) -> Tensor:
        parts = [state.qpos[:, 2:] if self.exclude_current_positions_from_observation else state.qpos, state.qvel]
        if self.include_cfrc_ext_in_observation:
            parts.append(state.cfrc_ext[:, 1:].flatten(1).clamp(*self.contact_force_range))
        return torch.cat(parts, 1)

    def remember(self, state: State) -> Tensor:
        return state.xpos[:, self.body, 0]

    def healthy(self, state: State) -> Tensor:
        """The torso's height is in range and the state finite: ``[N]`` bool."""
        z, (low, high) = state.qpos[:, 2], self.healthy_z_range
        return (z >= low) & (z <= high) & torch.isfinite(state.qpos.sum(1) + state.qvel.sum(1))

    def reward(self, state: State) -> Tensor:
        velocity = (state.xpos[:, self.body, 0] - state.before) / self.dt
        healthy = ~state.terminated if self.terminate_when_unhealthy else self.healthy(state)
        reward: Tensor = self.forward_reward_weight * velocity + self.healthy_reward * healthy
        reward -= self.ctrl_cost_weight * state.ctrl.square().sum(1)
        if self.contact_forces:
            forces = state.cfrc_ext.flatten(1).clamp(*self.contact_force_range)
            reward -= self.contact_cost_weight * forces.square_().sum(1)
        return reward

    def terminated(self, state: State) -> Tensor:
        return ~self.healthy(state) if self.terminate_when_unhealthy else super().terminated(state)

    def in_place(self, state: State, out: Arrays) -> Write:
        qpos, qvel = state.qpos.numpy(), state.qvel.numpy()
        shown = qpos[:, 2:] if self.exclude_current_positions_from_observation else qpos
        x, before, z = state.xpos.numpy()[:, self.body, 0], state.before.numpy(), qpos[:, 2]
        o_qpos, o_qvel, o_force = np.split(out.obs, [shown.shape[1], shown.shape[1] + qvel.shape[1]], axis=1)
        control, count = sum_of_squares(state.ctrl)
        reward, scratch, (low, high) = np.empty(len(x)), np.empty(len(x)), self.healthy_z_range
        dt, forward, control_weight = self.dt, self.forward_reward_weight, self.ctrl_cost_weight
        added, ends = bonus(self.healthy_reward), self.terminate_when_unhealthy
        felt, load_weight, force_range = self.contact_forces, self.contact_cost_weight, self.contact_force_range
        if felt:
            forces = state.cfrc_ext.flatten(1)
            raw, clipped = forces.numpy(), torch.empty(forces.shape, dtype=forces.dtype)
            force, (load, count_load) = clipped.numpy(), sum_of_squares(clipped)
            moving = force[:, 6:] if self.include_cfrc_ext_in_observation else None

        def write() -> None:
            o_qpos[...] = shown
            o_qvel[...] = qvel
            healthy = (z >= low) & (z <= high) & np.isfinite(qpos.sum(1) + qvel.sum(1))
            if ends:
                np.logical_not(healthy, out=out.terminated)
            np.subtract(x, before, out=reward)
            np.divide(reward, dt, out=reward)
            np.multiply(reward, forward, out=reward)
            np.add(reward, healthy * added, out=reward)
            count()
            np.multiply(control, control_weight, out=scratch)
            np.subtract(reward, scratch, out=reward)
            if felt:
                clip(raw, force_range, force)
                if moving is not None:
                    o_force[...] = moving
                count_load()
                np.multiply(load, load_weight, out=scratch)
                np.subtract(reward, scratch, out=reward)
            out.reward[...] = reward

        return write

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.reset_noise_scale
        return (
            self.init_qpos + self.uniform(n, self.init_qpos, -s, s, generator),
            self.init_qvel + self.normal(n, self.init_qvel, s, generator),
        )
