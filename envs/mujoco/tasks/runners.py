"""Swimmer-v5, HalfCheetah-v5, Hopper-v5 and Walker2d-v5: planar bodies that are paid for forward speed."""

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

__all__ = ["HalfCheetah", "Hopper", "Swimmer", "Walker2d"]


class Runner(MujocoTask):
    """``forward_reward_weight * forward speed - ctrl_cost_weight * |action|^2``."""

    forward_reward_weight: float
    ctrl_cost_weight: float
    exclude_current_positions_from_observation: bool
    free_coordinates: ClassVar[int] = 1
    """Leading entries of qpos that say where the body is; the observation may leave them out."""

    def observe(self, state: State) -> Tensor:
        skip = self.free_coordinates if self.exclude_current_positions_from_observation else 0
        return torch.cat((state.qpos[:, skip:], state.qvel), 1)

    def remember(self, state: State) -> Tensor:
        return state.qpos[:, 0]

    def reward(self, state: State) -> Tensor:
        forward = (state.qpos[:, 0] - state.before) * (self.forward_reward_weight / self.dt)
        return torch.sub(forward, state.ctrl.square().sum(1), alpha=self.ctrl_cost_weight)

    def in_place(self, state: State, out: Arrays) -> Write:
        observe, (paid, pay) = self.observe_in_place(state, out), self.pay_in_place(state)

        def write() -> None:
            observe()
            pay()
            out.reward[...] = paid

        return write

    def observe_in_place(self, state: State, out: Arrays) -> Write:
        """What writes qpos and qvel."""
        skip = self.free_coordinates if self.exclude_current_positions_from_observation else 0
        qpos, qvel = state.qpos.numpy()[:, skip:], state.qvel.numpy()
        first, last = np.split(out.obs, [qpos.shape[1]], axis=1)

        def observe() -> None:
            first[...] = qpos
            last[...] = qvel

        return observe

    def pay_in_place(self, state: State) -> tuple[np.ndarray[Any, Any], Write]:
        """``reward`` ``[N]`` float64, and what brings it up to date."""
        x, before, scale = state.qpos.numpy()[:, 0], state.before.numpy(), self.forward_reward_weight / self.dt
        forward = torch.empty(len(x), dtype=state.qpos.dtype)
        speed, weight = forward.numpy(), self.ctrl_cost_weight
        costs, count = sum_of_squares(state.ctrl)
        cost = torch.from_numpy(costs)

        def pay() -> None:
            np.subtract(x, before, out=speed)
            np.multiply(speed, scale, out=speed)
            count()
            torch.sub(forward, cost, alpha=weight, out=forward)  # rounds once

        return speed, pay


@dataclass
class Swimmer(Runner):
    """Three links in a viscous fluid. Observation ``[N, 8]``: qpos without x and y, qvel."""

    xml_file: str = "swimmer.xml"
    frame_skip: Count = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-4
    reset_noise_scale: Nonnegative = 0.1
    exclude_current_positions_from_observation: bool = True

    free_coordinates: ClassVar = 2
    camera: ClassVar = {"trackbodyid": 1}


