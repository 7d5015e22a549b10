"""Humanoid-v5 and HumanoidStandup-v5: walk, and get up from the floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative
from envs.mujoco.task import Bound, MujocoTask, State, within

__all__ = ["Humanoid", "HumanoidStandup"]


class HumanoidBody(MujocoTask):
    """What the two tasks share: the observation and the cost of contacts."""

    exclude_current_positions_from_observation: bool
    include_cinert_in_observation: bool
    include_cvel_in_observation: bool
    include_qfrc_actuator_in_observation: bool
    include_cfrc_ext_in_observation: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
        self.observed = tuple(name for name in names if getattr(self, f"include_{name}_in_observation"))
        self.fields = (*self.observed, "cfrc_ext")

    def observe(self, state: State) -> Tensor:
        parts = [state.qpos[:, 2:] if self.exclude_current_positions_from_observation else state.qpos, state.qvel]
        for name in self.observed:
            # The world body and the six degrees of freedom of the root carry nothing.
            parts.append(
                getattr(state, name)[:, 6:] if name == "qfrc_actuator" else getattr(state, name)[:, 1:].flatten(1)
            )
        return torch.cat(parts, 1)

    @staticmethod
    def contact_cost(state: State, weight: float, bounds: tuple[Bound, Bound]) -> Tensor:
        """``weight * |contact forces|^2``, clipped to ``bounds``: ``[N]``."""
        return (weight * state.cfrc_ext.flatten(1).square().sum(1)).clamp_(*bounds)


@dataclass
class Humanoid(HumanoidBody):
    """Forward speed of the centre of mass and a bonus while upright, minus costs of control and contacts. Observation
    ``[N, 348]``: qpos without x and y, qvel, and cinert, cvel, qfrc_actuator, cfrc_ext of the moving bodies."""

    xml_file: str = "humanoid.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.25
    ctrl_cost_weight: float = 0.1
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[Bound, Bound] = (-math.inf, 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[Bound, Bound] = (1.0, 2.0)
    reset_noise_scale: Nonnegative = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    camera: ClassVar = {"trackbodyid": 1, "distance": 4.0, "lookat": (0.0, 0.0, 2.0), "elevation": -20.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fields = (*self.fields, "xipos")

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.mass = tensor(model.body_mass)
        self.total_mass = float(model.body_mass.sum())

    def remember(self, state: State) -> Tensor:
        return (state.xipos[:, :, 0] @ self.mass) / self.total_mass

    def reward(self, state: State) -> Tensor:
        velocity = (self.remember(state) - state.before) / self.dt
        healthy = ~state.terminated if self.terminate_when_unhealthy else self.healthy(state)
        reward: Tensor = self.forward_reward_weight * velocity + self.healthy_reward * healthy
        reward -= self.ctrl_cost_weight * state.ctrl.square().sum(1)
        return reward - self.contact_cost(state, self.contact_cost_weight, self.contact_cost_range)

    def healthy(self, state: State) -> Tensor:
        """The torso's height is within ``healthy_z_range``: ``[N]`` bool."""
        return within(state.qpos[:, 2], self.healthy_z_range)

    def terminated(self, state: State) -> Tensor:
        return ~self.healthy(state) if self.terminate_when_unhealthy else super().terminated(state)


@dataclass
class HumanoidStandup(HumanoidBody):
    """Height of the torso over one simulation step plus one, minus costs of control and impacts. Never terminates.
    Gymnasium 1.4 documents ``uph_cost_weight`` but does not read it; here it weighs the height."""

    xml_file: str = "humanoidstandup.xml"
    frame_skip: Count = 5
    uph_cost_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    impact_cost_weight: float = 0.5e-6
    impact_cost_range: tuple[Bound, Bound] = (-math.inf, 10.0)
    reset_noise_scale: Nonnegative = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    camera: ClassVar = {"trackbodyid": 1, "distance": 4.0, "lookat": (0.0, 0.0, 0.8925), "elevation": -20.0}

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.timestep = model.opt.timestep

    def reward(self, state: State) -> Tensor:
        height: Tensor = self.uph_cost_weight * state.qpos[:, 2] / self.timestep
        control = self.ctrl_cost_weight * state.ctrl.square().sum(1)
        return height - control - self.contact_cost(state, self.impact_cost_weight, self.impact_cost_range) + 1
