"""An ant on a bounded floor, to be covered (``envs.coverage.ant_coverage``)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ccrl.settings import Positive
from envs.mujoco.task import State
from envs.mujoco.tasks.ant import Ant

__all__ = ["SweepingAnt"]


@dataclass
class SweepingAnt(Ant):
    """Ant with x and y in its observation (29 numbers) and no contact forces; an episode also ends where the torso
    leaves ``[-half_width, half_width]^2`` metres."""

    contact_cost_weight: float = 0.0
    exclude_current_positions_from_observation: bool = False
    include_cfrc_ext_in_observation: bool = False
    half_width: Positive = 20.0

    max_episode_steps = 400

    def terminated(self, state: State) -> Tensor:
        outside = (state.qpos[:, :2].abs() > self.half_width).any(1)
        return super().terminated(state) | outside