@dataclass
class HalfCheetah(Runner):
    """Observation ``[N, 17]``: qpos without x, qvel. Never terminates."""

    xml_file: str = "half_cheetah.xml"
    frame_skip: Count = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: Nonnegative = 0.1
    exclude_current_positions_from_observation: bool = True

    camera: ClassVar = {"distance": 4.0, "trackbodyid": 1}

    def reset(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.reset_noise_scale
        return (
            self.init_qpos + self.uniform(n, self.init_qpos, -s, s, generator),
            self.init_qvel + self.normal(n, self.init_qvel, s, generator),
        )


@dataclass
class Walker2d(Runner):
    """A two-legged runner that has to stay upright. Observation ``[N, 17]``: qpos without x, qvel clipped to ±10."""

    xml_file: str = "walker2d_v5.xml"
    frame_skip: Count = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[Bound, Bound] = (0.8, 2.0)
    healthy_angle_range: tuple[Bound, Bound] = (-1.0, 1.0)
    reset_noise_scale: Nonnegative = 5e-3
    exclude_current_positions_from_observation: bool = True

    camera: ClassVar = {"trackbodyid": 2, "distance": 4.0, "lookat": (0.0, 0.0, 1.15), "elevation": -20.0}

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        self.low, self.high = tensor((self.healthy_z_range, self.healthy_angle_range)).T

    def bounded(self, state: State) -> Tensor:
        """What has to stay between ``low`` and ``high``: height and pitch of the torso, ``[N, 2]``."""
        return state.qpos[:, 1:3]

    def healthy(self, state: State) -> Tensor:
        """All of ``bounded`` is strictly within its range: ``[N]`` bool, False for NaN."""
        x = self.bounded(state)
        return torch.minimum(x - self.low, self.high - x).amin(1) > 0

    def observe(self, state: State) -> Tensor:
        skip = self.free_coordinates if self.exclude_current_positions_from_observation else 0
        return torch.cat((state.qpos[:, skip:], state.qvel.clamp(-10, 10)), 1)

    def reward(self, state: State) -> Tensor:
        healthy = ~state.terminated if self.terminate_when_unhealthy else self.healthy(state)
        return super().reward(state) + self.healthy_reward * healthy

    def terminated(self, state: State) -> Tensor:
        return ~self.healthy(state) if self.terminate_when_unhealthy else super().terminated(state)

    def in_place(self, state: State, out: Arrays) -> Write:
        return self.walk_in_place(state, out, state.qpos.numpy()[:, 1:3], lambda: None)

    def walk_in_place(self, state: State, out: Arrays, bounded: np.ndarray[Any, Any], update: Write) -> Write:
        """``in_place`` with ``bounded`` ``[N, b]`` as ``update`` leaves it."""
        observe, (paid, pay) = self.observe_in_place(state, out), self.pay_in_place(state)
        speeds = out.obs[:, -state.qvel.shape[1] :]
        low, high, ends = self.low.numpy(), self.high.numpy(), self.terminate_when_unhealthy
        above, below, healthy = (np.empty(bounded.shape), np.empty(bounded.shape), np.empty(len(bounded), bool))
        closest, extra, added = np.empty(len(bounded)), np.empty(len(bounded)), bonus(self.healthy_reward)

        def write() -> None:
            observe()
            clip(speeds, (-10.0, 10.0), speeds)
            update()
            np.subtract(bounded, low, out=above)
            np.subtract(high, bounded, out=below)
            np.minimum(above, below, out=above)
            np.minimum.reduce(above, 1, out=closest)
            np.greater(closest, 0.0, out=healthy)
            if ends:
                np.logical_not(healthy, out=out.terminated)
            pay()
            np.multiply(healthy, added, out=extra)
            np.add(paid, extra, out=out.reward, casting="same_kind")

        return write


@dataclass
class Hopper(Walker2d):
    """A one-legged runner. Observation ``[N, 11]``: qpos without x, qvel clipped to ±10."""

    xml_file: str = "hopper.xml"
    healthy_state_range: tuple[Bound, Bound] = (-100.0, 100.0)
    healthy_z_range: tuple[Bound, Bound] = (0.7, float("inf"))
    healthy_angle_range: tuple[Bound, Bound] = (-0.2, 0.2)

    camera: ClassVar = {"trackbodyid": 2, "distance": 3.0, "lookat": (0.0, 0.0, 1.15), "elevation": -20.0}

    def setup(self, model: mujoco.MjModel, tensor: Callable[[Any], Tensor]) -> None:
        super().setup(model, tensor)
        # The height is held to its own range only, the pitch to its own and to that of the other coordinates.
        smallest, largest = tensor(self.healthy_state_range).repeat(model.nq + model.nv - 2, 1).T
        self.low = torch.cat((self.low[:1], self.low[1:].clamp(min=smallest[0]), smallest[1:]))
        self.high = torch.cat((self.high[:1], self.high[1:].clamp(max=largest[0]), largest[1:]))

    def bounded(self, state: State) -> Tensor:
        """qpos without x, and qvel: ``[N, 11]``."""
        return torch.cat((state.qpos[:, 1:], state.qvel), 1)

    def in_place(self, state: State, out: Arrays) -> Write:
        qpos, qvel = state.qpos.numpy()[:, 1:], state.qvel.numpy()
        bounded = np.empty((len(qpos), qpos.shape[1] + qvel.shape[1]))
        first, last = np.split(bounded, [qpos.shape[1]], axis=1)

        def update() -> None:
            first[...] = qpos
            last[...] = qvel

        return self.walk_in_place(state, out, bounded, update)
