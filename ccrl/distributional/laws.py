"""Laws of returns as weighted atoms ``[..., K]``: merging, projection onto quantiles, distances, risk measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Law", "compress", "cvar", "quantile", "wasserstein"]


class Law(NamedTuple):
    """Batched laws: ``atoms`` ``[..., K]`` (``[..., K, m]`` of vectors) with ``weights`` ``[..., K]`` that sum to 1.
    Unused atoms have weight 0."""

    atoms: Tensor
    weights: Tensor

    def mean(self) -> Tensor:
        """``[...]`` of laws of numbers."""
        return (self.atoms * self.weights).sum(-1)


def compress(law: Law, size: int, tolerance: float = 1e-9) -> Law:
    """The laws of numbers with at most ``size`` atoms: equal atoms (within ``tolerance``) are merged, and where more
    than ``size`` are left, a law becomes its quantiles at levels ``(2 i + 1) / (2 size)`` with equal weights."""
    atoms, order = law.atoms.sort(-1)
    weights = law.weights.gather(-1, order)
    # atoms of weight 0 would count as distinct
    used = weights > 0
    step = torch.cat([torch.zeros_like(atoms[..., :1]), atoms.diff(dim=-1)], -1)
    place = _distinct(step, used, tolerance)
    count = int(place.max()) + 1
    merged_weights = torch.zeros_like(weights).scatter_add(-1, place, weights)
    # one of the equal atoms stands for all: a weighted mean of them would round
    largest = torch.full_like(atoms, -torch.inf).scatter_reduce(-1, place, atoms.masked_fill(~used, -torch.inf), "amax")
    merged_atoms = torch.where(merged_weights > 0, largest, 0.0)
    if count <= size:
        return Law(merged_atoms[..., :count], merged_weights[..., :count])
    levels = (2.0 * torch.arange(size, device=atoms.device, dtype=atoms.dtype) + 1.0) / (2.0 * size)
    quantiles = quantile(Law(merged_atoms, merged_weights), levels)
    few = place.amax(-1, keepdim=True) < size
    equal = torch.full_like(quantiles, 1.0 / size)
    return Law(
        torch.where(few, merged_atoms[..., :size], quantiles), torch.where(few, merged_weights[..., :size], equal)
    )


def _distinct(step: Tensor, used: Tensor, tolerance: float) -> Tensor:
    """The number of each sorted atom among the distinct used ones, ``[..., K]`` int64; unused atoms take that of the
    used one before them."""
    # a distance of unused atoms in between belongs to the next used one
    value = step.cumsum(-1)
    last = torch.where(used, value, torch.full_like(value, -torch.inf)).cummax(-1).values
    before = torch.cat([torch.full_like(last[..., :1], -torch.inf), last[..., :-1]], -1)
    new = used & ((value - before) > tolerance)
    return (new.long().cumsum(-1) - 1).clamp_min(0)


def quantile(law: Law, levels: Tensor) -> Tensor:
    """Lower quantiles ``[..., L]`` at ``levels`` ``[L]`` of laws of numbers."""
    atoms, order = law.atoms.sort(-1)
    # rounding must not push a level that a whole group of atoms reaches to the next atom
    total = law.weights.gather(-1, order).cumsum(-1) + 1e-12
    at = torch.searchsorted(total.contiguous(), levels.expand(*total.shape[:-1], -1).contiguous())
    return atoms.gather(-1, at.clamp_max(atoms.shape[-1] - 1))


def cvar(law: Law, tau: float) -> Tensor:
    """Mean of the worst ``tau`` of the law, ``[...]``; an atom at the border counts in part."""
    atoms, order = law.atoms.sort(-1)
    total = law.weights.gather(-1, order).cumsum(-1)
    before = torch.cat([torch.zeros_like(total[..., :1]), total[..., :-1]], -1)
    share = total.clamp_max(tau) - before.clamp_max(tau)
    return (share * atoms).sum(-1) / tau


def wasserstein(first: Law, second: Law) -> Tensor:
    """1-Wasserstein distances ``[...]`` between laws of numbers: the area between their distribution functions."""
    atoms, order = torch.cat([first.atoms, second.atoms], -1).sort(-1)
    signed = torch.cat([first.weights, -second.weights], -1).gather(-1, order).cumsum(-1)
    return (signed[..., :-1].abs() * atoms.diff(dim=-1)).sum(-1)
