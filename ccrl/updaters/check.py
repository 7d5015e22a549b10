"""The first compiled batch against the eager gradient: a graph that silently drops a gradient trains another loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.terms import Term
from ccrl.estimators.updates import Stats
from ccrl.updaters.common import frozen_buffers, surrogate_loss

if TYPE_CHECKING:
    from ccrl.updaters.flat import FlatUpdater
    from ccrl.updaters.module import ModuleUpdater

__all__ = ["TOLERANCE", "check_compiled", "check_loss", "disagreement", "unequal"]

TOLERANCE = 1e-4
"""Largest difference allowed per parameter, relative to its norm; float32 rounding is a hundredth of it."""

KINK = 256
"""By how many roundings parameters move to either side in search of kinks."""

Run = Callable[[Sequence[Data]], object]


def unequal(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    floor: Mapping[str, Tensor | float],
    eps: float,
    perturbed: Callable[[float], Mapping[str, Tensor]],
) -> list[str]:
    """Names whose tensors differ by more than ``TOLERANCE`` of their norm plus ``floor``.

    A gradient that is 0 but for rounding (of a KL at the old parameters) has no relative accuracy: what looks unequal
    is measured once more against ``perturbed(eps)``, the expected tensors at parameters moved by that share. A unit of
    a ReLU within rounding of 0 is on in one of two sums of the same numbers and off in the other, which moves gradients
    by thousandths of their norm: what is still unequal is measured against ``perturbed(+-KINK * eps)``, where such
    units change sides; a smooth gradient moves by less than the tolerance there.
    """
    allowed = {k: TOLERANCE * _norm(v) + floor[k] for k, v in expected.items()}

    def beyond(names: Sequence[str]) -> list[str]:
        return [k for k in names if not bool(_norm(got[k].double() - expected[k]) <= allowed[k])]

    wrong = beyond(list(expected))
    far = min(KINK * eps, 1e-3)
    for factor, moves in ((16.0, (eps,)), (2.0, (far, -far))):
        if wrong:
            noise = [perturbed(moved) for moved in moves]
            allowed |= {k: allowed[k] + factor * max(_norm(x[k] - expected[k]) for x in noise) for k in wrong}
            wrong = beyond(wrong)
    return wrong


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.double())
    return norm


def disagreement(terms: Sequence[str], parameters: Sequence[str]) -> str:
    """The error's text."""
    return (
        f"term {', '.join(map(repr, terms))}: the compiled update of {', '.join(map(repr, parameters))} is not the "
        f"eager one (expected: equal to {TOLERANCE} of its norm). A compiled surrogate sees the parameters that are "
        "read through the module (module.name), not a Parameter object held elsewhere, and it draws no random numbers: "
        "mend the term, or train with compile off"
    )


def check_compiled(updater: FlatUpdater, terms: tuple[Term, ...], batches: Sequence[Data], run: Run) -> None:
    """Update on ``batches`` compiled and eagerly from the same parameters, and put everything back.

    :raises RuntimeError: naming terms and parameters where the updates differ.
    """
    wrong = _differing(updater, terms, batches, run)
    if not wrong:
        return
    alone = [t.name for t in terms if wrong & _differing_alone(updater, t, batches[0])]
    raise RuntimeError(disagreement(alone or [t.name for t in terms], sorted(wrong)))


def _differing_alone(updater: FlatUpdater, term: Term, batch: Data) -> set[str]:
    try:
        run, _ = updater.build((term,), batch)
        return _differing(updater, (term,), [batch], run)
    except ValueError:  # alone it has no gradient (a coefficient of 0, no parameter): the fault is another's
        return set()


