"""What one gradient step means off policy: targets, phases in the paper's order, Polyak averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.learn.graph import CycleGraphs
from ccrl.updaters import Stats

__all__ = ["Cycle", "Means", "Polyak", "Source", "run_cycles"]


class Source(Protocol):
    """What batches are drawn from: a ring, or a mixture of rings."""

    def sample(self, spec: Batching, generator: torch.Generator | None) -> Data: ...


@dataclass(frozen=True)
class Polyak:
    """``version <- (1 - tau) version + tau live`` for parameters whose names start with one of ``prefixes``.

    :param tau: step of the average; 1: a copy.
    :param every: gradient steps between two moves.
    :raises ValueError: a step outside (0, 1] or less than one gradient step.
    """

    version: str = "target"
    tau: float = 0.005
    prefixes: tuple[str, ...] | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.tau <= 1.0 or self.every < 1:
            raise ValueError(f"Polyak: expected tau in (0, 1] and every >= 1, got {self.tau}, {self.every}")


class Cycle(nn.Module):
    """Base class; an agent overrides ``targets`` and ``phases``. What it learns or counts is a buffer, so it is saved.

    ``averages`` are applied after the phases of a gradient step; their versions are made with the learner.
    """

    averages: tuple[Polyak, ...] = ()
    hands_on: tuple[str, ...] = ()
    """Statistics of a phase that later phases of the same step read as 0-d columns (SAC's temperature: the mean
    log-probability at the actor's sample)."""
    one_graph = False
    """Whether a whole step, targets and averages included, may be compiled as one graph: ``targets`` then draws
    nothing (``noise`` does), and updaters are ``FlatUpdater``."""
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._count = 0
        self._graphs: CycleGraphs | None = None
        self._checked: set[str] = set()

    def noise(self, draw: Data, ctx: Context) -> Data:
        """``draw`` with columns of random numbers: nothing is drawn inside a compiled graph."""
        return draw

    def targets(self, draw: Data, ctx: Context) -> Data:
        """The batch ``[1, B]`` with the columns that the losses read. Runs without gradient."""
        return draw

    def phases(self) -> tuple[Phase, ...]:
        """Critic, actor, temperature: each with its own updater, run at every ``Phase.every``-th gradient step. The
        same objects at every call."""
        raise NotImplementedError

    def after_step(self, batch: Data, stats: Stats, ctx: Context) -> None:
        """After every gradient step: priorities, per-row state, duals (in place). In one graph ``batch`` is without the
        targets."""

    def after_iteration(self, ctx: Context) -> None:
        """After every iteration: exploration schedules."""

    def start(self, bank: Bank) -> None:
        """Make the versions that ``averages`` move."""
        for average in self.averages:
            bank.refresh(average.version)

    @property
    def compiled(self) -> bool:
        """Whether steps run as one compiled graph."""
        return self._graphs is not None

    def compile_steps(self, compiled: bool) -> None:
        """From now on run steps as one compiled graph, or eagerly."""
        self._graphs = (self._graphs or CycleGraphs(self)) if compiled else None

    def due(self) -> tuple[tuple[Phase, ...], tuple[Polyak, ...]]:
        """Phases and averages of the next gradient step: those whose turn it is."""
        step = self._count + 1
        return (
            tuple(p for p in self.phases() if step % p.every == 0),
            tuple(a for a in self.averages if step % a.every == 0),
        )

    def step(self, batch: Data, ctx: Context) -> tuple[Stats, int]:
        """One gradient step on ``batch``; the statistics and the number of optimiser steps taken."""
        phases, averages = self.due()
        with torch.no_grad():
            batch = self.noise(batch, ctx)
        if self._graphs is not None and phases:
            stats = self._graphs.step(phases, averages, batch, ctx)
        else:
            batch, stats = self.run(phases, averages, batch, ctx)
        self._count += 1
        self.count.add_(1)
        with torch.no_grad():
            self.after_step(batch, stats, ctx)
        return stats, len(phases)

    def run(
        self, phases: tuple[Phase, ...], averages: tuple[Polyak, ...], batch: Data, ctx: Context
    ) -> tuple[Data, Stats]:
        """One eager step: targets, phases, averages.

        :raises ValueError: at a phase's first step, as ``Updater.columns`` does.
        """
        with torch.no_grad():
            batch = self.targets(batch, ctx)
        stats: Stats = {}
        for phase in phases:
            if phase.name not in self._checked:
                phase.updater.columns(phase.terms, batch)
                self._checked.add(phase.name)
            row = phase.updater.step(phase.terms, batch)
            batch = self.handed_on(batch, row)
            stats |= {self.name_of(phase, k): v for k, v in row.items()}
        for average in averages:
            ctx.bank.refresh(average.version, mix=average.tau, prefixes=average.prefixes)
        return batch, stats

    def handed_on(self, batch: Data, row: Stats) -> Data:
        """``batch`` with what ``hands_on`` takes from a phase's statistics."""
        found = {k: row[k] for k in self.hands_on if k in row}
        return batch.with_scalars(**found) if found else batch

    def name_of(self, phase: Phase, statistic: str) -> str:
        """The name under which a phase's statistic is logged: with the phase's where others have the same."""
        if statistic not in ("loss", "grad_norm") or len(self.phases()) == 1:
            return statistic
        return f"{phase.name}_{'total_loss' if statistic == 'loss' else statistic}"

    def _load_from_state_dict(self, *args: object, **options: object) -> None:
        super()._load_from_state_dict(*args, **options)  # type: ignore[arg-type, no-untyped-call]
        self._count = int(self.count)


class Means:
    """Means of statistics over the steps that have them: an actor that moves at every second step has half as many."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], list[Tensor]] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    @torch.no_grad()
    def add(self, row: Stats) -> None:
        """Those of one step. All are added by one call: of small networks a step is calls."""
        names = tuple(row)
        if not names:  # a step in which no phase is due
            return
        if names in self._sums:
            torch._foreach_add_(self._sums[names], list(row.values()))
            self._counts[names] += 1
        else:
            self._sums[names], self._counts[names] = [x.detach().clone() for x in row.values()], 1

    def read(self) -> Stats:
        """The means so far, by name."""
        sums: Stats = {}
        counts: dict[str, int] = {}
        for names, values in self._sums.items():
            for name, value in zip(names, values):
                sums[name] = sums[name] + value if name in sums else value
                counts[name] = counts.get(name, 0) + self._counts[names]
        return {name: value / counts[name] for name, value in sums.items()}


def run_cycles(cycle: Cycle, source: Source, spec: Batching, steps: int, ctx: Context, means: Means) -> int:
    """``steps`` gradient steps, each on a draw of its own, their statistics added to ``means``. The number of optimiser
    steps."""
    taken = 0
    many = getattr(source, "batches", None)  # a source that draws several batches at a time
    draws = (source.sample(spec, ctx.generator) for _ in range(steps))
    for draw in draws if many is None else many(spec, steps, ctx.generator):
        row, n = cycle.step(draw, ctx)
        taken += n
        means.add(row)
    return taken
