"""What one gradient step means off policy: targets, phases in the paper's order, Polyak averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.updaters import Stats

__all__ = ["Cycle", "Polyak", "Source", "run_cycles"]


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

    ``averages`` are applied after the phases of every gradient step; their versions are made with the learner.
    """

    averages: tuple[Polyak, ...] = ()
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._count = 0

    def targets(self, draw: Data, ctx: Context) -> Data:
        """The batch ``[1, B]`` with the columns that the losses read: targets, and every random number (nothing is
        drawn inside a compiled graph). Runs without gradient."""
        return draw

    def phases(self) -> tuple[Phase, ...]:
        """Critic, actor, temperature: each with its own updater, ``Phase.every`` gradient steps apart. The same objects
        at every call."""
        raise NotImplementedError

    def after_step(self, batch: Data, stats: Stats, ctx: Context) -> None:
        """After every gradient step: priorities, per-row state, duals (in place)."""

    def after_iteration(self, ctx: Context) -> None:
        """After every iteration: exploration schedules."""

    def start(self, bank: Bank) -> None:
        """Make the versions that ``averages`` move."""
        for average in self.averages:
            bank.refresh(average.version)

    def step(self, batch: Data, ctx: Context) -> tuple[Stats, int]:
        """One gradient step on ``batch``; the statistics and the number of optimiser steps taken."""
        with torch.no_grad():
            batch = self.targets(batch, ctx)
        stats: Stats = {}
        phases, taken = self.phases(), 0
        for phase in phases:
            if self._count % phase.every:
                continue
            row = phase.updater.step(phase.terms, batch)
            taken += 1
            if len(phases) > 1:
                row = {f"{phase.name}_{k}" if k in ("loss", "grad_norm") else k: v for k, v in row.items()}
            stats |= row
        self._count += 1
        self.count.add_(1)
        for average in self.averages:
            if self._count % average.every == 0:
                ctx.bank.refresh(average.version, mix=average.tau, prefixes=average.prefixes)
        with torch.no_grad():
            self.after_step(batch, stats, ctx)
        return stats, taken

    def _load_from_state_dict(self, *args: object, **options: object) -> None:
        super()._load_from_state_dict(*args, **options)  # type: ignore[arg-type, no-untyped-call]
        self._count = int(self.count)


def run_cycles(cycle: Cycle, source: Source, spec: Batching, steps: int, ctx: Context) -> tuple[Stats, int]:
    """``steps`` gradient steps, each on a draw of its own; statistics are means over the steps that have them. Also
    returns the number of optimiser steps."""
    sums: Stats = {}
    counts: dict[str, int] = {}
    taken = 0
    for _ in range(steps):
        row, n = cycle.step(source.sample(spec, ctx.generator), ctx)
        taken += n
        for name, value in row.items():
            sums[name] = sums[name] + value if name in sums else value
            counts[name] = counts.get(name, 0) + 1
    return {name: value / counts[name] for name, value in sums.items()}, taken
