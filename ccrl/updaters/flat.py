"""Adam on one flat vector, compiled or eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data, columns_read
from ccrl.estimators.terms import Term, surrogate
from ccrl.estimators.updates import GradientEstimate, Stats, owned_parameters
from ccrl.updaters.common import Surrogates, accumulate, surrogate_loss, wanted

__all__ = ["FlatUpdater"]


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
        self._graphs: dict[tuple[int, int], tuple[tuple[Term, ...], Callable[..., Tensor], list[str], list[str]]] = {}

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
        scale = (lr / (1.0 - torch.exp(t * math.log(b1)))).to(flat.dtype)
        root = torch.sqrt(1.0 - torch.exp(t * math.log(b2))).to(flat.dtype)
        new = flat - scale * new_m / (new_v.sqrt() / root + self.eps)
        return torch.where(ok, new, flat), torch.where(ok, new_m, m), torch.where(ok, new_v, v), norm, ok

    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """One update on one batch."""
        return self.run(terms, [batch])

    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        """One update per batch, in order; statistics are means over the batches."""
        if self.compile:
            return self._run_compiled(terms, batches)
        rows = [self.apply(self.gradient(terms, batch)) for batch in batches]
        return {k: torch.stack([r[k] for r in rows]).mean() for k in rows[0]}

    # -- compiled -----------------------------------------------------------------------------------------------------

    def _run_compiled(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        if batches[0].microbatch is not None:
            raise ValueError("FlatUpdater: a compiled update takes whole batches; drop Batching.microbatch or compile")
        total: Tensor | None = None
        i, names = 0, list[str]()
        while i < len(batches):
            count = self.unroll if len(batches) - i >= self.unroll else 1
            graph, columns, names = self._graph(terms, batches[i], count)
            inputs = [tuple(batch[c] for c in columns) for batch in batches[i : i + count]]
            with torch.no_grad():
                stats = graph(self.flat, self.exp_avg, self.exp_avg_sq, self.t, self.lr, self.finite, inputs)
            total = stats if total is None else total + stats
            i += count
        assert total is not None
        return dict(zip(names, (total / len(batches)).unbind()))

    def _graph(
        self, terms: tuple[Term, ...], batch: Data, count: int
    ) -> tuple[Callable[..., Tensor], list[str], list[str]]:
        key = (id(terms), count)
        if key not in self._graphs:
            columns, names = self._trace(terms, batch)
            # keeps `terms` alive: an id may be reused after collection
            self._graphs[key] = (terms, self._build(terms, batch, columns, names), columns, names)
        _, graph, columns, names = self._graphs[key]
        return graph, columns, names

    def _trace(self, terms: tuple[Term, ...], batch: Data) -> tuple[list[str], list[str]]:
        """Columns that the surrogate reads (only those enter the graph) and the names of its statistics."""
        stats: Stats = {}
        with torch.no_grad():
            columns = columns_read(lambda b: stats.update(surrogate_loss(self.module, terms, b)[1]), batch)
        return columns, [*stats, "grad_norm"]

    def _build(
        self, terms: tuple[Term, ...], like: Data, columns: list[str], names: list[str]
    ) -> Callable[..., Tensor]:
        want, module = wanted(terms), self.module
        sequence, scalars = like.sequence, like.scalars

        def loss(flat: Tensor, values: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            batch = Data(dict(zip(columns, values)), sequence=sequence, scalars=scalars)
            params = dict(zip(self.names, self._split(flat)))
            evaluation = torch.func.functional_call(module, params, (batch, want))
            total, stats = surrogate(terms, evaluation, batch)
            return total, torch.stack([stats[n] for n in names[:-1]])

        def steps(
            flat: Tensor, m: Tensor, v: Tensor, t: Tensor, lr: Tensor, finite: Tensor, inputs: list[tuple[Any, ...]]
        ) -> Tensor:
            x, x_m, x_v, x_t, x_ok = flat, m, v, t, finite
            out: Tensor | None = None
            for values in inputs:
                grad, stats = torch.func.grad(loss, has_aux=True)(x, values)
                x, x_m, x_v, norm, ok = self._adam(x, x_m, x_v, x_t, lr, grad)
                x_t, x_ok = torch.where(ok, x_t + 1.0, x_t), x_ok & ok
                row = torch.cat([stats, norm.unsqueeze(0)])
                out = row if out is None else out + row
            for old, new in ((flat, x), (m, x_m), (v, x_v), (t, x_t), (finite, x_ok)):
                old.copy_(new)
            assert out is not None
            return out

        # Graphs are kept per terms and count, so only shapes and types are checked at a call (a seventh of the time
        # else). Compiled code is cached by code object: without one of its own, another updater's graph could run.
        steps.__code__ = steps.__code__.replace()
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
        options["cpp_wrapper"] = self.flat.device.type == "cpu"  # in Python it takes a fifth of a small graph's time
        return torch.compile(steps, dynamic=False, options=options)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k).clone() for k in ("flat", "exp_avg", "exp_avg_sq", "t", "lr")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: parameters stay views of the flat vector and compiled graphs stay valid."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self.finite.fill_(True)
