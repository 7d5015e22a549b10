"""On-policy learning: plan -> collect -> fit -> prepare -> phases of surrogates, or a direction with gradients."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ccrl.collect import EpisodeStats, Request
from ccrl.data import Data
from ccrl.estimators.base import Direction, Estimator, Phase, run_phases
from ccrl.learn.base import Learner
from ccrl.returns import explained_variance
from ccrl.updaters import GradientEstimate, Stats, Updater

__all__ = ["RolloutLearner", "RolloutSource"]


class RolloutSource(Protocol):
    """What serves requests: a collector of environment steps, of completions, or a fixed data set."""

    stats: EpisodeStats
    log: dict[str, Any]
    env_seconds: float

    @property
    def clock(self) -> int:
        """What was collected so far, in the learner's unit."""
        ...

    def collect(self, request: Request, policy: Any) -> Data: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutLearner(Learner):
    """One estimator on fresh rollouts.

    :param samples: what an iteration adds to the clock (at most).
    :param columns: ``N``, rollout columns, which sequences and groups are counted in.
    :param direction: an update rule of its own in place of the estimator's phases.
    :param lag: rollouts are of the policy of ``lag`` iterations ago (staleness studies); 0: of the current one.
    :raises ValueError: a negative lag, or one with a direction, which says itself who acts.
    """

    def __init__(
        self,
        source: RolloutSource,
        policy: nn.Module,
        estimator: Estimator,
        updaters: Mapping[str, Updater],
        *,
        samples: int,
        columns: int,
        direction: Direction | None = None,
        lag: int = 0,
        clock_unit: str = "environment steps",
        **options: Any,
    ) -> None:
        if lag < 0 or (lag and direction is not None):
            raise ValueError(f"lag: expected >= 0, and 0 with a direction, got {lag}")
        super().__init__(policy, updaters, **options)
        self.source, self.estimator, self.direction = source, estimator.to(self.device), direction
        self.columns, self.lag, self.clock_unit = columns, lag, clock_unit  # type: ignore[misc]
        self._samples = samples
        self._ended: list[EpisodeStats] = []
        self.state.register("estimator", estimator)
        self.state.register("collector", source)
        if lag:
            # all at once, so that a checkpoint of any iteration has them all
            for age in range(lag + 1):
                self.ctx.bank.refresh(f"lag/{age}")

    @property
    def clock(self) -> int:
        return self.source.clock

    @property
    def samples_per_iteration(self) -> int:
        return self._samples * (1 if self.processes is None else self.processes.size)

    def phases(self) -> tuple[Phase, ...]:
        return self.estimator.phases()

    def gradient_steps(self) -> int:
        """Optimiser steps per iteration; a direction takes one."""
        total = 0 if self.direction is None else 1
        for phase in self.phases():
            units = self._samples if phase.batching.unit == "transition" else self.columns
            size = units if phase.batching.size == "full" else min(int(phase.batching.size), units)
            total += phase.batching.epochs * -(-units // size)
        return total

    # -- one iteration -------------------------------------------------------------------------------------------------

    def collect(self, points: Mapping[str, Tensor]) -> dict[str, Data]:
        """Every rollout that the estimator asks for, by tag."""
        have: dict[str, Data] = {}
        self._ended = []
        while requests := self.estimator.plan(dict(points), have, self.ctx):
            for request in requests:
                request = self._lagged(request)
                # random actions are stored in the coordinates of the policy that is trained
                random = isinstance(request.params, str) and request.params == "random"
                policy = self.ctx.bank.policy("live" if random else request.params)
                have[request.tag] = self.source.collect(request, policy)
                if not request.demonstrations:
                    self._ended.append(self.source.stats)  # the source has those of its last rollout alone
        return have

    def _lagged(self, request: Request) -> Request:
        if not self.lag or request.params != "live":
            return request
        return replace(request, params=f"lag/{max(0, self.iteration - self.lag) % (self.lag + 1)}")

    def _iterate(self) -> tuple[dict[str, Data], Stats, dict[str, float]]:
        marks = [time.perf_counter()]
        self.source.env_seconds = 0.0
        if self.lag:
            self.ctx.bank.refresh(f"lag/{self.iteration % (self.lag + 1)}")
        points = self.points()
        have = self.collect(points)
        marks.append(time.perf_counter())
        stats = self.estimator.fit(have, self.ctx)
        with torch.no_grad():
            data = self.estimator.prepare(have, self.ctx)
        marks.append(time.perf_counter())
        stats |= self._update(points, data)
        with torch.no_grad():
            self.estimator.after_update(data, stats, self.ctx)
            if hasattr(self.policy, "update_normaliser"):
                # after the update: moved before it, the ratio at the old parameters would not be 1
                self.policy.update_normaliser(data["on"]["obs"], data["on"]["valid"])  # type: ignore[operator]
        marks.append(time.perf_counter())
        for ended in self._ended:
            self.episodes.extend(ended.returns, ended.lengths)
        env = self.source.env_seconds
        seconds = {"env": env, "policy": marks[1] - marks[0] - env, "estimate": marks[2] - marks[1],
                   "update": marks[3] - marks[2]}  # fmt: skip
        return data, stats, seconds

    def points(self) -> dict[str, Tensor]:
        """Where to sample: tag -> flat parameters; empty where only the live policy acts."""
        return {} if self.direction is None else self.direction.points(self._flat, self.ctx)

    @property
    def _flat(self) -> Tensor:
        flat = next(iter(self.updaters.values())).flat
        assert flat is not None, "a direction moves one flat vector: take FlatUpdater"
        return flat

    def _update(self, points: Mapping[str, Tensor], data: dict[str, Data]) -> Stats:
        if self.direction is None:
            stats, steps = run_phases(self.estimator, data, self.ctx, self.watched)
            self.counters.n_updates += steps
            return stats
        updater, estimates = next(iter(self.updaters.values())), list[GradientEstimate]()

        def gradient(tag: str) -> GradientEstimate:
            estimates.append(self.estimator.gradient(points[tag], data[tag], self.ctx))
            return estimates[-1]

        theta = self.direction.step(self._flat, gradient, data, self.ctx)
        ok = theta.isfinite().all()
        updater.finite.logical_and_(ok)
        self._flat.copy_(torch.where(ok, theta, self._flat))
        self.counters.n_updates += 1
        # read after the step: directions add what they did to the estimate's statistics
        return {k: v for estimate in estimates for k, v in estimate.stats.items()}

    # -- logging -------------------------------------------------------------------------------------------------------

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        super()._log(data, stats, seconds)
        on = data["on"]
        if "value" in on and "return" in on:
            self.scalars["train/explained_variance"] = explained_variance(on["value"], on["return"], on["valid"])
        if hasattr(getattr(self.policy, "actor", None), "log_std"):
            self.scalars["train/std"] = self.policy.actor.log_std.detach().exp().mean()  # type: ignore[union-attr, operator]
        self.scalars |= {k: v for k, v in self.source.log.items() if isinstance(v, int | float | Tensor)}
        self.source.log = {}
