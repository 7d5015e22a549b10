"""What every learner is: a clock, an iteration, registered state, and what is logged of it.

RolloutLearner   plan -> collect -> fit -> prepare -> phases | direction
ReplayLearner    collect k steps -> ring.add -> u update cycles
DatasetLearner   u update cycles
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.estimators.base import Context, Phase, check_terms
from ccrl.estimators.scores import Scores
from ccrl.learn.state import StateRegistry
from ccrl.seeding import named_generator
from ccrl.updaters import Stats, Updater, can_compile, linear_decay

__all__ = ["COMPILE_FROM", "Episodes", "Learner", "Report"]

COMPILE_FROM = 1_000
"""Gradient steps from which compiling pays: it costs seconds, an eager step about a millisecond."""

Report = Callable[[Mapping[str, Any], Stats], dict[str, Any]]
"""``(data of the iteration by tag, statistics) -> more scalars`` for the log."""


class Episodes:
    """Raw returns and lengths of the last 100 training episodes, for the log."""

    def __init__(self, last: int = 100) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=last)

    def __len__(self) -> int:
        return len(self._last)

    def extend(self, returns: Tensor, lengths: Tensor) -> None:
        """Episodes that ended, ``[E]`` each."""
        self._last.extend(zip(returns.tolist(), lengths.tolist()))

    def clear(self) -> None:
        """Forget them."""
        self._last.clear()

    @property
    def mean_return(self) -> float | None:
        """None before the first episode ends."""
        return float(np.mean([r for r, _ in self._last])) if self._last else None

    @property
    def mean_length(self) -> float | None:
        return float(np.mean([n for _, n in self._last])) if self._last else None

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": [list(e) for e in self._last]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last.clear()
        self._last.extend((r, n) for r, n in state["episodes"])


class Times(dict[str, float]):
    """Seconds of every phase of the iterations and of what training waited for (``ccrl.waiting``), since it was built.

    What is waited for inside an iteration (a compilation) is no part of the iteration's phases.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inside: float | None = None

    def begin_iteration(self) -> None:
        self._inside = 0.0

    def end_iteration(self, seconds: Mapping[str, float]) -> None:
        waited, self._inside = self._inside or 0.0, None
        where = "update" if "update" in seconds else max(seconds, key=lambda name: seconds[name], default="")
        for name, value in seconds.items():
            self[name] = self.get(name, 0.0) + max(0.0, value - (waited if name == where else 0.0))

    def begins(self, what: str) -> None: ...

    def ends(self, what: str, seconds: float) -> None:
        self[what] = self.get(what, 0.0) + seconds
        if self._inside is not None:
            self._inside += seconds


