"""Coverage by a quadruped: MuJoCo's Ant sweeps the floor (Prajapat et al. 2024, section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.settings import Count, checked
from ccrl.wrappers.set_reward import SetReward
from envs.coverage.functions import Coverage
from envs.coverage.grid import coordinates

__all__ = ["ant_coverage"]


@checked
def ant_coverage(
    num_envs: Count = 1,
    *,
    device: torch.device | str = "cpu",
    cells: Count = 100,
    block: Count = 5,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """A floor of ``cells x cells`` (40 m x 40 m by default: cells of 0.4 m), of which every step marks the ``block x
    block`` cells from the torso's cell on; a newly marked cell pays 0.1.

    Args:
        device: the simulator runs on the CPU alone.
        options: of ``SweepingAnt`` and of ``MujocoEnv``.

    Raises:
        ValueError: another device than the CPU, or sizes below 1.
        TypeError: an unknown option.
    """
    if str(device).partition(":")[0] != "cpu":
        raise ValueError(f"AntCoverage simulates on the CPU, got device={str(device)!r}; leave device at 'cpu'")
    from envs.mujoco import MujocoEnv  # late: who covers grids needs no MuJoCo
    from envs.mujoco.tasks.sweeping_ant import SweepingAnt

    names = {f.name for f in fields(SweepingAnt)}
    task = SweepingAnt(**{name: x for name, x in options.items() if name in names})
    env = MujocoEnv(task, num_envs, **{name: x for name, x in options.items() if name not in names})
    xy, columns = coordinates((cells, cells)), []
    for dx in range(block):
        for dy in range(block):
            x, y = xy[:, 0] + dx, xy[:, 1] + dy
            columns.append(torch.where((x < cells) & (y < cells), x * cells + y, -1))
    covered = Coverage(torch.stack(columns, 1), torch.ones(cells * cells))
    return SetReward(env, covered, _cell(cells, task.half_width), paid=paid, scale=0.1)


def _cell(cells: int, half_width: float) -> Callable[[Tree], Tensor]:
    def element(obs: Tree) -> Tensor:
        assert isinstance(obs, Tensor)
        # one step beyond the border is an episode's last: its cell is the nearest inside
        place = ((obs[:, :2] + half_width) * (cells / (2.0 * half_width))).long().clamp(0, cells - 1)
        return place[:, 0] * cells + place[:, 1]

    return element
