"""Adam on one flat vector, compiled or eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Term
from ccrl.estimators.updates import GradientEstimate, Stats, owned_parameters
from ccrl.onednn import graph_options
from ccrl.updaters.check import check_compiled
from ccrl.updaters.common import SurrogateModule, Surrogates, accumulate, frozen_buffers, surrogate_loss
from ccrl.waiting import waiting

__all__ = ["FlatState", "FlatUpdater", "PureUpdate"]


class FlatState(NamedTuple):
    """What one update reads and replaces."""

    flat: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    t: Tensor
    """Steps taken, float64 ``[1]``."""
    finite: Tensor
    """0-d bool: every gradient so far was finite."""
    buffers: dict[str, Tensor]
    """The module's buffers that the forward pass writes (running statistics), by name."""

    def tensors(self) -> list[Tensor]:
        """All of them, none of less than one axis: compiled CPU graphs drop in-place writes to 0-d float64 tensors
        (torch 2.13), silently."""
        found = [self.flat, self.exp_avg, self.exp_avg_sq, self.t, self.finite, *self.buffers.values()]
        return [x.unsqueeze(0) if x.dim() == 0 else x for x in found]

    def like(self, tensors: Sequence[Tensor]) -> FlatState:
        """The state that ``tensors()`` of a state like this one came from."""
        flat, m, v, t, finite, *buffers = tensors
        named = {k: x.view(b.shape) for x, (k, b) in zip(buffers, self.buffers.items())}
        return FlatState(flat, m, v, t, finite.view(()), named)


@dataclass(frozen=True, eq=False)
class PureUpdate:
    """One update as a function of tensors: the block that graphs of several updates are made of."""

    state: FlatState
    """The live tensors it starts from: writing them moves the module."""
    columns: list[str]
    """The data columns that it reads, in the order of ``values``."""
    names: list[str]
    """Names of the statistics it returns, ``grad_norm`` last."""
    step: Callable[[FlatState, Tensor, Sequence[Any], Mapping[str, Tensor]], tuple[FlatState, Tensor]]
    """``step(state, lr, values, substitutes) -> (new state, statistics [len(names)])``. ``substitutes``: parameters of
    the module that another updater owns and has just moved in the same graph, by name (``FlatUpdater.views`` of its new
    vector), and buffers that it has written; those not named are read from the module."""


class FlatUpdater(Surrogates):
    """Adam on one flat vector whose views are the module's parameters.

    :param prefixes: names (or name prefixes) of the parameters owned; None: all of them.
    :param lr: initial learning rate; ``self.lr`` is a 0-d tensor that schedules write in place.
    :param compile: fuse updates into one graph (``unroll`` minibatches per call).
    :raises ValueError: if no parameter matches, or dtypes are mixed.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        prefixes: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
        compile: bool = False,
        unroll: int = 4,
    ) -> None:
        named = owned_parameters(module, prefixes)
        if len({p.dtype for p in named.values()}) > 1:
            raise ValueError("FlatUpdater: expected one dtype for all parameters; use ModuleUpdater")
        self.module, self.names = module, tuple(named)
        self.shapes = [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        self.betas, self.eps, self.max_grad_norm, self.unroll = betas, eps, max_grad_norm, unroll
        self.flat = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.params = list(named.values())
        self._grad = torch.zeros_like(self.flat)
        for p, view, grad in zip(self.params, self._split(self.flat), self._split(self._grad)):
            p.data, p.grad = view, grad
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        # float64: 1 - 0.999^t loses four digits in float32 at t = 1. Shape [1]: a compiled graph silently drops
        # in-place writes to 0-d float64 CPU tensors (torch 2.13)
        self.t = torch.zeros(1, dtype=torch.float64, device=self.flat.device)
        self.lr = torch.tensor(float(lr), dtype=torch.float64, device=self.flat.device)
        self.finite = torch.ones((), dtype=torch.bool, device=self.flat.device)
        self.compile = compile
        self.hooks: list[Callable[[GradientEstimate], GradientEstimate]] = []
        """Called in order with every gradient before its step (averages over processes, adaptive step sizes); updates
        are then eager."""
        self._graphs: dict[tuple[int, int], tuple[tuple[Term, ...], Callable[[Sequence[Data]], Tensor], list[str]]] = {}

    def state(self, buffers: Sequence[str] = ()) -> FlatState:
        """The live tensors, with these buffers of the module: writing them moves the module."""
        named = {k: self.module.get_buffer(k) for k in buffers}
        return FlatState(self.flat, self.exp_avg, self.exp_avg_sq, self.t, self.finite, named)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The owned parameters by name, as views of a vector ``[n]``."""
        return dict(zip(self.names, self._split(flat)))

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [x.view(s) for x, s in zip(torch.split(flat, self.sizes), self.shapes)]

    # -- eager --------------------------------------------------------------------------------------------------------

    def gradient(self, terms: tuple[Term, ...], batch: Data) -> GradientEstimate:
        """Gradient of the surrogate at the current parameters; the vector is only valid until the next call."""
        self._grad.zero_()
        return GradientEstimate(self._grad, accumulate(terms, batch, self.params, partial(surrogate_loss, self.module)))

    @torch.no_grad()
    def apply(self, estimate: GradientEstimate) -> Stats:
        """Clip and one Adam step along ``-estimate.mean``. A non-finite gradient changes nothing and clears
        ``self.finite``, which the agent reads once per iteration.

        In place, so on an accelerator the host waits three times a step; the compiled path never does.
        """
        for hook in self.hooks:
            estimate = hook(estimate)
        grad = estimate.mean
        norm = torch.linalg.vector_norm(grad)
        if not bool(norm.isfinite()):
            self.finite.fill_(False)
            return estimate.stats | {"grad_norm": norm}
        if self.max_grad_norm is not None:
            grad = grad * (self.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        self.t.add_(1.0)
        b1, b2 = self.betas
        t, lr = float(self.t), float(self.lr)
        self.exp_avg.lerp_(grad, 1.0 - b1)
        self.exp_avg_sq.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
        root = self.exp_avg_sq.sqrt().div_(math.sqrt(1.0 - b2**t)).add_(self.eps)
        self.flat.addcdiv_(self.exp_avg, root, value=-lr / (1.0 - b1**t))
        return estimate.stats | {"grad_norm": norm}

    def _adam(
        self, flat: Tensor, m: Tensor, v: Tensor, t: Tensor, lr: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The arithmetic of ``torch.optim.Adam`` after ``clip_grad_norm_``, gated by the gradient being finite."""
        norm = torch.linalg.vector_norm(grad)
        ok = norm.isfinite()
        if self.max_grad_norm is not None:
            grad = grad * (self.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        b1, b2 = self.betas
        new_m, new_v = torch.lerp(m, grad, 1.0 - b1), b2 * v + (1.0 - b2) * grad * grad
        t = t + 1.0
        # the logarithm of 0 is an error; without a first moment there is nothing to correct
        scale = (lr / (1.0 - torch.exp(t * math.log(b1))) if b1 else lr).to(flat.dtype)
        root = torch.sqrt(1.0 - torch.exp(t * math.log(b2))).to(flat.dtype)
        new = flat - scale * new_m / (new_v.sqrt() / root + self.eps)
        return torch.where(ok, new, flat), torch.where(ok, new_m, m), torch.where(ok, new_v, v), norm, ok

    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """One update on one batch."""
        return self.run(terms, [batch])

    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        """One update per batch, in order; statistics are means over the batches."""
        if self.compile and not self.hooks:
            return self._run_compiled(terms, batches)
        return self.run_eager(terms, batches)

    def run_eager(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        """``run`` without compiling, whatever ``compile`` says."""
        rows = [self.apply(self.gradient(terms, batch)) for batch in batches]
        return {k: torch.stack([r[k] for r in rows]).mean() for k in rows[0]}

    # -- compiled -----------------------------------------------------------------------------------------------------

    def pure(self, terms: tuple[Term, ...], like: Data) -> PureUpdate:
        """One update on batches shaped like ``like`` as a pure function: it draws nothing, writes nothing and may be
        called any number of times inside one compiled graph, also together with other updaters' and with Polyak
        averages. The caller hands the graph ``update.state.tensors()``, makes a state of them with
        ``update.state.like(...)`` and copies the new state's ``tensors()`` back.

        Gradients are those of the whole surrogate: of parameters read by the module or anywhere inside a term.
        """
        columns, (names, written) = self.columns(terms, like), self._traced(terms, like)
        sequence, scalars = like.sequence, like.scalars
        whole = SurrogateModule(self.module, terms)

        def loss(
            flat: Tensor, values: Sequence[Any], substitutes: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
        ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
            batch = Data(dict(zip(columns, values)), sequence=sequence, scalars=scalars)
            fresh = {k: v.clone() for k, v in buffers.items()}  # the forward pass writes them in place
            named = {f"module.{k}": v for k, v in {**substitutes, **fresh, **self.views(flat)}.items()}
            total, row = torch.func.functional_call(whole, named, (batch,))
            return total, (torch.stack([row[n] for n in names]), fresh)

        def step(
            state: FlatState, lr: Tensor, values: Sequence[Any], substitutes: Mapping[str, Tensor]
        ) -> tuple[FlatState, Tensor]:
            grad, (row, buffers) = torch.func.grad(loss, has_aux=True)(state.flat, values, substitutes, state.buffers)
            flat, m, v, norm, ok = self._adam(state.flat, state.exp_avg, state.exp_avg_sq, state.t, lr, grad)
            t = torch.where(ok, state.t + 1.0, state.t)
            return FlatState(flat, m, v, t, state.finite & ok, buffers), torch.cat([row, norm.unsqueeze(0)])

        return PureUpdate(self.state(written), columns, [*names, "grad_norm"], step)

    def _traced(self, terms: tuple[Term, ...], like: Data) -> tuple[list[str], list[str]]:
        """Names of the statistics, and of the buffers that the forward pass writes."""
        with torch.no_grad(), frozen_buffers(self.module):
            before = {k: b._version for k, b in self.module.named_buffers()}
            names = list(surrogate_loss(self.module, terms, like)[1])
            return names, [k for k, b in self.module.named_buffers() if b._version != before[k]]

    def _run_compiled(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        if batches[0].microbatch is not None:
            raise ValueError("FlatUpdater: a compiled update takes whole batches; drop Batching.microbatch or compile")
        total: Tensor | None = None
        i, names = 0, list[str]()
        while i < len(batches):
            count = self.unroll if len(batches) - i >= self.unroll else 1
            run, names = self._graph(terms, batches[i : i + count])
            stats = run(batches[i : i + count])
            total = stats if total is None else total + stats
            i += count
        assert total is not None
        return dict(zip(names, (total / len(batches)).unbind()))

    def _graph(
        self, terms: tuple[Term, ...], batches: Sequence[Data]
    ) -> tuple[Callable[[Sequence[Data]], Tensor], list[str]]:
        key = (id(terms), len(batches))
        if key not in self._graphs:
            run, names = self.build(terms, batches[0])
            with waiting("compilation"):
                check_compiled(self, terms, batches, run)
            self._graphs[key] = (terms, run, names)  # keeps `terms` alive: an id may be reused after collection
        return self._graphs[key][1:]

    def build(self, terms: tuple[Term, ...], like: Data) -> tuple[Callable[[Sequence[Data]], Tensor], list[str]]:
        """A compiled function that takes one update per batch, in place, and returns the sums of the statistics; their
        names. It compiles at its first call, for that number of batches."""
        update = self.pure(terms, like)

        def steps(live: list[Tensor], lr: Tensor, inputs: list[tuple[Any, ...]]) -> Tensor:
            state = update.state.like(live)
            out: Tensor | None = None
            for values in inputs:
                state, row = update.step(state, lr, values, {})
                out = row if out is None else out + row
            for target, new in zip(live, state.tensors()):
                target.copy_(new)
            assert out is not None
            return out

        # Graphs are kept per terms and count, so only shapes and types are checked at a call (a seventh of the time
        # else). Compiled code is cached by code object: without one of its own, another updater's graph could run.
        steps.__code__ = steps.__code__.replace()
        options = graph_options(self.flat.device)
        graph = torch.compile(steps, dynamic=False, options=options)

        # a view of one axis: 0-d float64 tensors on the CPU are traced as numbers first, and then all over again
        live, rate = update.state.tensors(), self.lr.view(1)

        @torch.no_grad()
        def run(batches: Sequence[Data]) -> Tensor:
            inputs = [tuple(batch[c] for c in update.columns) for batch in batches]
            out: Tensor = graph(live, rate, inputs)
            return out

        return run, update.names

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).clone() for k in ("flat", "exp_avg", "exp_avg_sq", "t", "lr")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: parameters stay views of the flat vector and compiled graphs stay valid."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self.finite.fill_(True)