class _Counters:
    """Iterations and gradient steps done, and the window of the training that is under way."""

    def __init__(self, ctx: Context) -> None:
        self.ctx, self.iteration, self.n_updates = ctx, 0, 0

    def state_dict(self) -> dict[str, Any]:
        times = {name: getattr(self.ctx, name).clone() for name in ("k", "clock", "start", "end")}
        return {"iteration": self.iteration, "n_updates": self.n_updates, **times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration, self.n_updates = state["iteration"], state["n_updates"]
        for name in ("k", "clock", "start", "end"):
            getattr(self.ctx, name).copy_(state[name])


class Learner(ABC):
    """Base class; a subclass fills in ``_iterate``, ``clock`` and ``samples_per_iteration``.

    :param policy: what acts and is evaluated; its parameters are ``live`` in the bank.
    :param updaters: by name, each of one parameter set.
    :param device: of the policy and of every tensor made here.
    :param seed: of the generator that shuffles and draws (``ctx.generator``).
    :param anneal: the step sizes of all updaters fall linearly to 0 over the training; or follow ``(progress, share of
        an iteration) -> factor``.
    :param compile: auto (from 1,000 gradient steps on, where a C++ compiler is), on, off.
    :param report: more scalars for the log.
    :param remember: training episodes whose mean return is logged.
    """

    clock_unit: ClassVar[str] = "environment steps"
    compile_from: int = COMPILE_FROM
    """Optimiser steps from which compile "auto" compiles."""

    def __init__(
        self,
        policy: nn.Module,
        updaters: Mapping[str, Updater],
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        anneal: bool | Callable[[Tensor, Tensor], Tensor] = False,
        compile: str = "off",
        report: Report | None = None,
        remember: int = 100,
    ) -> None:
        self.policy, self.updaters, self.device = policy, dict(updaters), torch.device(device)
        self.compile, self.report = compile, report
        zero, one = (torch.tensor(x, dtype=torch.float64, device=self.device) for x in (0.0, 1.0))
        self.ctx = Context(
            generator=named_generator(seed, "learner", self.device),
            bank=Bank(policy),
            scores=lambda theta, data, level: Scores(self.policy, theta, data, level),  # type: ignore[arg-type]
            k=zero.clone(), clock=zero.clone(), start=zero, end=one, samples=one.clone(),
        )  # fmt: skip
        self._decay = {name: float(u.lr) for name, u in self.updaters.items()} if anneal else {}
        self._schedule = anneal if callable(anneal) else None
        self.counters, self.episodes = _Counters(self.ctx), Episodes(remember)
        self.times = Times()
        self.scalars: dict[str, Any] = {}
        """Of the last iteration, for loggers and callbacks."""
        self.watched = True
        """Whether somebody reads ``scalars`` after this iteration."""
        self.healthy = True
        """False inside an iteration and after one that failed: such a state is not for a checkpoint."""
        self.processes: Any = None
        """``ccrl.learn.parallel.Processes``, where the training has several."""
        self._began = (time.perf_counter(), 0)
        self.state = StateRegistry()
        self.state.register("policy", policy)
        for name, updater in self.updaters.items():
            self.state.register(f"updaters/{name}", updater)
        self.state.register("bank", self.ctx.bank)
        self.state.register("generator", self.ctx.generator)
        self.state.register("counters", self.counters)
        self.state.register("episodes", self.episodes)

    # -- what a subclass fills in --------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def clock(self) -> int:
        """Where training is, in ``clock_unit``."""

    @property
    @abstractmethod
    def samples_per_iteration(self) -> int:
        """What one iteration adds to the clock (at most, where episodes end earlier)."""

    @abstractmethod
    def _iterate(self) -> tuple[Mapping[str, Any], Stats, dict[str, float]]:
        """One iteration: data by tag, statistics, seconds by phase (their sum is the iteration's)."""

    def phases(self) -> tuple[Phase, ...]:
        """Surrogates of an iteration; their terms are checked when the agent is built."""
        return ()

    def gradient_steps(self) -> int:
        """Optimiser steps per iteration."""
        return 0

    def outputs(self) -> frozenset[str]:
        """Forward outputs that terms may want."""
        found: frozenset[str] = self.policy.outputs()  # type: ignore[operator]
        return found

    def agree(self, flag: bool) -> bool:
        """Whether a process of the training says so: all of them stop after the same iteration."""
        return flag if self.processes is None else bool(self.processes.any(flag))

    # -- the training --------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.counters.iteration

    @property
    def n_updates(self) -> int:
        """Gradient steps done."""
        return self.counters.n_updates

    def check(self) -> None:
        """Unknown outputs fail here, before the first rollout."""
        check_terms(self.phases(), self.outputs())
        if self.compile == "on" and not self._whole():
            raise ValueError("compile='on': a compiled update takes whole batches; use compile='auto' or no microbatch")

    def begin(self, start: int, end: int) -> None:
        """Set what schedules run over, and decide whether updates are compiled."""
        ctx = self.ctx
        ctx.start.fill_(start)
        ctx.end.fill_(end)
        ctx.clock.fill_(self.clock)
        ctx.samples.fill_(self.samples_per_iteration)
        self._choose_compile(-(-(end - start) // self.samples_per_iteration))
        self._began = (time.perf_counter(), self.clock)

    def iterate(self) -> Stats:
        """One iteration, checked and logged.

        :raises FloatingPointError: a loss, a gradient or a parameter is not finite.
        """
        self.healthy = False
        for name, rate in self._decay.items():
            done = self.ctx.progress
            if self._schedule is not None:
                done = 1.0 - self._schedule(done, self.ctx.share)
            linear_decay([self.updaters[name]], rate, done)
        self.times.begin_iteration()
        data, stats, seconds = self._iterate()
        self.times.end_iteration(seconds)
        self._check_finite(stats)
        self.counters.iteration += 1
        self.ctx.k += 1
        self.ctx.clock.fill_(self.clock)
        self._log(data, stats, seconds)
        self.healthy = True
        return stats

    def _check_finite(self, stats: Stats) -> None:
        """One host sync per iteration: flags that updaters kept, parameters, losses."""
        flags: dict[str, Tensor] = {}
        for name, updater in self.updaters.items():
            flags[f"the {name} loss or its gradient is not finite; the parameters are those before that update"] = (
                updater.finite
            )
        parameters: list[Tensor] = [p for p in self.policy.parameters() if p.requires_grad]
        with torch.no_grad():
            norms = [n.float() for n in torch._foreach_norm(parameters, float("inf"))] if parameters else []
            flags["a parameter of the policy is not finite"] = (
                torch.stack([self.ctx.k.float(), *norms]).isfinite().all()
            )
        flags |= {f"{k} is not finite": v.isfinite().all() for k, v in stats.items() if k.endswith("loss")}
        if not bool(torch.stack([f.reshape(()).to(self.device) for f in flags.values()]).all()):
            raise FloatingPointError(next(text for text, flag in flags.items() if not bool(flag)))

    def _whole(self) -> bool:
        """Whether no phase cuts its batches into micro-batches, which only eager updates add up."""
        return all(phase.batching.microbatch is None for phase in self.phases())

    def _choose_compile(self, iterations: int) -> None:
        steps = self.gradient_steps() * iterations
        pays = self.compile == "on" or (self.compile == "auto" and steps >= self.compile_from)
        # without phases the updates are a direction's explicit steps: there is no surrogate to compile
        wanted = pays and bool(self.phases()) and getattr(self.policy, "compiles", True) and self._whole()
        targets = [u for u in self.updaters.values() if hasattr(u, "compile") and not getattr(u, "hooks", None)]
        possible, why = can_compile()
        if wanted and targets:
            print(f"[ccrl] {why}", flush=True)
        for updater in targets:
            updater.compile = wanted and possible

    # -- logging -------------------------------------------------------------------------------------------------------

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        began, first = self._began
        elapsed, total = time.perf_counter() - began, sum(seconds.values())
        self.scalars = {}
        if len(self.episodes):
            self.scalars |= {
                "rollout/ep_rew_mean": self.episodes.mean_return,
                "rollout/ep_len_mean": self.episodes.mean_length,
            }
        self.scalars |= {
            "time/fps": (self.clock - first) / max(elapsed, 1e-9),
            "time/iterations": self.iteration,
            "time/time_elapsed": elapsed,
            "time/total_timesteps": self.clock,
            **{f"time/{k}": v / max(total, 1e-9) for k, v in seconds.items()},
            **{f"train/{k}": v for k, v in stats.items()},
            "train/n_updates": self.n_updates,
        }
        for name, updater in self.updaters.items():
            key = "train/learning_rate" if name == next(iter(self.updaters)) else f"train/{name}_learning_rate"
            self.scalars[key] = updater.lr.clone()
        if self.report is not None:
            self.scalars |= self.report(data, stats)
