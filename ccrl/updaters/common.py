"""What updaters share: the protocol, the surrogate of a batch, gradients summed over micro-batches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ccrl.data import Data, columns_read
from ccrl.estimators.terms import Term, surrogate

__all__ = [
    "GradientEstimate",
    "Stats",
    "Surrogates",
    "Updater",
    "accumulate",
    "can_compile",
    "owned_parameters",
    "surrogate_loss",
    "wanted",
]

Stats = dict[str, Tensor]


@dataclass
class GradientEstimate:
    """A flat gradient ``[n]`` of the surrogate's loss, and where there is one its covariance as a matvec."""

    mean: Tensor
    stats: Stats = field(default_factory=dict)
    covariance: Callable[[Tensor], Tensor] | None = None


class Updater(Protocol):
    """What phases and agents need of an updater."""

    lr: Tensor

    def gradient(self, terms: tuple[Term, ...], batch: Data) -> GradientEstimate: ...
    def apply(self, estimate: GradientEstimate) -> Stats: ...
    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats: ...
    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats: ...
    def columns(self, terms: tuple[Term, ...], batch: Data) -> list[str]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def can_compile() -> tuple[bool, str]:
    """Whether ``torch.compile`` has a C++ compiler here, and the line that says why not."""
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        return False, "no C++ compiler (g++ or clang++) on PATH: updates run eagerly; install one to compile them"
    return True, f"updates are compiled with {compiler}; the first one takes some seconds"


def wanted(terms: tuple[Term, ...]) -> frozenset[str]:
    """Forward outputs that the terms read."""
    return frozenset().union(*(t.want for t in terms))


def owned_parameters(module: nn.Module, prefixes: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name, in the module's order; with ``prefixes`` those whose names start with one of them.

    :raises ValueError: if there are none.
    """
    named = {k: p for k, p in module.named_parameters() if prefixes is None or k.startswith(tuple(prefixes))}
    if not named:
        names = [k for k, _ in module.named_parameters()]
        raise ValueError(f"expected parameters whose names start with {prefixes}, got a module with {names}")
    return named


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
