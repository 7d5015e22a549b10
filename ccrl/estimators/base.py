"""The estimator interface: what a paper fills in, and the life cycle that calls it.

    plan -> collect -> fit -> prepare -> (phases of surrogates | a direction with gradients) -> after_update

An estimator is an ``nn.Module`` so that everything it learns or counts is a buffer: checkpointed, moved with the
device, written in place (a compiled loss reads the same tensor at every update).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ccrl.bank import Bank
from ccrl.collect import Request
from ccrl.data import Batching, Data, Field
from ccrl.estimators.losses import check_trainable
from ccrl.estimators.scores import Scores
from ccrl.estimators.terms import Term
from ccrl.estimators.updates import GradientEstimate, Stats, Updater

__all__ = ["Context", "Direction", "Estimator", "Phase", "Stage"]

Stage = Callable[[Data], Data]
"""A prepare stage: derived columns from the columns before it, no gradient."""


@dataclass(frozen=True, eq=False)
class Phase:
    """One optimisation pass over the prepared data: which terms, cut how, by which updater."""

    name: str
    terms: tuple[Term, ...]
    batching: Batching
    updater: Updater
    before_epoch: Callable[[Data, Context], Data] | None = None
    """Called before every epoch but the first (recompute values and advantages)."""
    stop: Callable[[Stats, Context], bool] | None = None
    """Called with the statistics of every minibatch; True ends the phase (early stop on the KL). Costs a host sync."""
    skip: Callable[[Data, Context], bool] | None = None
    """Called once with the prepared data; True leaves the phase out (a zero gradient still moves Adam's momentum)."""
    every: int = 1
    """Off policy: gradient steps between two runs of the phase (TD3's actor: 2, CrossQ's: 3)."""

    def __post_init__(self) -> None:
        check_trainable(self.terms)


@dataclass
class Context:
    """What an estimator and its hooks may read besides the data. Counters are 0-d float64 tensors on the agent's
    device, written in place once per iteration: a compiled loss reads the same tensor at every update."""

    generator: torch.Generator
    bank: Bank
    scores: Callable[[Tensor, Data, Literal["step", "trajectory"]], Scores]
    """``scores(theta, data, level)``: per-sample scores of the live policy at a flat vector."""
    k: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Iterations done, for papers that count iterations."""
    clock: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """The learner's clock after the last iteration, in its unit."""
    start: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """The clock at which this training began."""
    end: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    """The clock at which it ends."""
    samples: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    """What an iteration adds to the clock (at most, where episodes end earlier)."""
    prompts: Any = None
    """Language models: the prompts drawn for this iteration, before ``plan``."""

    @property
    def policy(self) -> nn.Module:
        """The policy that is trained."""
        return self.bank.live

    @property
    def progress(self) -> Tensor:
        """``(clock - start) / (end - start)``: 0 in the first iteration; what every schedule reads."""
        return (self.clock - self.start) / (self.end - self.start)

    @property
    def share(self) -> Tensor:
        """``samples / (end - start)``: how much of the training one iteration is."""
        return self.samples / (self.end - self.start)


class Direction(Protocol):
    """An update rule of its own in place of updaters: N-PG-IGT, HARPG, natural, TRPO, UAPG."""

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        """Where to sample: tag -> flat parameters. ``{"on": theta}`` unless the paper looks ahead."""
        ...

    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        """The next parameters ``[n]``; ``gradient(tag)`` is the estimator's at the point of that tag."""
        ...


class Estimator(nn.Module):
    """Base class; override what the paper changes.

    ``fields``: raw columns to allocate beyond the behaviour policy's. ``heads``: value heads it needs.
    """

    fields: tuple[Field, ...] = ()
    heads: frozenset[str] = frozenset()
    reads_stats: ClassVar[bool] = True
    """Whether an overridden ``after_update`` may read the terms' ``stats``, which cost a forward pass. False: that pass
    is left out of iterations of which nothing is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[tuple[Term, ...], set[str]] = {}
        """Data columns that each phase's terms read."""
        self.described: dict[tuple[Term, ...], set[str]] = {}
        """Names of the statistics that are taken after each phase."""

    def __init_subclass__(cls, **options: Any) -> None:
        """``prepare`` runs without gradient, whoever calls it."""
        super().__init_subclass__(**options)
        if "prepare" in cls.__dict__:
            cls.prepare = torch.no_grad()(cls.prepare)  # type: ignore[method-assign]

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """Rollouts wanted, given those already there; called until it asks for nothing."""
        raise NotImplementedError

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        """Train auxiliary models on the rollouts (discriminator, GP features, predictor)."""
        return {}

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """The ordered stages: derived columns. Runs without gradient."""
        return have

    def phases(self) -> tuple[Phase, ...]:
        """Surrogates in the paper's order. The same objects at every call: compiled graphs are kept per terms tuple."""
        return ()

    def gradient(self, theta: Tensor, data: Data, ctx: Context) -> GradientEstimate:
        """An ASCENT direction of the return at ``theta`` (flat ``[n]``), for directions and the gradient lab."""
        raise NotImplementedError(f"{type(self).__name__} is a surrogate: it has phases, no gradient of its own")

    def after_minibatch(self, stats: Stats, ctx: Context) -> None:
        """Duals and moments that move with every minibatch: write buffers in place."""

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """Once per iteration: quantiles, histories, schedules, normalisers. ``stats`` are there for a row of the log
        to be added to, and to be read where ``reads_stats`` says so."""

    @property
    def per_minibatch(self) -> bool:
        """Whether ``after_minibatch`` is overridden (then minibatches cannot be fused into one call)."""
        return type(self).after_minibatch is not Estimator.after_minibatch


def check_terms(phases: tuple[Phase, ...], outputs: frozenset[str]) -> None:
    """Unknown forward outputs fail when the agent is built, not at the first update.

    :raises ValueError: naming the term, what it wants and what the policy has.
    """
    for phase in phases:
        for term in phase.terms:
            unknown = term.want - outputs
            if unknown:
                raise ValueError(
                    f"term {term.name!r} of phase {phase.name!r} wants {sorted(unknown)}, but the policy computes "
                    f"{sorted(outputs)}; add the head or change the term"
                )


def run_phases(estimator: Estimator, data: dict[str, Data], ctx: Context, watched: bool = True) -> tuple[Stats, int]:
    """Every phase, epoch and minibatch on ``data["on"]``; losses are means over the minibatches of their phase. Also
    returns the number of gradient steps taken (fewer than planned after an early stop).

    The terms' ``stats`` are taken after their phase, by a forward pass that is left out where nobody reads them: not
    ``watched``, and no ``after_update`` that might (``Estimator.reads_stats``).

    With several phases the totals are told apart by name: ``policy_total_loss``, ``critic_grad_norm``.
    """
    stats: Stats = {}
    steps = 0
    phases = estimator.phases()
    watched = watched or (estimator.reads_stats and type(estimator).after_update is not Estimator.after_update)
    for phase in phases:
        if phase.skip is not None and phase.skip(data["on"], ctx):
            continue
        rows = _run_phase(estimator, phase, data, ctx)
        total = sum(n for _, n in rows)
        steps += total
        means = {k: torch.stack([r[k] * (n / total) for r, n in rows]).sum() for k in rows[0][0]}
        # statistics of minibatches are from before their steps: 0 for one step, too small for more
        if any(term.stats is not None for term in phase.terms):
            if watched or phase.terms not in estimator.described:
                after = phase.updater.measure(phase.terms, data["on"].whole(phase.batching))
                estimator.described[phase.terms] = set(after)
                means |= after
            else:
                means = {k: v for k, v in means.items() if k not in estimator.described[phase.terms]}
        if len(phases) > 1:
            means[f"{phase.name}_total_loss"] = means.pop("loss")
            means[f"{phase.name}_grad_norm"] = means.pop("grad_norm")
        stats |= means
    return stats, steps


def _run_phase(estimator: Estimator, phase: Phase, data: dict[str, Data], ctx: Context) -> list[tuple[Stats, int]]:
    rows: list[tuple[Stats, int]] = []
    for epoch in range(phase.batching.epochs):
        if epoch and phase.before_epoch is not None:
            data["on"] = phase.before_epoch(data["on"], ctx)
        batches = _epoch(estimator, phase, data["on"], ctx.generator)
        if not estimator.per_minibatch and phase.stop is None:
            rows.append((phase.updater.run(phase.terms, batches), len(batches)))
            continue
        for batch in batches:
            row = phase.updater.step(phase.terms, batch)
            estimator.after_minibatch(row, ctx)
            rows.append((row, 1))
            if phase.stop is not None and phase.stop(row, ctx):
                return rows
    return rows


def _epoch(estimator: Estimator, phase: Phase, data: Data, generator: torch.Generator) -> list[Data]:
    """The batches of one epoch, of the columns that the phase reads (known after its first batch): a shuffle of every
    column there is costs more than a small network's forward pass."""
    if phase.terms in estimator.read:
        return data.keep(estimator.read[phase.terms]).epoch(phase.batching, generator)
    batches = data.epoch(phase.batching, generator)
    estimator.read[phase.terms] = {*phase.updater.columns(phase.terms, batches[0]), "valid", "group"}
    return batches
