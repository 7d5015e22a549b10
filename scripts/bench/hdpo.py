"""HDPO beside the authors' way of unrolling: ``python scripts/bench hdpo``. The time to a gap is a study:
``python scripts/studies/inventory clock``."""

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
from ccrl.inventory.policies import VanillaPolicy
from envs.inventory import InventoryEnv
from scripts.bench._published_hdpo import Trainer

__all__ = ["INSTANCES", "Config", "Sides", "main"]

INSTANCES: dict[str, tuple[str, dict[str, Any]]] = {
    "lost": ("ccrl/InventoryOneStoreLost-v0", {"lead_time": 2, "underage": 9.0}),
    "backlogged": ("ccrl/InventoryOneStoreBacklogged-v0", {"lead_time": 4, "underage": 9.0}),
}
Mode = Literal["off", "period", "horizon", "kernel"]


@dataclass
class Config:
    """Store-periods per second of an update (forward, backward and Adam; 50 periods), in alternating rounds: the same
    network with the same initial parameters, scenarios, batch and step size on both sides."""

    instances: tuple[str, ...] = tuple(INSTANCES)
    """One store: lost (lead time 2) or backlogged (lead time 4), underage 9."""
    batch_size: int = 512
    """Scenarios per update."""
    n_train: int = 8192
    """Training scenarios."""
    learning_rate: float = 1e-2
    """Of Adam."""
    compile: tuple[Mode, ...] = ("off", "kernel")
    """Ours, in each of these ways; compiling itself is not counted."""
    rounds: int = 9
    """Rounds of ten updates of each; a ratio is the median of the rounds' ratios."""
    threads: int = 1
    """torch threads."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's CPU seconds, on a machine that others use."""
    seed: int = 0
    """Of network and scenarios."""


class Sides:
    """Both ways on one instance."""

    def __init__(self, config: Config, name: str, mode: Mode = "off") -> None:
        env, options = INSTANCES[name]
        settings = HDPOConfig(
            n_train=config.n_train, n_dev=1, batch_size=config.batch_size, learning_rate=config.learning_rate,
            compile=mode, whole_units=name == "lost",
        )  # fmt: skip
        self.config, self.agent = config, HDPO(env, settings, seed=config.seed, env_kwargs=options)
        agent, simulator, net = self.agent, self.agent.simulator, self.policy(ours=True).net
        assert isinstance(simulator, InventoryEnv)
        self.env, task = simulator, simulator.task
        data, ones = agent.data, torch.ones(config.n_train, 1)
        columns = {
            "demands": data["demand"].transpose(1, 2).contiguous(), "initial_inventories": data["inventory"],
            "holding": task.holding[0] * ones, "underage": task.underage[0] * ones,
            "lead_times": task.network.lead_times[0] * ones,
        }  # fmt: skip
        self.theirs = Trainer(
            copy.deepcopy(net), columns, lost=task.lost, periods=simulator.periods,
            batch_size=config.batch_size, rate=config.learning_rate,
        )  # fmt: skip
        self.phase = agent.estimator.phases()[0]

    def epoch_of_ours(self, after: Callable[[], bool]) -> bool:
        """As ``Trainer.epoch``."""
        phase = self.phase
        for batch in self.agent.data.epoch(Batching("sequence", self.config.batch_size), self.agent.ctx.generator):
            phase.updater.step(phase.terms, batch)
            if after():
                return True
        return False

    def policy(self, ours: bool) -> VanillaPolicy:
        """As a side has trained it; the other side's is a copy."""
        own = self.agent.policy
        assert isinstance(own, VanillaPolicy)
        if ours:
            return own
        found = copy.deepcopy(own)
        found.net.load_state_dict(self.theirs.net.state_dict())
        return found


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    print(f"batch {config.batch_size}, {config.threads} threads, {config.clock} clock")
    for name in config.instances:
        _speed(config, name)


def _speed(config: Config, name: str) -> None:
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    sides = {mode: Sides(config, name, mode) for mode in config.compile}
    ways = {f"ours, {mode}": side.epoch_of_ours for mode, side in sides.items()}
    ways["theirs"] = (first := next(iter(sides.values()))).theirs.epoch

    def seconds(epoch: Callable[[Callable[[], bool]], bool]) -> float:
        done = [0]

        def ten() -> bool:
            done[0] += 1
            return done[0] == 10

        start = clock()
        while not epoch(ten):
            pass
        return clock() - start

    for way in ways.values():
        seconds(way)
    rounds = [{label: seconds(way) for label, way in ways.items()} for _ in range(config.rounds)]
    units = 10 * config.batch_size * first.env.periods
    for label in ways:
        ratios = sorted(row["theirs"] / row[label] for row in rounds)
        speed = units / statistics.median(row[label] for row in rounds) / 1e6
        print(f"{name:>11}, {label:>12}: {speed:.2f} M store-periods/s, {statistics.median(ratios):.2f} of theirs "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip
