"""HDPO beside the authors' way of unrolling: ``python scripts/bench hdpo``."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO, HDPOConfig
from ccrl.data import Batching
from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory.oracle import oracle_cost
from scripts.bench._published_hdpo import Trainer

__all__ = ["Config", "main"]

INSTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "lost": ("ccrl/InventoryOneStoreLost-v0", {"lead_time": 2, "underage": 9.0}),
    "backlogged": ("ccrl/InventoryOneStoreBacklogged-v0", {"lead_time": 4, "underage": 9.0}),
}


@dataclass
class Config:
    """Store-periods per second of an update (forward, backward and Adam; 50 periods), in alternating rounds, and the
    time to a gap to the optimum: the same network with the same initial parameters, scenarios, batch and step size on
    both sides. What tests the gap (2,000 scenarios of 400 periods after a warm-up of 100) is not counted."""

    instances: tuple[str, ...] = tuple(INSTANCES)
    """One store: lost (lead time 2) or backlogged (lead time 4), underage 9."""
    batch_size: int = 512
    """Scenarios per update."""
    n_train: int = 8192
    """Training scenarios."""
    learning_rate: float = 1e-2
    """Of Adam."""
    compile: Literal["off", "period", "horizon"] = "off"
    """Of ours; compiling is counted in the time to the gap."""
    rounds: int = 9
    """Rounds of ten updates of each side; a ratio is the median of the rounds' ratios. 0: none."""
    gap: float = 1.0
    """Per cent above the optimum; 0: no time to it."""
    every: int = 25
    """Updates between two tests."""
    most: int = 1500
    """Updates before a side gives up."""
    threads: int = 1
    """torch threads."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's CPU seconds, on a machine that others use."""


class Sides:
    """Both ways on one instance."""

    def __init__(self, config: Config, name: str) -> None:
        env, options = INSTANCES[name]
        settings = HDPOConfig(
            n_train=config.n_train, n_dev=1, batch_size=config.batch_size, learning_rate=config.learning_rate,
            compile=config.compile, whole_units=name == "lost",
        )  # fmt: skip
        self.config, self.agent = config, HDPO(env, settings, seed=0, env_kwargs=options)
        agent, task = self.agent, self.agent.simulator.task  # type: ignore[attr-defined]
        self.start = copy.deepcopy(agent.policy.state_dict())
        self.best = oracle_cost(task) or float("nan")
        data, ones = agent.data, torch.ones(config.n_train, 1)
        columns = {
            "demands": data["demand"].transpose(1, 2).contiguous(), "initial_inventories": data["inventory"],
            "holding": task.holding[0] * ones, "underage": task.underage[0] * ones,
            "lead_times": task.network.lead_times[0] * ones,
        }  # fmt: skip
        self.theirs = Trainer(
            copy.deepcopy(agent.policy.net), columns, lost=task.lost, periods=agent.simulator.periods,
            batch_size=config.batch_size, rate=config.learning_rate,
        )  # fmt: skip
        self.phase = agent.estimator.phases()[0]
        self.env = type(agent.simulator)(task, periods=500, ignore=100)  # type: ignore[call-arg]
        self.tests = self.env.sample(2000, torch.Generator().manual_seed(65))

    def epoch_of_ours(self, after: Callable[[], bool]) -> bool:
        """As ``Trainer.epoch``."""
        phase = self.phase
        for batch in self.agent.data.epoch(Batching("sequence", self.config.batch_size), self.agent.ctx.generator):
            phase.updater.step(phase.terms, batch)
            if after():
                return True
        return False

    def gap(self, ours: bool) -> float:
        """Per cent above the optimum."""
        policy = copy.deepcopy(self.agent.policy)
        if not ours:
            policy.net.load_state_dict(self.theirs.net.state_dict())  # type: ignore[union-attr]
        cost = average_cost(Unrolled(self.env, policy), self.tests, whole_units=self.agent.config.whole_units).mean()
        return 100.0 * (float(cost) / self.best - 1.0)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    print(f"batch {config.batch_size}, {config.threads} threads, {config.clock} clock, ours compiled: {config.compile}")
    for name in config.instances:
        sides = Sides(config, name)
        if config.rounds:
            _speed(sides, name)
        if config.gap:
            _to_gap(Sides(config, name), name)


def _speed(sides: Sides, name: str) -> None:
    config = sides.config
    clock = time.perf_counter if config.clock == "wall" else time.process_time

    def seconds(epoch: Callable[[Callable[[], bool]], bool]) -> float:
        done = [0]

        def ten() -> bool:
            done[0] += 1
            return done[0] == 10

        start = clock()
        while not epoch(ten):
            pass
        return clock() - start

    ways = (sides.epoch_of_ours, sides.theirs.epoch)
    for way in ways:
        seconds(way)
    rows = [[seconds(way) for way in ways] for _ in range(config.rounds)]
    units = 10 * config.batch_size * sides.agent.simulator.periods
    ours, theirs = (units / statistics.median(column) for column in zip(*rows))
    ratios = sorted(b / a for a, b in rows)
    print(f"{name:>11}: ours {ours / 1e6:.3f}, theirs {theirs / 1e6:.3f} M store-periods/s, ratio "
          f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip


def _to_gap(sides: Sides, name: str) -> None:
    config = sides.config
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    found = []
    for ours, epoch in ((True, sides.epoch_of_ours), (False, sides.theirs.epoch)):
        updates, spent, gap, since = 0, 0.0, float("inf"), clock()

        def after(ours: bool = ours) -> bool:
            nonlocal updates, spent, gap, since
            updates += 1
            if updates % config.every == 0:
                spent += clock() - since
                gap = sides.gap(ours)
                since = clock()
            return gap <= config.gap or updates >= config.most

        while not epoch(after):
            pass
        found.append(spent)
        print(f"{name:>11}: {'ours' if ours else 'theirs':>6} at a gap of {gap:.2f} % after {updates} updates, "
              f"{spent:.1f} s", flush=True)  # fmt: skip
    print(f"{name:>11}: time to the gap, theirs over ours {found[1] / found[0]:.2f}", flush=True)
