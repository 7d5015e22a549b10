"""Any module, any torch optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Term
from ccrl.estimators.updates import GradientEstimate, Stats, owned_parameters
from ccrl.updaters.check import check_loss
from ccrl.updaters.common import Surrogates, accumulate, surrogate_loss
from ccrl.waiting import waiting

__all__ = ["ModuleUpdater"]


class ModuleUpdater(Surrogates):
    """Any module with any torch optimiser: ordinary autograd, micro-batches, frozen or shared parameters.

    Gradients live in ``p.grad``, so large models pay for no second copy; a flat vector is built only by ``gradient``.

    :param optimiser: builds it from the owned parameters, learning rate included, e.g.
        ``lambda params: torch.optim.AdamW(params, lr=1e-5)``. One learning rate for all parameter groups.
    :param prefixes: names (or name prefixes) of the parameters owned, of those that require gradients; None: all.
    :param skip_norm: a gradient of a larger norm (before clipping) changes nothing, moments included; None: never.
    :param compile: compile the loss of a (micro-)batch; backward and optimiser stay ordinary.
    :raises ValueError: if no parameter matches, or parameter groups have different learning rates.
    """

    def __init__(
        self,
        module: nn.Module,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        prefixes: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        skip_norm: float | None = None,
        compile: bool = False,
    ) -> None:
        self.module, self.max_grad_norm, self.skip_norm = module, max_grad_norm, skip_norm
        self.skipped = 0
        """Updates that ``skip_norm`` has left out so far."""
        named = {k: p for k, p in owned_parameters(module, prefixes).items() if p.requires_grad}
        self.names, self.params = tuple(named), list(named.values())
        if not self.params:
            raise ValueError("ModuleUpdater: every owned parameter is frozen; set requires_grad or other prefixes")
        self.optimiser = optimiser(self.params)
        rates = {float(group["lr"]) for group in self.optimiser.param_groups}
        if len(rates) > 1:
            raise ValueError(f"ModuleUpdater: expected one learning rate, got {sorted(rates)}; use an updater for each")
        device = self.params[0].device
        self.lr = torch.tensor(rates.pop(), dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self._lr_version = self.lr._version
        self.compile = compile
        self._losses: dict[int, tuple[tuple[Term, ...], Callable[[Data], tuple[Tensor, Stats]]]] = {}

    @property
    def flat(self) -> None:
        """Parameters stay apart, in their module: directions need a ``FlatUpdater``."""

    def gradient(self, terms: tuple[Term, ...], batch: Data) -> GradientEstimate:
        """Gradient of the surrogate at the current parameters (a copy); micro-batches add up exactly."""
        stats = self._backward(terms, batch)
        grads = [p.grad for p in self.params if p.grad is not None]
        return GradientEstimate(torch.cat([g.reshape(-1) for g in grads]), stats)

    @torch.no_grad()
    def apply(self, estimate: GradientEstimate) -> Stats:
        """Clip and one optimiser step along ``-estimate.mean``. A non-finite gradient changes nothing and clears
        ``self.finite``."""
        pieces = torch.split(estimate.mean, [p.numel() for p in self.params])
        for p, piece in zip(self.params, pieces):
            p.grad = piece.view_as(p).clone()
        return estimate.stats | {"grad_norm": self._optimise()}

    def step(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        """One update on one batch: ``gradient`` and ``apply`` without the flat copy."""
        stats = self._backward(terms, batch)
        return stats | {"grad_norm": self._optimise()}

    def run(self, terms: tuple[Term, ...], batches: Sequence[Data]) -> Stats:
        """One update per batch, in order; statistics are means over the batches, of which a last one with fewer
        columns or groups counts less."""
        rows = [self.step(terms, batch) for batch in batches]
        found = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        unit = next((name for name in ("n_groups", "n_sequences") if name in batches[0].scalars), None)
        if unit is not None:
            size = torch.stack([batch[unit] for batch in batches])
            found = {k: x * (size / size.mean()) for k, x in found.items()}  # by exactly 1 where they are equal
        return {k: x.mean() for k, x in found.items()}

    def _backward(self, terms: tuple[Term, ...], batch: Data) -> Stats:
        for p in self.params:
            # zeros, not None: optimisers skip None, and a parameter would miss the moments' decay of that step
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        loss = self._compiled_loss if self.compile else partial(surrogate_loss, self.module)
        return accumulate(terms, batch, self.params, loss)

    @torch.no_grad()
    def _optimise(self) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if not bool(norm.isfinite()):
            self.finite.fill_(False)
            return norm
        if self.skip_norm is not None and bool(norm > self.skip_norm):
            self.skipped += 1
            return norm
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.params, self.max_grad_norm, norm)
        if self._lr_version != self.lr._version:
            # optimisers want a number; reading the tensor only after it was written keeps the device unsynchronised
            self._lr_version = self.lr._version
            for group in self.optimiser.param_groups:
                group["lr"] = float(self.lr)
        self.optimiser.step()
        return norm

    def _compiled_loss(self, terms: tuple[Term, ...], batch: Data) -> tuple[Tensor, Stats]:
        if id(terms) not in self._losses:
            compiled = self.build(terms, batch)
            with waiting("compilation"):
                check_loss(self, terms, batch, compiled)
            self._losses[id(terms)] = (terms, compiled)
        return self._losses[id(terms)][1](batch)

    def build(self, terms: tuple[Term, ...], like: Data) -> Callable[[Data], tuple[Tensor, Stats]]:
        """The compiled surrogate on batches shaped like ``like``; it compiles at its first call."""
        sequence, scalars = like.sequence, like.scalars
        columns = self.columns(terms, like)

        def loss(values: tuple[Any, ...]) -> tuple[Tensor, Stats]:
            return surrogate_loss(
                self.module, terms, Data(dict(zip(columns, values)), sequence=sequence, scalars=scalars)
            )

        # Graphs are kept per terms: only shapes and types are checked at a call, as FlatUpdater has it. Compiled code
        # is cached by code object: without one of its own, another updater's graph could run.
        loss.__code__ = loss.__code__.replace()
        compiled = torch.compile(loss, options={"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe})
        return lambda batch: compiled(tuple(batch[c] for c in columns))

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimiser state, learning rate and count of skipped updates; the parameters are saved with their module."""
        return {"optimiser": self.optimiser.state_dict(), "lr": self.lr.clone(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        self.lr.copy_(state["lr"])
        self.skipped = state.get("skipped", 0)  # checkpoints of before the count
        self.finite.fill_(True)
