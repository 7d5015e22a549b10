"""Off-policy learning: collect k steps, add them to a ring, take u gradient steps on draws from it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.collect import Collector, Request
from ccrl.data import Batching, Field
from ccrl.estimators.base import Phase
from ccrl.learn.base import Learner
from ccrl.learn.cycle import Cycle, Means, Source, run_cycles
from ccrl.n_step import NStepReturns
from ccrl.replay import ReplayBuffer
from ccrl.updaters import Stats, Updater

__all__ = ["DatasetLearner", "ReplayLearner"]


class _CycleLearner(Learner):
    compile_from = 20_000  # a whole cycle takes half a minute to compile and gains milliseconds per step

    def __init__(
        self, policy: nn.Module, cycle: Cycle, updaters: Mapping[str, Updater], batch: Batching, **options: Any
    ) -> None:
        super().__init__(policy, updaters, **options)
        self.cycle, self.batch = cycle.to(self.device), batch
        cycle.start(self.ctx.bank)
        self.state.register("cycle", cycle)

    def phases(self) -> tuple[Phase, ...]:
        return self.cycle.phases()

    def _steps_per_update(self) -> float:
        return sum(1.0 / p.every for p in self.phases())

    def _choose_compile(self, iterations: int) -> None:
        super()._choose_compile(iterations)
        if self.cycle.one_graph:
            self.cycle.compile_steps(all(getattr(u, "compile", False) for u in self.updaters.values()))

    def _train(self, source: Source, steps: int, means: Means) -> None:
        self.counters.n_updates += run_cycles(self.cycle, source, self.batch, steps, self.ctx, means)


class ReplayLearner(_CycleLearner):
    """One iteration is ``rounds`` times: ``n_steps`` steps of every environment, ``updates`` gradient steps.

    :param returns: sums rewards over several steps before rows enter the ring; None: one-step rows.
    :param learning_starts: environment steps before the first gradient step; actions are uniform until then. An agent
        loaded from a checkpoint without its memory (``best.pt``) first acts for as many steps.
    :param rounds: loops per iteration, so that logging and callbacks cost nothing per step.
    """

    def __init__(
        self,
        source: Collector,
        policy: nn.Module,
        cycle: Cycle,
        updaters: Mapping[str, Updater],
        ring: ReplayBuffer,
        *,
        batch_size: int,
        n_steps: int = 1,
        updates: int = 1,
        learning_starts: int = 100,
        rounds: int = 50,
        returns: NStepReturns | None = None,
        **options: Any,
    ) -> None:
        super().__init__(policy, cycle, updaters, Batching(size=batch_size), **options)
        for name, value in (("n_steps", n_steps), ("updates", updates), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name}: expected >= 1, got {value}")
        self.source, self.ring, self.n_steps, self.updates = source, ring, n_steps, updates
        self.learning_starts, self.rounds = learning_starts, rounds
        rows = n_steps * source.env.num_envs * (1 if returns is None else returns.n)
        if ring.capacity < rows:
            raise ValueError(f"buffer_size: expected at least the {rows} rows of one collection, got {ring.capacity}")
        ring.refills = True
        self._explorer = Explorer(policy)
        self._refilled = torch.zeros((), dtype=torch.int64)
        """The clock from which a memory that was left out of a checkpoint has rows enough again."""
        self.state.register("refilled", self._refilled)
        self.state.register("collector", source)
        self.state.register("ring", ring)
        self.returns = returns
        if returns is not None:
            self.state.register("returns", returns)

    @property
    def clock(self) -> int:
        return self.source.clock

    @property
    def samples_per_iteration(self) -> int:
        return self.rounds * self.n_steps * self.source.env.num_envs

    def gradient_steps(self) -> int:
        return math.ceil(self.rounds * self.updates * self._steps_per_update())

    def _iterate(self) -> tuple[dict[str, Any], Stats, dict[str, float]]:
        means, trained = Means(), False
        spent = {"env": 0.0, "policy": 0.0, "update": 0.0}
        random, live = (Request(steps=self.n_steps, params=who) for who in ("random", "live"))
        data = None
        if self.ring.lost:
            self.ring.lost = False
            self._refilled.fill_(self.clock + self.learning_starts)
        starts = max(self.learning_starts, int(self._refilled))
        for _ in range(self.rounds):
            start, self.source.env_seconds = time.perf_counter(), 0.0
            warm = self.clock < self.learning_starts
            data = self.source.collect(random if warm else live, self._explorer)
            self.ring.add(data if self.returns is None else self.returns(data))
            self.episodes.extend(self.source.stats.returns, self.source.stats.lengths)
            if hasattr(self.policy, "update_normaliser"):
                self.policy.update_normaliser(data["obs"], data["valid"])  # type: ignore[operator]
            middle = time.perf_counter()
            # with n-step returns the ring is empty until the first row is whole
            if self.clock >= starts and (trained or len(self.ring)):
                self._train(self.ring, self.updates, means)
                trained = True
            spent["env"] += self.source.env_seconds
            spent["policy"] += middle - start - self.source.env_seconds
            spent["update"] += time.perf_counter() - middle
        self.ctx.clock.fill_(self.clock)
        self.cycle.after_iteration(self.ctx)
        assert data is not None
        return {"on": data}, means.read(), spent

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        super()._log(data, stats, seconds)
        self.scalars |= {k: v for k, v in self.source.log.items() if isinstance(v, int | float | Tensor)}
        self.source.log = {}


class DatasetLearner(_CycleLearner):
    """``updates`` gradient steps per iteration on draws from ``source``; the clock counts gradient steps."""

    clock_unit = "updates"

    def __init__(
        self,
        source: Source,
        policy: nn.Module,
        cycle: Cycle,
        updaters: Mapping[str, Updater],
        *,
        batch_size: int,
        updates: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(policy, cycle, updaters, Batching(size=batch_size), **options)
        if updates < 1:
            raise ValueError(f"updates: expected >= 1, got {updates}")
        self.source, self.updates = source, updates

    @property
    def clock(self) -> int:
        return self.iteration * self.updates

    @property
    def samples_per_iteration(self) -> int:
        return self.updates

    def gradient_steps(self) -> int:
        return math.ceil(self.updates * self._steps_per_update())

    def _iterate(self) -> tuple[dict[str, Any], Stats, dict[str, float]]:
        start, means = time.perf_counter(), Means()
        self._train(self.source, self.updates, means)
        self.cycle.after_iteration(self.ctx)
        return {}, means.read(), {"update": time.perf_counter() - start}


class Explorer:
    """The policy as collection sees it off policy: without behaviour columns, which a ring does not keep."""

    def __init__(self, policy: Any) -> None:
        self._policy, self.distribution = policy, policy.distribution
        self.reads: frozenset[str] | None = getattr(policy, "reads", None)

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        noise: Tensor = self._policy.draw_noise(n, generator, device)
        return noise

    def initial_state(self, n: int) -> Tensor | None:
        return None

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._policy.act(obs, noise)
        return {"action": found["action"]}

    def to_env(self, action: Tensor) -> Tensor:
        executed: Tensor = self._policy.to_env(action)
        return executed

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}
