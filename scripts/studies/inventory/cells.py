"""What one cell of the inventory study measures: a gap to the optimum, data efficiency, speed.

A cell is a flat dict of settings, and what is found is a flat dict of results; both become one row of a CSV file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO, HDPOConfig
from ccrl.inventory.functional_env import FunctionalEnv, State
from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory import InventoryEnv, Normal, Recorded, Task
from envs.inventory.oracle import backlog_optimum, best_base_stock, oracle_cost, serial_optimum

__all__ = ["KINDS", "Kind", "adjusted", "control_policy", "data_efficiency", "gap", "simulator", "speed"]

Cell = dict[str, Any]

TEST_SEED = 65
"""All test scenarios of an instance are the same, whatever the agent."""
COMMON_DEV = 4, 1024
"""Seed and number of the development scenarios that compare agents; these choose their parameters on others."""


@dataclass(frozen=True)
class Kind:
    """Instances of one environment and how they are trained."""

    env: str
    instances: tuple[dict[str, Any], ...]
    policies: tuple[str, ...]
    epochs: int
    batch_size: int
    n_train: int
    n_dev: int
    tests: int
    """Test scenarios of 5,000 periods (3,000 warm-up)."""
    learning_rate: float | None = None
    seeds: tuple[int, ...] = (0,)
    whole_units: bool = False


KINDS = {
    "lost": Kind(
        "ccrl/InventoryOneStoreLost-v0",
        tuple({"lead_time": lead, "underage": p} for lead in (1, 2, 3, 4) for p in (4.0, 9.0, 19.0, 39.0)),
        ("vanilla",), epochs=100, batch_size=512, n_train=8192, n_dev=2048, tests=2000, whole_units=True,
        learning_rate=1e-2,
    ),
    "serial": Kind(
        "ccrl/InventorySerial-v0",
        tuple({"lead_time": lead, "underage": p} for lead, p in ((1, 4.0), (2, 9.0), (3, 9.0), (4, 39.0))),
        ("vanilla", "echelon_stock"), epochs=240, batch_size=512, n_train=8192, n_dev=2048, tests=1000,
    ),
    "backlog": Kind(
        "ccrl/InventoryOneStoreBacklogged-v0",
        tuple({"lead_time": lead, "underage": p} for lead in (1, 4, 7, 10, 15, 20) for p in (4.0, 9.0, 19.0, 39.0)),
        ("vanilla",), epochs=100, batch_size=512, n_train=8192, n_dev=2048, tests=1000,
        learning_rate=1e-2,
    ),
    "transshipment": Kind(
        "ccrl/InventoryTransshipment-v0",
        tuple({"stores": k, "lead_time": 2, "underage": 4.0, "correlation": 0.5} for k in (3, 5, 10)),
        ("gnn",), epochs=50, batch_size=128, n_train=2048, n_dev=512, tests=256, seeds=(0, 1, 2),
    ),
}  # fmt: skip


def simulator(env: FunctionalEnv) -> InventoryEnv:
    """``env``, which is of this repository and has a task."""
    assert isinstance(env, InventoryEnv)
    return env


# -- gaps -----------------------------------------------------------------------------------------------------------


def gap(cell: Cell, options: dict[str, Any]) -> Cell:
    """Train HDPO and compare with the optimum (for transshipment a lower bound), percent."""
    agent, spent = _train(cell, options, whole_units=cell["whole_units"])
    env = simulator(agent.simulator).split("test")
    optimum = oracle_cost(env.task)
    if optimum is None:
        raise ValueError(f"{env.task.name}: expected a task whose optimal cost or bound is known")
    start = time.process_time()
    scenarios = agent.scenarios("test", cell["tests"], 10**6 + TEST_SEED)
    policy = agent.ctx.bank.policy("best")
    costs = average_cost(Unrolled(env, policy), scenarios, whole_units=cell["whole_units"])
    control, expected = control_policy(env)
    mean, error = adjusted(costs, average_cost(Unrolled(env, control), scenarios), expected)
    plain = float(costs.mean()), float(costs.std() / len(costs) ** 0.5)
    row = {
        "cost": mean, "se": error, "plain cost": plain[0], "plain se": plain[1],
        "optimum": optimum, "gap %": 100 * (mean / optimum - 1), "gap se %": 100 * error / optimum,
        "dev cost": agent.cost("dev", COMMON_DEV[1], COMMON_DEV[0])[0],
    }  # fmt: skip
    if env.task.lost:
        row |= {"capped base stock": expected, "better than capped": mean < expected}
    return row | spent | {"test seconds": time.process_time() - start}


def adjusted(costs: Tensor, control: Tensor, expected: float) -> tuple[float, float]:
    """Mean and standard error of ``costs`` ``[B]``, with the cost of another policy in the same scenarios as control
    variate: its expectation is known, so what it happened to cost more, times the regression slope, is taken off."""
    surplus = control - expected
    centred = control - control.mean()
    slope = (centred * costs).sum() / centred.square().sum().clamp_min(1e-300)
    rest = costs - slope * surplus
    return float(rest.mean()), float(rest.std() / len(rest) ** 0.5)


def control_policy(env: InventoryEnv) -> tuple[Callable[[State], Tensor], float]:
    """A policy without parameters and its exact long-run cost: the best capped base stock (lost sales), the optimal
    base stock, the optimal echelon stock, or the relaxation behind the transshipment bound, whose shipments may be
    negative.

    Raises:
        ValueError: a task without one.
    """
    task = env.task
    known, law = oracle_cost(task), task.demand
    if known is None:
        raise ValueError(f"{task.name}: expected a task whose optimal cost or bound is known")
    if not task.network.internal:
        lead, underage = task.network.slots, task.underage[0]
        if task.lost:
            assert not isinstance(law, Recorded)
            best = best_base_stock(lead, underage, law.mean[0], task.holding[0], capped=True)
        else:
            assert isinstance(law, Normal)
            best = backlog_optimum(lead, underage, law.mean[0], law.std[0], task.holding[0], clip=law.clip)
        return lambda seen: (best.level - seen["inventory"].sum(2)).clamp(0.0, best.cap), best.cost
    if task.network.echelons:
        optimum = serial_optimum(task)
        levels = torch.tensor(optimum.levels)
        return partial(_echelon_stock, env, levels), optimum.cost
    return partial(_pooled, *_pooled_levels(task)), known


def _echelon_stock(env: InventoryEnv, levels: Tensor, seen: State) -> Tensor:
    stock = seen["inventory"]
    position = stock.sum(2).flip(1).cumsum(1).flip(1)  # of each stage and everything downstream
    wanted = (levels - position).clamp_min(0.0)
    return env.feasible(seen, torch.cat((wanted[:, 1:], wanted[:, :1]), 1))  # the edge from outside comes last


def _pooled_levels(task: Task) -> tuple[Tensor, Tensor, float]:
    """Mean and deviation of demand until an order of a store is followed by the next, and the level of the system."""
    net, law = task.network, task.demand
    assert isinstance(law, Normal)
    mean, std = torch.tensor(law.mean), torch.tensor(law.std)
    cover, pooled = net.lead_times[0] + 1, float(std.sum() ** 2)
    variance = law.correlation * pooled + (1 - law.correlation) * float((std**2).sum())
    spread = (net.lead_times[-1] * variance + cover * pooled) ** 0.5
    ratio = torch.tensor(task.underage[0] / (task.underage[0] + task.holding[1]))
    level = float(mean.sum()) * (net.lead_times[-1] + cover) + float(torch.special.ndtri(ratio)) * spread
    return cover * mean, std / std.sum(), level


def _pooled(mean: Tensor, share: Tensor, level: float, seen: State) -> Tensor:
    """All stores equally many deviations above their mean, whatever shipments that takes."""
    stock = seen["inventory"]
    position = stock[:, 1:].sum(2)
    surplus = position.sum(1, keepdim=True) + stock[:, :1, 0] - mean.sum()
    order = level - stock.sum((1, 2))
    return torch.cat((mean + share * surplus - position, order[:, None]), 1)


# -- data efficiency ------------------------------------------------------------------------------------------------


def data_efficiency(cell: Cell, options: dict[str, Any]) -> Cell:
    """Cost on the test scenarios after a number of updates on few or many training scenarios."""
    agent, spent = _train(cell, options)
    cost, error = agent.cost("test", cell["tests"], TEST_SEED)
    return {"cost": cost, "se": error, "dev cost": agent.best_cost, "best update": agent.best_iteration} | spent


def _train(cell: Cell, options: dict[str, Any], **settings: Any) -> tuple[HDPO, Cell]:
    """``cell["epochs"]`` of HDPO; the agent and what it took."""
    names = ("policy", "n_train", "n_dev", "batch_size", "learning_rate", "dev_every", "anneal_lr")
    # nobody stops early: cells are compared at equal numbers of updates
    config = HDPOConfig(**{k: cell[k] for k in names}, patience=10**9, **settings)
    start, clock = time.process_time(), time.perf_counter()
    agent = HDPO(cell["env"], config, seed=cell["seed"], env_kwargs=options)
    agent.learn(cell["epochs"] * agent.samples_per_iteration)
    spent = {"CPU seconds": time.process_time() - start, "seconds": time.perf_counter() - clock}
    return agent, spent | {"updates": agent.n_updates, "samples": agent.num_timesteps}


# -- speed ----------------------------------------------------------------------------------------------------------


def speed(cell: Cell, options: dict[str, Any]) -> Cell:
    """Seconds of one rollout of a batch over the training horizon: without gradients, and forward plus backward; the
    medians of the rounds."""
    torch.set_num_threads(cell["threads"])
    device, batch = cell["device"], cell["batch_size"]
    config = HDPOConfig(policy=cell["policy"], n_train=batch, n_dev=1, batch_size=batch, compile=cell["compile"])
    agent = HDPO(cell["env"], config, device=device, env_kwargs=options)
    parameters = list(agent.policy.parameters())

    def backward() -> None:
        for p in parameters:
            p.grad = None
        agent.unrolled(agent.data, frozenset({"cost"}))["cost"].mean().backward()

    @torch.no_grad()
    def forward() -> None:
        agent.unrolled(agent.data, frozenset({"cost"}))

    first = next(_timed(backward, device))
    times = {"forward": forward, "forward and backward": backward}
    if cell["compile"] != "off":
        del times["forward"]  # rollouts without gradients are never compiled
    units = batch * agent.simulator.periods * agent.simulator.network.stores
    row: Cell = {"first seconds": first, "threads used": torch.get_num_threads()}
    for name, run in times.items():
        next(_timed(run, device))
        timer = _timed(run, device)
        seconds = statistics.median(next(timer) for _ in range(cell["rounds"]))
        row |= {f"{name}, ms": 1e3 * seconds, f"{name}, store-periods/s": units / seconds}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return row | {"device name": name}


def _timed(run: Callable[[], None], device: str) -> Iterator[float]:
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    while True:
        wait()
        start = time.perf_counter()
        run()
        wait()
        yield time.perf_counter() - start
