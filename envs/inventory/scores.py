"""What a plan costs and what customers get of it, product by product, and questions of what if."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import torch
from torch import Tensor

from ccrl.inventory.functional_env import State
from envs.inventory.demand import Recorded
from envs.inventory.simulator import InventoryEnv, Policy, Trace, simulate
from envs.inventory.task import Task

__all__ = ["WHAT_IF", "Scores", "changed", "score"]

WHAT_IF = ("lead_time", "demand", "holding", "underage", "unit_cost", "fixed_cost", "minimum", "lot", "capacity")
"""What :func:`changed` can change."""


class Scores(NamedTuple):
    """Means over the counted periods, per product, ``[S]`` float64."""

    cost: Tensor
    """Per period, of all nodes and edges."""
    fill_rate: Tensor
    """Units served at once over units asked for; NaN without demand."""
    stock: Tensor
    """Units on hand at the end of a period, in all nodes."""
    orders: Tensor
    """Orders per period, of all edges."""
    units: Tensor
    """Units ordered per period from outside."""


def score(env: InventoryEnv, policy: Policy, scenarios: State) -> tuple[Scores, Trace]:
    """Play ``policy`` in ``scenarios`` of ``env``; what it earned after the warm-up, and the trace."""
    trace = simulate(env, policy, scenarios)
    net, after = env.network, slice(env.ignore, None)
    on_hand = trace.inventory[:-1, :, :, 0].double()[after]
    demand, action = trace.demand.double()[after], trace.action.double()[after]
    left = on_hand.clone()
    left[:, :, net.first_store :] -= demand
    for edge, (source, _) in enumerate(net.edges[: net.internal]):
        left[:, :, source] -= action[:, :, edge]
    served = torch.minimum(on_hand[:, :, net.first_store :].clamp_min(0.0), demand).sum((0, 2))
    found = Scores(
        trace.cost.double()[after].mean(0),
        served / demand.sum((0, 2)),
        left.clamp_min(0.0).sum(2).mean(0),
        (action > 0).double().sum(2).mean(0),
        action[:, :, net.internal :].sum(2).mean(0),
    )
    return found, trace


def changed(task: Task, question: str) -> Task:
    """The task with one thing changed: ``lead_time=+1``, ``demand=*1.2``, ``underage=5``, ``lot=*2``.

    ``+`` and ``-`` add to what every product has, ``*`` multiplies it, a number alone replaces it.

    Raises:
        ValueError: another form or name, a task without constants by series, or lead times that the task's network
            has no room for.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([+*-]?)\s*(\d+(?:\.\d+)?)\s*", question)
    if match is None or match[1] not in WHAT_IF:
        raise ValueError(
            f"what_if: expected NAME=+1, NAME=*1.2 or NAME=5 with NAME one of {', '.join(WHAT_IF)}, got {question!r}"
        )
    name, sign, number = match[1], match[2], float(match[3])
    if not task.by_series or not isinstance(task.demand, Recorded):
        raise ValueError(f"what_if: expected a task of your own demand (ccrl/InventoryOwn-v0), got {task.name}")

    def change(value: Tensor) -> Tensor:
        if sign == "*":
            return value * number
        return torch.full_like(value, number) if not sign else value + (number if sign == "+" else -number)

    if name == "demand":
        if sign != "*":
            raise ValueError(f"what_if: expected demand=*1.2 (times a number), got {question!r}")
        series = (task.demand.series * number).round()
        return dataclasses.replace(task, demand=dataclasses.replace(task.demand, series=series))
    key = "edge_cost" if name == "unit_cost" else name
    values = change(task.by_series[key])
    if name == "lead_time":
        room = torch.tensor(task.network.lead_times)
        if (values < 1).any() or (values != values.round()).any() or (values > room).any():
            raise ValueError(
                f"what_if: {question}: expected whole lead times from 1 to {int(room.max())}, which this policy was "
                f"trained for, got {values.min():g} to {values.max():g}; train with --vary-lead-time 1 or more"
            )
        # whole periods: an order of a lead time between two would arrive in none
        early = None if task.earliest is None else change(task.earliest).floor().clamp_min(1)
        return dataclasses.replace(task, by_series=task.by_series | {key: values}, earliest=early, vary_lead_time=0)
    if name == "lot":
        values = values.round().clamp_min(1)
    return dataclasses.replace(task, by_series=task.by_series | {key: values})
