"""What updaters share: the surrogate of a batch, gradients summed over micro-batches, learning-rate decay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ccrl.data import Data, columns_read
from ccrl.estimators.terms import Term, surrogate
from ccrl.estimators.updates import Stats, Updater

__all__ = ["Surrogates", "accumulate", "can_compile", "linear_decay", "surrogate_loss", "wanted"]


def linear_decay(updaters: Iterable[Updater], lr: float, progress: Tensor | float) -> None:
    """Set every updater's learning rate to ``lr (1 - progress)``, in place and never below 0.

    :param progress: done share of training in [0, 1]; a 0-d tensor is not read on the host.
    """
    for updater in updaters:
        updater.lr.copy_(lr * (1.0 - torch.as_tensor(progress, dtype=updater.lr.dtype)).clamp_min(0.0))


def can_compile() -> tuple[bool, str]:
    """Whether ``torch.compile`` has a C++ compiler here, and the line that says why not."""
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        return False, "no C++ compiler (g++ or clang++) on PATH: updates run eagerly; install one to compile them"
    return True, f"updates are compiled with {compiler}; the first one takes some seconds"


def wanted(terms: tuple[Term, ...]) -> frozenset[str]:
    """Forward outputs that the terms read."""
    return frozenset().union(*(t.want for t in terms))


def surrogate_loss(module: nn.Module, terms: tuple[Term, ...], batch: Data) -> tuple[Tensor, Stats]:
    return surrogate(terms, module.forward(batch, wanted(terms)), batch)


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
        total.backward(inputs=params)  # type: ignore[no-untyped-call]
        stats = {k: stats[k] + v for k, v in row.items()} if stats else row
    return stats


class Surrogates:
    module: nn.Module

    def columns(self, terms: tuple[Term, ...], batch: Data) -> list[str]:
        """Data columns that the surrogate and the policy read, found by one evaluation on ``batch``."""
        with torch.no_grad():
            return columns_read(lambda b: surrogate_loss(self.module, terms, b), batch)

    @torch.no_grad()
    def measure(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """The terms' values and statistics at the current parameters, nothing updated; exact over micro-batches."""
        rows = [surrogate_loss(self.module, terms, piece)[1] for piece in batch.microbatches(batch.microbatch)]
        return {k: torch.stack([r[k] for r in rows]).sum() for k in rows[0]}
