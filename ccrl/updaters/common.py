"""What updaters share: the surrogate of a batch, gradients summed over micro-batches, learning-rate decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.columns import columns_read
from ccrl.data import Data
from ccrl.estimators.terms import Term, statistics, surrogate
from ccrl.estimators.updates import GradientEstimate, Stats, Updater
from ccrl.native import compiler

__all__ = [
    "AdaptiveRate",
    "SurrogateModule",
    "Surrogates",
    "accumulate",
    "can_compile",
    "linear_decay",
    "surrogate_loss",
]


def linear_decay(updaters: Iterable[Updater], lr: float, progress: Tensor | float) -> None:
    """Set every updater's learning rate to ``lr (1 - progress)``, in place and never below 0.

    :param progress: done share of training in [0, 1]; a 0-d tensor is not read on the host.
    """
    for updater in updaters:
        done = torch.as_tensor(progress, dtype=updater.lr.dtype, device=updater.lr.device)
        updater.lr.copy_(lr * (1.0 - done).clamp_min(0.0))


def can_compile() -> tuple[bool, str]:
    """Whether ``torch.compile`` has a C++ compiler here, and the line that says why not."""
    found = compiler()
    if found is None:
        return False, "no C++ compiler (g++ or clang++) on PATH: updates run eagerly; install one to compile them"
    return True, f"updates are compiled with {found}; the first one takes some seconds"


class AdaptiveRate:
    """A step size that follows the KL of the policy from the one that acted, as in rsl_rl's schedule "adaptive".

    Before every step: above ``2 desired`` it is divided by ``factor``, down to ``low``; below ``desired / 2`` (and
    above 0: the first minibatch of an iteration says nothing) multiplied by it, up to ``high``. A hook of
    ``FlatUpdater``.

    :param lr: the updater's, written in place.
    :param statistic: which of the gradient's statistics is the KL.
    """

    def __init__(
        self,
        lr: Tensor,
        desired: float,
        *,
        factor: float = 1.5,
        low: float = 1e-5,
        high: float = 1e-2,
        statistic: str = "kl",
    ) -> None:
        self.lr, self.desired, self.factor, self.low, self.high = lr, desired, factor, low, high
        self.statistic = statistic

    @torch.no_grad()
    def __call__(self, estimate: GradientEstimate) -> GradientEstimate:
        kl, lr = estimate.stats[self.statistic], self.lr
        slower, faster = (lr / self.factor).clamp_min(self.low), (lr * self.factor).clamp_max(self.high)
        grown = torch.where((kl > 0.0) & (kl < 0.5 * self.desired), faster, lr)
        lr.copy_(torch.where(kl > 2.0 * self.desired, slower, grown))
        return estimate


class SurrogateModule(nn.Module):
    """The surrogate of some terms as one module: under ``torch.func.functional_call`` every parameter that a forward
    pass, a ratio, a loss or an aggregate reads through ``module`` is the substituted one. Substituted in the forward
    pass alone, a temperature read inside a loss would be a constant: gradient 0, silently."""

    def __init__(self, module: nn.Module, terms: tuple[Term, ...]) -> None:
        super().__init__()
        self.module, self.terms = module, terms
        self.want = frozenset().union(*(t.want for t in terms))

    def forward(self, batch: Data) -> tuple[Tensor, Stats]:
        return surrogate(self.terms, self.module.forward(batch, self.want), batch)


def surrogate_loss(module: nn.Module, terms: tuple[Term, ...], batch: Data) -> tuple[Tensor, Stats]:
    """The loss to minimise (0-d) and the terms' statistics at the module's own parameters."""
    want = frozenset().union(*(t.want for t in terms))
    return surrogate(terms, module.forward(batch, want), batch)


def accumulate(
    terms: tuple[Term, ...],
    batch: Data,
    params: list[nn.Parameter],
    loss: Callable[[tuple[Term, ...], Data], tuple[Tensor, Stats]],
) -> Stats:
    """Add the gradient of ``loss`` to ``p.grad``, micro-batch by micro-batch.

    Plain sums are exact for gradients and statistics: the terms divide by counts of the whole batch.
    """
    stats: Stats = {}
    for piece in batch.microbatches(batch.microbatch):
        total, row = loss(terms, piece)
        if not total.requires_grad:
            raise ValueError(
                f"terms {[t.name for t in terms]}: expected a loss that depends on parameters, got a constant; check "
                "what the terms detach and which parameters are frozen"
            )
        total.backward(inputs=params)  # type: ignore[no-untyped-call]
        stats = {k: stats[k] + v for k, v in row.items()} if stats else row
    return stats


@contextmanager
def frozen_buffers(module: nn.Module) -> Iterator[None]:
    """The module's buffers are afterwards what they were: running statistics do not move with a look at the loss."""
    saved = [b.clone() for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(module.buffers(), saved):
                buffer.copy_(before)


class Surrogates:
    """What updaters do with a surrogate besides optimising it."""

    module: nn.Module
    params: list[nn.Parameter]

    def columns(self, terms: tuple[Term, ...], batch: Data) -> list[str]:
        """Data columns that the surrogate and the policy read, found by one evaluation on ``batch``.

        :raises ValueError: if the surrogate reaches none of the parameters (every update would do nothing), or a
            Parameter that is not the module's (nobody would ever train it).
        """
        # a micro-batch, where there are any: the evaluation keeps its graph
        piece = batch.microbatches(batch.microbatch)[0]
        found: list[Tensor] = []
        with torch.enable_grad(), frozen_buffers(self.module):
            columns = columns_read(lambda b: found.append(surrogate_loss(self.module, terms, b)[0]), piece)
        reached = _parameters_behind(found[0])
        own = {id(p) for p in self.module.parameters()}
        if foreign := [tuple(p.shape) for p in reached.values() if id(p) not in own]:
            raise ValueError(
                f"terms {[t.name for t in terms]}: expected parameters of the updater's module, got a Parameter of "
                f"shape {foreign[0]} that belongs to none: it would never be trained; make it part of the module, or a "
                "buffer"
            )
        if not any(id(p) in reached for p in self.params):
            owned = [k for k, p in self.module.named_parameters() if any(p is q for q in self.params)]
            raise ValueError(
                f"terms {[t.name for t in terms]}: expected a loss that depends on the updater's parameters, got one "
                f"that reads none of {owned}; give the updater other prefixes, or the phase another updater"
            )
        return columns

    @torch.no_grad()
    def measure(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """The terms' ``stats`` at the current parameters, nothing updated; exact over micro-batches."""
        terms = tuple(t for t in terms if t.stats is not None)
        if not terms:
            return {}
        want = frozenset().union(*(t.want for t in terms))
        with frozen_buffers(self.module):
            rows = [statistics(terms, self.module.forward(b, want), b) for b in batch.microbatches(batch.microbatch)]
        return {k: torch.stack([r[k] for r in rows]).sum() for k in rows[0]}


def _parameters_behind(loss: Tensor) -> dict[int, nn.Parameter]:
    """The Parameters in which the graph of ``loss`` ends, by id."""
    found, seen, stack = dict[int, nn.Parameter](), set[Any](), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            found[id(leaf)] = leaf
        stack.extend(following for following, _ in node.next_functions)
    return found
