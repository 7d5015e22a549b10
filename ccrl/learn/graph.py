"""A whole off-policy gradient step as ONE compiled graph: targets, every phase's update, Polyak averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ccrl.columns import columns_read
from ccrl.data import Data
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.updates import Stats
from ccrl.onednn import graph_options
from ccrl.updaters.check import left_unchanged, unequal
from ccrl.updaters.flat import FlatUpdater
from ccrl.waiting import waiting

if TYPE_CHECKING:
    from ccrl.learn.cycle import Cycle, Polyak

__all__ = ["CycleGraphs"]

Pattern = tuple[tuple[Phase, ...], tuple["Polyak", ...]]
Run = Callable[[Data], Stats]


class _Targets(nn.Module):
    """``cycle.targets`` as a module, so that ``functional_call`` can put moved parameters into the policy and into its
    frozen versions."""

    def __init__(self, cycle: Cycle, ctx: Context) -> None:
        super().__init__()
        self.live = ctx.policy
        self.versions = nn.ModuleDict({name: ctx.bank.policy(name) for name in ctx.bank.names()})
        self.make = lambda batch: cycle.targets(batch, ctx)

    def forward(self, batch: Data) -> Data:
        return self.make(batch)  # type: ignore[no-any-return, no-untyped-call]


class CycleGraphs:
    """Compiled steps of a cycle, one per pattern of phases and averages that are due together.

    The first step of every pattern is checked against the eager one. Random columns are drawn outside.
    """

    def __init__(self, cycle: Cycle) -> None:
        self.cycle = cycle
        self._steps: dict[tuple[int, ...], Run] = {}
        self._flat: dict[tuple[str, int], Tensor] = {}

    def step(self, phases: tuple[Phase, ...], averages: tuple[Polyak, ...], batch: Data, ctx: Context) -> Stats:
        """One gradient step in place; its statistics. Averages that are copies follow the graph: they are rare, and a
        graph of their own would be compiled for each."""
        stats = self._step(phases, tuple(a for a in averages if a.tau < 1.0), batch, ctx)
        for average in averages:
            if average.tau == 1.0:
                ctx.bank.refresh(average.version, prefixes=average.prefixes)
        return stats

    def _step(self, phases: tuple[Phase, ...], averages: tuple[Polyak, ...], batch: Data, ctx: Context) -> Stats:
        key = (*map(id, phases), -1, *map(id, averages))
        if key not in self._steps:
            run = self._build((phases, averages), batch, ctx)
            with waiting("compilation"):
                _check(self, (phases, averages), batch, ctx, run)
            self._steps[key] = run
        return self._steps[key](batch)

    # -- building -----------------------------------------------------------------------------------------------------

    def _build(self, pattern: Pattern, like: Data, ctx: Context) -> Run:
        cycle, (phases, averages) = self.cycle, pattern
        whole = _Targets(cycle, ctx)
        with torch.no_grad():
            found: list[Data] = []
            columns = columns_read(lambda b: found.append(whole(b)), like)
        ready = found[0].with_scalars(**{k: torch.zeros((), device=like["valid"].device) for k in cycle.hands_on})
        updaters = list({id(p.updater): p.updater for p in phases}.values())
        if any(not isinstance(u, FlatUpdater) for u in updaters):
            raise TypeError("one_graph: expected FlatUpdater in every phase; set one_graph = False")
        if len(updaters) < len(phases):
            raise ValueError("one_graph: expected one updater per phase, got one twice; set one_graph = False")
        pure = [u.pure(p.terms, ready) for p, u in ((p, _flat(p)) for p in phases)]
        columns = sorted({*columns, "valid", *(c for update in pure for c in update.columns if c in like)})
        moves = [(a, u, self._target(a, u, ctx)) for a in averages for u in self._owners(a)]
        live = [update.state.tensors() for update in pure]
        rates = [_flat(p).lr.view(1) for p in phases]  # of one axis, as in FlatUpdater.build
        names: list[str] = []
        # the parameters of updaters outside this pattern are read from their modules: nothing moves them here
        outside = {id(u): u.flat for _, u, _ in moves if not any(u is v for v in updaters)}

        def steps(
            live: list[list[Tensor]], targets: list[Tensor], still: dict[int, Tensor], rates: list[Tensor],
            values: Sequence[Any],
        ) -> Tensor:  # fmt: skip
            batch = Data(dict(zip(columns, values)), sequence=like.sequence, scalars=like.scalars)
            states = [update.state.like(tensors) for update, tensors in zip(pure, live)]
            moved: dict[str, Tensor] = {}
            for phase, state in zip(phases, states):
                moved |= _flat(phase).views(state.flat) | state.buffers
            named = {f"live.{k}": v for k, v in moved.items()}
            for (average, updater, _), flat in zip(moves, targets):
                named |= {f"versions.{average.version}.{k}": v for k, v in updater.views(flat).items()}
            batch = torch.func.functional_call(whole, named, (batch,))
            rows: list[Tensor] = []
            after: list[Any] = []
            for phase, update, state, lr in zip(phases, pure, states, rates):
                new, row = update.step(state, lr, tuple(batch[c] for c in update.columns), moved)
                moved = moved | _flat(phase).views(new.flat) | new.buffers
                batch = cycle.handed_on(batch, dict(zip(update.names, row.unbind())))
                rows.append(row)
                after.append(new)
            flats = {id(_flat(p)): new.flat for p, new in zip(phases, after)} | still
            mixed = [torch.lerp(old, flats[id(u)], a.tau) for (a, u, _), old in zip(moves, targets)]
            for tensors, new in zip(live, after):
                for target, value in zip(tensors, new.tensors()):
                    target.copy_(value)
            for target, value in zip(targets, mixed):
                target.copy_(value)
            return torch.cat(rows)

        for phase, update in zip(phases, pure):
            names += [cycle.name_of(phase, k) for k in update.names]
        steps.__code__ = steps.__code__.replace()  # compiled code is cached by code object
        options = graph_options(like["valid"].device)
        graph = torch.compile(steps, dynamic=False, fullgraph=True, options=options)
        targets = [flat for _, _, flat in moves]
        buffers = [_buffer_pairs(a, ctx) for a in averages]

        @torch.no_grad()
        def run(batch: Data) -> Stats:
            out: Tensor = graph(live, targets, outside, rates, tuple(batch[c] for c in columns))
            for pairs in buffers:
                for target, source in pairs:
                    target.copy_(source)
            return dict(zip(names, out.unbind()))

        return run

    def _owners(self, average: Polyak) -> list[FlatUpdater]:
        """The updaters whose parameters ``average`` moves: all of them or none."""
        found = []
        for updater in {id(p.updater): _flat(p) for p in self.cycle.phases()}.values():
            inside = [average.prefixes is None or n.startswith(tuple(average.prefixes)) for n in updater.names]
            if any(inside) and not all(inside):
                raise ValueError(
                    f"one_graph: expected averages of all parameters of an updater, got prefixes {average.prefixes} "
                    f"next to an updater of {updater.names}; give it prefixes of its own, or set one_graph = False"
                )
            if all(inside):
                found.append(updater)
        return found

    def _target(self, average: Polyak, updater: FlatUpdater, ctx: Context) -> Tensor:
        """The version's parameters as views of one vector, in the updater's order."""
        key = (average.version, id(updater))
        if key not in self._flat:
            named = dict(ctx.bank.policy(average.version).named_parameters())
            flat = torch.cat([named[n].detach().reshape(-1) for n in updater.names])
            for name, view in updater.views(flat).items():
                named[name].data = view
            self._flat[key] = flat
        return self._flat[key]


def _flat(phase: Phase) -> FlatUpdater:
    assert isinstance(phase.updater, FlatUpdater)
    return phase.updater


def _buffer_pairs(average: Polyak, ctx: Context) -> list[tuple[Tensor, Tensor]]:
    """Buffers of the version and of the policy that ``average`` copies."""
    chosen = (
        [b for k, b in m.named_buffers() if average.prefixes is None or k.startswith(tuple(average.prefixes))]
        for m in (ctx.bank.policy(average.version), ctx.policy)
    )
    return list(zip(*chosen))


# -- the first step against the eager one ------------------------------------------------------------------------------


def _check(graphs: CycleGraphs, pattern: Pattern, batch: Data, ctx: Context, run: Run) -> None:
    """One step compiled and eagerly from the same state; everything is put back.

    :raises RuntimeError: naming the parameters where the steps differ.
    """
    phases, averages = pattern
    updaters = list({id(p.updater): _flat(p) for p in phases}.values())
    eps = max(torch.finfo(u.flat.dtype).eps for u in updaters)

    def trial(step: Callable[[Data], object], moved: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with _unchanged(updaters, averages, ctx):
            with torch.no_grad():
                for u in updaters:
                    sign = torch.ones_like(u.flat)
                    sign[::2] = -1.0
                    u.flat.mul_(1.0 + moved * sign)
                    u.exp_avg.zero_()
                    u.exp_avg_sq.fill_(1.0)  # Adam from a second moment near 0 turns rounding into whole steps
                starts = [u.flat.clone() for u in updaters]
            step(batch)
            gradient: dict[str, Tensor] = {}
            change: dict[str, Tensor] = {}
            for u, start in zip(updaters, starts):
                gradient |= u.views(u.exp_avg.clone())
                change |= u.views(u.flat - start)
            for a in averages:
                change |= {f"{a.version}:{k}": p.clone() for k, p in ctx.bank.policy(a.version).named_parameters()}
            change |= {f"buffer {k}": b.clone() for k, b in ctx.policy.named_buffers() if b.is_floating_point()}
            return gradient, change

    def eager(batch: Data) -> object:
        # a graph for each updater, which nothing runs afterwards, would take as long to compile as the whole one
        compiled = [(u, u.compile) for u in updaters]
        for u in updaters:
            u.compile = False
        try:
            return graphs.cycle.run(phases, averages, batch, ctx)
        finally:
            for u, before in compiled:
                u.compile = before

    found, expected = trial(run), trial(eager)
    wrong: list[str] = []
    for i in range(2):
        floors: dict[str, Tensor | float] = {k: 16.0 * eps * (1.0 + v.norm()) for k, v in expected[i].items()}
        if i:
            sizes = {k: v.norm() for u in updaters for k, v in u.views(u.flat).items()}
            floors = {k: floor + 16.0 * eps * sizes.get(k, 0.0) for k, floor in floors.items()}
        wrong += unequal(found[i], expected[i], floors, eps, lambda moved, i=i: trial(eager, moved)[i])  # type: ignore[misc]
    if wrong:
        raise RuntimeError(
            f"phases {[p.name for p in phases]}: the compiled step of {sorted(set(wrong))} is not the eager one. A "
            "graph sees parameters that are read through the policy and its versions, and draws no random numbers: "
            "mend targets or terms, or train with compile off"
        )


@contextmanager
def _unchanged(updaters: Sequence[FlatUpdater], averages: Sequence[Polyak], ctx: Context) -> Iterator[None]:
    versions = [ctx.bank.policy(a.version) for a in averages]
    saved: list[Mapping[str, Tensor]] = [{k: x.clone() for k, x in v.state_dict().items()} for v in versions]
    with ExitStack() as stack:
        for u in updaters:
            stack.enter_context(left_unchanged(u))
        try:
            yield
        finally:
            for version, state in zip(versions, saved):
                version.load_state_dict(state)
