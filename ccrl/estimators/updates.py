"""What estimators say to updaters and hear from them: statistics, gradients, and the protocol of an updater."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Term

__all__ = ["GradientEstimate", "Stats", "Updater", "owned_parameters"]

Stats = dict[str, Tensor]


@dataclass
class GradientEstimate:
    """A flat gradient ``[n]`` of the surrogate's loss, and where there is one its covariance as a matvec."""

    mean: Tensor
    stats: Stats = field(default_factory=dict)
    covariance: Callable[[Tensor], Tensor] | None = None


class Updater(Protocol):
    """The optimiser of one set of parameters, all that phases and agents know of it."""

    module: nn.Module
    """The module whose forward outputs the surrogate reads."""
    lr: Tensor
    """The learning rate, 0-d float64: schedules write it in place."""
    finite: Tensor
    """0-d bool: False once a gradient was not finite (that update was left out), until ``load_state_dict``."""
    compile: bool
    """Whether updates are compiled; may be set until the first one."""

    @property
    def flat(self) -> Tensor | None:
        """The owned parameters as one vector ``[n]`` that may be written in place, for directions; None where the
        parameters do not live in one."""

    def gradient(self, terms: tuple[Term, ...], batch: Data) -> GradientEstimate: ...
    def apply(self, estimate: GradientEstimate) -> Stats: ...
    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats: ...
    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats: ...
    def measure(self, terms: tuple[Term, ...], batch: Data) -> Stats: ...
    def columns(self, terms: tuple[Term, ...], batch: Data) -> list[str]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def owned_parameters(module: nn.Module, prefixes: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name, in the module's order; with ``prefixes`` those whose names start with one of them.

    :raises ValueError: if there are none.
    """
    named = {k: p for k, p in module.named_parameters() if prefixes is None or k.startswith(tuple(prefixes))}
    if not named:
        names = [k for k, _ in module.named_parameters()]
        raise ValueError(f"expected parameters whose names start with {prefixes}, got a module with {names}")
    return named
