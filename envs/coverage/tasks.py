"""The discrete tasks of SubPO (Prajapat et al. 2024, arXiv 2307.13372): a gridworld and a set function.

Each is called with ``(num_envs, device=, autoreset_mode=, **options)`` and returns a ``SetReward``. Options that
are not named are those of ``GridWorld`` (size, start, max_episode_steps, observation, stochasticity) and ``paid`` of
``SetReward``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ccrl.settings import Count, Natural, Positive, checked
from ccrl.wrappers.set_reward import SetFunction, SetReward
from envs.coverage.functions import Coverage, Facility, Groups, LogDet
from envs.coverage.grid import GridWorld, coordinates
from envs.coverage.priors import gp_covariance, gp_density

__all__ = ["footprints", "grid_coverage", "grid_design", "grid_facility", "grid_items", "two_rooms"]

Density = Literal["constant", "bimodal", "gp"]
GROUPS, DEMANDS = (18, 14, 13, 16, 18, 14), (3, 2, 3, 4, 6, 3)
"""Sizes and demands of the released item-collection task; the demands sum to 21."""


def footprints(world: GridWorld, disc: Literal["small", "large"] = "small") -> Tensor:
    """``[n, K]`` int64, padded with -1. ``small``: the cell and its neighbours +x, +y and (+x, +y), inside the grid and
    not walls. ``large``: the union of the small footprints of its small footprint, a 3 x 3 block."""
    reach = 2 if disc == "small" else 3
    xy, columns = coordinates(world.size), []
    free = world.free.cpu()
    for dx in range(reach):
        for dy in range(reach):
            x, y = xy[:, 0] + dx, xy[:, 1] + dy
            cell = (x * world.size[1] + y).clamp_max(world.cells - 1)
            inside = (x < world.size[0]) & (y < world.size[1]) & free[cell]
            columns.append(torch.where(inside, cell, -1))
    return torch.stack(columns, 1).to(world.device)


@checked
def grid_coverage(
    num_envs: Count = 1,
    *,
    density: Density = "constant",
    disc: Literal["small", "large"] = "small",
    instance: Natural = 0,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """Cover as much weight as possible: 1 per cell, ``1 / (1 + exp(-x y))`` (two high corners), or a GP sample.

    Raises:
        ValueError: an unknown density or disc, or what ``GridWorld`` refuses.
    """
    world = GridWorld(num_envs, **options)
    if density == "constant":
        weights = torch.ones(world.cells)
    elif density == "bimodal":
        x, y = (torch.linspace(-1.0, 1.0, n) for n in world.size)
        weights = torch.sigmoid(x.unsqueeze(1) * y).flatten()
    else:
        weights = gp_density(world.size, instance)
    return _paying(world, Coverage(footprints(world, disc), weights.to(world.device)), paid)


@checked
def two_rooms(num_envs: Count = 1, *, paid: Literal["gain", "modular"] = "gain", **options: Any) -> SetReward:
    """Coverage of two rooms, 7 x 4 cells each, joined by a corridor of 2 x 6 cells; 39 moves by default."""
    walls = [x * 14 + y for x in range(7) for y in range(4, 10) if x not in (2, 3)]
    fixed: dict[str, Any] = {"size": (7, 14), "walls": walls, "start": 34, "max_episode_steps": 39}
    world = GridWorld(num_envs, **fixed | options)
    return _paying(world, Coverage(footprints(world), torch.ones(world.cells, device=world.device)), paid)


@checked
def grid_items(
    num_envs: Count = 1,
    *,
    groups: tuple[Natural, ...] = GROUPS,
    demands: tuple[Natural, ...] = DEMANDS,
    instance: Natural = 0,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """Collect items of several groups, as many of each as it demands (Steiner covering); by default 7 x 15 cells, 39
    moves. The seed ``instance`` places the items, at most one in a cell.

    Raises:
        ValueError: more items than cells, or another number of demands than of groups.
    """
    fixed: dict[str, Any] = {"size": (7, 15), "start": 34, "max_episode_steps": 39}
    world = GridWorld(num_envs, **fixed | options)
    if len(groups) != len(demands) or sum(groups) > world.cells:
        raise ValueError(
            f"grid_items: expected a demand per group and at most {world.cells} items, got groups {groups} (together "
            f"{sum(groups)}) and demands {demands}"
        )
    order = torch.randperm(world.cells, generator=torch.Generator().manual_seed(instance))
    members = torch.zeros(world.cells, len(groups), dtype=torch.bool)
    for i, cells in enumerate(torch.split(order[: sum(groups)], list(groups))):
        members[cells, i] = True
    return _paying(world, Groups(members.to(world.device), torch.tensor(demands, device=world.device)), paid)


@checked
def grid_design(
    num_envs: Count = 1,
    *,
    noise: Positive = 0.01,
    instance: Natural = 0,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """Informative path planning: the information (nats) of noisy observations along the path about a GP on the cells,
    whose prior is conditioned on 5 random points. Observation noise ``noise`` (variance)."""
    world = GridWorld(num_envs, **options)
    assert world.max_episode_steps is not None
    covariance = gp_covariance(world.size, instance).to(world.device)
    return _paying(world, LogDet(covariance, noise, world.max_episode_steps + 1), paid)


@checked
def grid_facility(
    num_envs: Count = 1,
    *,
    customers: Count = 20,
    width: Positive = 2.0,
    instance: Natural = 0,
    paid: Literal["gain", "modular"] = "gain",
    **options: Any,
) -> SetReward:
    """A bipartite graph of cells and customers at random cells: a customer of value ``v`` at distance ``d`` from the
    nearest visited cell pays ``v exp(-d^2 / (2 width^2))``; values are uniform in [0, 1).

    Raises:
        ValueError: no customer, or a width that is not positive.
    """
    world = GridWorld(num_envs, **options)
    generator = torch.Generator().manual_seed(instance)
    xy = coordinates(world.size).float()
    places = xy[torch.randint(world.cells, (customers,), generator=generator)]
    values = torch.rand(customers, generator=generator)
    weights = values * torch.exp(-torch.cdist(xy, places).square() / (2.0 * width**2))
    return _paying(world, Facility(weights.to(world.device)), paid)


def _paying(world: GridWorld, function: SetFunction, paid: Literal["gain", "modular"]) -> SetReward:
    return SetReward(world, function, paid=paid)