def _differing(updater: FlatUpdater, terms: tuple[Term, ...], batches: Sequence[Data], run: Run) -> set[str]:
    """Names of the parameters, and of the buffers written on the way, that differ afterwards."""
    eps = torch.finfo(updater.flat.dtype).eps
    alternating = torch.ones_like(updater.flat)
    alternating[::2] = -1.0

    def trial(run: Run, moved: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
        """First moments, changes of parameters (and buffers), and whether they are finite."""
        with left_unchanged(updater):
            with torch.no_grad():
                updater.flat.mul_(1.0 + moved * alternating)
                start = updater.flat.clone()
                # Adam divides by the root of the second moment, which near 0 turns rounding into whole steps; from 1
                # an update is smooth in the gradient, and so are the gradients that follow it
                updater.exp_avg.zero_()
                updater.exp_avg_sq.fill_(1.0)
                updater.finite.fill_(True)
            run(batches)
            gradient, change = updater.views(updater.exp_avg.clone()), updater.views(updater.flat - start)
            # as doubles: flags have no difference
            return gradient, change | {k: b.double().clone() for k, b in buffers()}, bool(updater.finite)

    def buffers() -> list[tuple[str, Tensor]]:
        return [(k, b) for k, b in updater.module.named_buffers() if b.numel()]

    def eager(batches: Sequence[Data]) -> object:
        return updater.run_eager(terms, batches)

    gradient, change, finite = trial(run)
    expected_gradient, expected_change, expected_finite = trial(eager)
    whole = torch.linalg.vector_norm(torch.stack([g.norm() for g in expected_gradient.values()]))
    smallest = dict.fromkeys(updater.names, eps * whole + eps**1.5)
    rounding: dict[str, Tensor | float] = {k: 4.0 * eps * v.norm() for k, v in updater.views(updater.flat).items()}
    rounding |= dict.fromkeys((k for k, _ in buffers()), eps)
    wrong = {
        *unequal(gradient, expected_gradient, smallest, eps, lambda moved: trial(eager, moved)[0]),
        *unequal(change, expected_change, rounding, eps, lambda moved: trial(eager, moved)[1]),
    }
    return wrong if finite == expected_finite else set(updater.names)


def check_loss(
    updater: ModuleUpdater, terms: tuple[Term, ...], batch: Data, compiled: Callable[[Data], tuple[Tensor, Stats]]
) -> None:
    """The gradient of a compiled surrogate against the eager one's; nothing is updated.

    :raises RuntimeError: naming terms and parameters where they differ.
    """

    def gradient(loss: Callable[[Data], tuple[Tensor, Stats]]) -> dict[str, Tensor]:
        with frozen_buffers(updater.module):
            found = torch.autograd.grad(loss(batch)[0], updater.params, allow_unused=True, materialize_grads=True)
            # as doubles: flags have no difference
            return dict(zip(updater.names, found)) | {k: b.double() for k, b in updater.module.named_buffers()}

    def differing(terms: tuple[Term, ...], compiled: Callable[[Data], tuple[Tensor, Stats]]) -> list[str]:
        eager = partial(surrogate_loss, updater.module, terms)

        def perturbed(moved: float) -> dict[str, Tensor]:
            saved = [p.detach().clone() for p in updater.params]
            try:
                for p in updater.params:
                    p.data.mul_(1.0 + moved)
                return gradient(eager)
            finally:
                for p, before in zip(updater.params, saved):
                    p.data.copy_(before)

        got, expected = gradient(compiled), gradient(eager)
        whole = torch.stack([expected[k].norm().double() for k in updater.names]).norm()
        eps = max(torch.finfo(p.dtype).eps for p in updater.params)
        return unequal(got, expected, dict.fromkeys(expected, eps * whole + eps**1.5), eps, perturbed)

    wrong = differing(terms, compiled)
    if wrong:
        alone = [t.name for t in terms if _trains(t) and {*differing((t,), updater.build((t,), batch))} & {*wrong}]
        raise RuntimeError(disagreement(alone or [t.name for t in terms], wrong))


def _trains(term: Term) -> bool:
    return not (isinstance(term.coef, float | int) and term.coef == 0)


@contextmanager
def left_unchanged(updater: FlatUpdater) -> Iterator[None]:
    """Whatever happens inside, the updater's state and its module are afterwards what they were."""
    live = updater.state().tensors()
    saved = [x.clone() for x in live]
    try:
        with frozen_buffers(updater.module):
            yield
    finally:
        with torch.no_grad():
            for x, before in zip(live, saved):
                x.copy_(before)
