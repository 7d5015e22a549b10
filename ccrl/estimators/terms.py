"""Surrogate losses as sums of terms: ratio -> per-element loss -> aggregation.

A term is ``coef * sum(aggregate(valid) * loss(ratio, advantage, outputs, batch))``. Everything here runs inside one
compiled graph: no ``.item()``, no branching on data, ``where`` instead of ``0 * x`` (a masked ``-inf`` log-probability
times 0 is NaN), and numbers that change between updates are 0-d tensors (a changing Python float recompiles).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ccrl.data import Data, masked

__all__ = [
    "Aggregate",
    "Diagnostics",
    "LogRatio",
    "Loss",
    "Number",
    "Outputs",
    "Ratio",
    "Term",
    "no_ratio",
    "statistics",
    "surrogate",
]

Outputs = dict[str, Tensor]
"""Forward outputs of the policy on a batch, ``[T', B, ...]``; only what was asked for."""

Number = float | Tensor
"""A constant, or a 0-d tensor written in place by a schedule or a dual."""


class LogRatio(NamedTuple):
    """Log-probabilities at the level the ratio is formed: token ``[T', B]``, sequence ``[1, B]``, group ``[1, G]``."""

    log_prob: Tensor
    log_ref: Tensor
    """Log of the denominator, always detached."""
    valid: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls

    @property
    def log_ratio(self) -> Tensor:
        """0 on invalid elements, so that ``exp`` of garbage there cannot overflow into the gradient."""
        return masked(self.log_prob - self.log_ref, self.valid)

    @property
    def ratio(self) -> Tensor:
        return self.log_ratio.exp()


def no_ratio(valid: Tensor) -> LogRatio:
    """What a loss without a ratio is handed: only ``valid`` matters."""
    zero = torch.zeros_like(valid)
    return LogRatio(zero, zero, valid)


Ratio = Callable[[Outputs, Data], LogRatio]
Loss = Callable[[LogRatio, Tensor, Outputs, Data], Tensor]
Aggregate = Callable[[Tensor, Data], Tensor]
Diagnostics = Callable[[LogRatio, Tensor, Outputs, Data], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a surrogate. ``want`` are the forward outputs it reads; ``columns`` the data columns."""

    name: str
    loss: Loss
    aggregate: Aggregate
    ratio: Ratio | None = None
    """None: a loss without a ratio (values, entropy, closed-form KL), weighted per step or token."""
    want: frozenset[str] = frozenset({"log_prob"})
    advantage: str | None = "advantage"
    """Column ``[T', B]`` or per sequence ``[B]``; None: the loss gets zeros."""
    weight: str | None = None
    """Column multiplied into the per-element loss."""
    coef: Number = 1.0
    stats: Diagnostics | None = None
    """Diagnostics per element, averaged with the term's weights. What is logged describes the update: it is taken once
    after the phase, on all its data. Stops and ``after_minibatch`` see each minibatch's, taken before its step."""


def surrogate(terms: tuple[Term, ...], outputs: Outputs, batch: Data) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (0-d) and detached per-term statistics (before the coefficient).

    :raises ValueError: no term, or one whose loss has steps where its ratio has whole sequences.
    """
    total: Tensor | None = None
    stats: dict[str, Tensor] = {}
    for term in terms:
        ratio, advantage, weights = _inputs(term, outputs, batch)
        # a coefficient that is the constant 0 is there for its statistic: no backward pass through it
        off = isinstance(term.coef, float | int) and term.coef == 0
        element = term.loss(ratio, advantage, outputs, batch)
        if weights.shape[0] == 1 and element.dim() == 2 and element.shape[0] > 1:
            raise ValueError(
                f"term {term.name!r}: expected losses {list(weights.shape)}, as the ratio's elements are, got "
                f"{list(element.shape)}, which would be summed over the steps; take a column of sequences, such as "
                "sequence_advantage of SequenceAdvantage"
            )
        if term.weight is not None:
            element = element * batch[term.weight]
        value = _weighted_sum(weights, element)
        stats[term.name] = value.detach()
        stats |= _statistics(term, ratio, advantage, weights, outputs, batch)
        if off:
            continue
        total = term.coef * value if total is None else total + term.coef * value
    if total is None:
        raise ValueError("surrogate: expected at least one term, got none")
    stats["loss"] = total.detach()
    return total, stats


def statistics(terms: tuple[Term, ...], outputs: Outputs, batch: Data) -> dict[str, Tensor]:
    """The terms' ``stats`` alone, 0-d, without their losses."""
    found: dict[str, Tensor] = {}
    for term in terms:
        if term.stats is not None:
            found |= _statistics(term, *_inputs(term, outputs, batch), outputs, batch)
    return found


def _inputs(term: Term, outputs: Outputs, batch: Data) -> tuple[LogRatio, Tensor, Tensor]:
    """Log-ratio, advantage, element weights."""
    ratio = no_ratio(batch["valid"]) if term.ratio is None else term.ratio(outputs, batch)
    advantage = batch[term.advantage] if term.advantage is not None else torch.zeros_like(ratio.valid)
    return ratio, advantage, term.aggregate(ratio.valid, batch)


@torch.no_grad()
def _statistics(
    term: Term, ratio: LogRatio, advantage: Tensor, weights: Tensor, outputs: Outputs, batch: Data
) -> dict[str, Tensor]:
    if term.stats is None:
        return {}
    extra = term.stats(ratio, advantage, outputs, batch)
    return {k: _weighted_sum(weights, v).detach() for k, v in extra.items()}


def _weighted_sum(weights: Tensor, element: Tensor) -> Tensor:
    # masked, not multiplied by 0: a garbage element may be infinite
    return (weights * element.masked_fill(weights == 0, 0.0)).sum()
