"""Humanoid-v5 and HumanoidStandup-v5: walk, and get up from the floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
import torch
from torch import Tensor

from ccrl.settings import Count, Nonnegative
from envs.mujoco.in_place import Arrays, Write, bonus, clip, sum_of_squares
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

    def observe_in_place(self, state: State, out: Arrays) -> Write:
        """What writes the observation."""
        qpos = state.qpos.numpy()
        sources = [qpos[:, 2:] if self.exclude_current_positions_from_observation else qpos, state.qvel.numpy()]
        for name in self.observed:
            array = getattr(state, name).numpy()
            sources.append(array[:, 6:] if name == "qfrc_actuator" else array[:, 1:])
        ends = np.cumsum([x[0].size for x in sources])[:-1]
        # bodies keep their axis: of a strided array a flat view cannot be had
        parts = [o.reshape(x.shape) for o, x in zip(np.split(out.obs, ends, axis=1), sources)]
        pairs = list(zip(parts, sources))

        def observe() -> None:
            for part, source in pairs:
                part[...] = source

        return observe

    @staticmethod
    def contact_cost_in_place(
        state: State, weight: float, bounds: tuple[Bound, Bound]
    ) -> tuple[np.ndarray[Any, Any], Write]:
        """``contact_cost`` ``[N]`` float64, and what brings it up to date."""
        load, count = sum_of_squares(state.cfrc_ext.flatten(1))
        cost = np.empty(len(load))

        def update() -> None:
            count()
            np.multiply(load, weight, out=cost)
            clip(cost, bounds, cost)

        return cost, update

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
        own: Tensor | None = getattr(state, "body_mass", None)
        if own is not None:
            return (state.xipos[:, :, 0] * own).sum(1) / own.sum(1)
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

    def in_place(self, state: State, out: Arrays) -> Write | None:
        if hasattr(state, "body_mass"):
            return None
        observe, z, before = self.observe_in_place(state, out), state.qpos.numpy()[:, 2], state.before.numpy()
        contact, feel = self.contact_cost_in_place(state, self.contact_cost_weight, self.contact_cost_range)
        control, count = sum_of_squares(state.ctrl)
        places, moment = state.xipos[:, :, 0], torch.empty(len(z), dtype=state.qpos.dtype)
        reward, scratch, (low, high) = moment.numpy(), np.empty(len(z)), self.healthy_z_range
        mass, total, dt, forward = self.mass, self.total_mass, self.dt, self.forward_reward_weight
        added, ends, weight = bonus(self.healthy_reward), self.terminate_when_unhealthy, self.ctrl_cost_weight

        def write() -> None:
            observe()
            healthy = (z > low) & (z < high)
            if ends:
                np.logical_not(healthy, out=out.terminated)
            torch.mv(places, mass, out=moment)
            np.divide(reward, total, out=reward)
            np.subtract(reward, before, out=reward)
            np.divide(reward, dt, out=reward)
            np.multiply(reward, forward, out=reward)
            np.add(reward, healthy * added, out=reward)
            count()
            np.multiply(control, weight, out=scratch)
            np.subtract(reward, scratch, out=reward)
            feel()
            np.subtract(reward, contact, out=out.reward, casting="same_kind")

        return write


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

    def in_place(self, state: State, out: Arrays) -> Write:
        observe, z = self.observe_in_place(state, out), state.qpos.numpy()[:, 2]
        impact, feel = self.contact_cost_in_place(state, self.impact_cost_weight, self.impact_cost_range)
        control, count = sum_of_squares(state.ctrl)
        reward, scratch = np.empty(len(z)), np.empty(len(z))
        up, step, weight = self.uph_cost_weight, self.timestep, self.ctrl_cost_weight

        def write() -> None:
            observe()
            np.multiply(z, up, out=reward)
            np.divide(reward, step, out=reward)
            count()
            np.multiply(control, weight, out=scratch)
            np.subtract(reward, scratch, out=reward)
            feel()
            np.subtract(reward, impact, out=reward)
            np.add(reward, 1.0, out=out.reward, casting="same_kind")

        return write
