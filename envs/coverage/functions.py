"""Set functions of coverage tasks: batched, on any device, with the value of a whole set computed another way.

Every class has :meth:`value`, ``F`` of given elements ``[B, L]`` by its definition, in which nothing is added up step
by step: marginal gains are checked against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccrl.wrappers.set_reward import SetFunction, SetState

__all__ = ["Coverage", "Facility", "Groups", "LogDet", "curvature", "submodularity_ratio"]


class Coverage:
    """Weighted coverage: every element covers a footprint, ``F`` is the weight of the union of footprints.

    Args:
        footprints: ``[n, K]`` int64, what element ``i`` covers, padded with -1; each row without repetition.
        weights: ``[m]`` of what can be covered, not negative.

    Raises:
        ValueError: shapes or indices that do not fit, or a negative weight.
    """

    capacity: int | None = None

    def __init__(self, footprints: Tensor, weights: Tensor) -> None:
        if footprints.dim() != 2 or weights.dim() != 1 or int(footprints.max()) >= len(weights):
            raise ValueError(
                f"Coverage: expected footprints [n, K] below {len(weights)}, the number of weights [m], got shapes "
                f"{tuple(footprints.shape)} and {tuple(weights.shape)}, largest index {int(footprints.max())}"
            )
        if bool((weights < 0).any()) or not bool(weights.isfinite().all()):
            raise ValueError(f"Coverage: expected finite weights >= 0, got some of {float(weights.min())}")
        self.n, m = len(footprints), len(weights)
        # padding covers one more cell, of weight 0
        self.footprints = torch.where(footprints < 0, m, footprints)
        self.weights = torch.cat([weights.float(), weights.new_zeros(1).float()])

    def initial(self, count: int) -> SetState:
        return {"covered": torch.zeros(count, len(self.weights), dtype=torch.bool, device=self.weights.device)}

    def gain(self, state: SetState, element: Tensor) -> Tensor:
        new = self.footprints[element]
        return (self.weights[new] * ~state["covered"].gather(1, new)).sum(1)

    def insert(self, state: SetState, element: Tensor) -> SetState:
        return {"covered": state["covered"].scatter(1, self.footprints[element], True)}

    def value(self, elements: Tensor) -> Tensor:
        return torch.stack([self.weights[torch.unique(self.footprints[row])].sum() for row in elements])

    def key(self, state: SetState) -> Tensor:
        """``[N, k]``: equal rows have equal futures."""
        return state["covered"]


class Groups:
    """Items in groups with demands: ``F = sum_i min(|A & G_i|, d_i)``, revisits not counted (Steiner covering).

    Args:
        members: ``[n, G]`` bool, which groups an element belongs to.
        demands: ``[G]``.

    Raises:
        ValueError: shapes that do not fit.
    """

    capacity: int | None = None

    def __init__(self, members: Tensor, demands: Tensor) -> None:
        if members.dim() != 2 or demands.shape != members.shape[1:]:
            raise ValueError(
                f"Groups: expected members [n, G] and demands [G], got {tuple(members.shape)}, {tuple(demands.shape)}"
            )
        self.n = len(members)
        self.members, self.demands = members.float(), demands.float()

    def initial(self, count: int) -> SetState:
        device = self.members.device
        return {
            "visited": torch.zeros(count, self.n, dtype=torch.bool, device=device),
            "counts": torch.zeros(count, len(self.demands), device=device),
        }

    def gain(self, state: SetState, element: Tensor) -> Tensor:
        fresh = ~state["visited"].gather(1, element.unsqueeze(1))
        wanted = state["counts"] < self.demands
        return (self.members[element] * wanted * fresh).sum(1)

    def insert(self, state: SetState, element: Tensor) -> SetState:
        place = element.unsqueeze(1)
        fresh = ~state["visited"].gather(1, place)
        counts = state["counts"] + self.members[element] * fresh
        return {"visited": state["visited"].scatter(1, place, True), "counts": counts}

    def value(self, elements: Tensor) -> Tensor:
        found = [torch.minimum(self.members[torch.unique(row)].sum(0), self.demands).sum() for row in elements]
        return torch.stack(found)

    def key(self, state: SetState) -> Tensor:
        # items that no group wants any more make no difference
        wanted = ((state["counts"] < self.demands).float() @ self.members.T) > 0
        return torch.cat([state["visited"] & wanted, torch.minimum(state["counts"], self.demands)], 1)


class Facility:
    """A bipartite graph of elements and customers: each customer is served by its best element of the set,
    ``F = sum_j max_{i in A} w_ij``.

    Args:
        weights: ``[n, J]``, not negative.

    Raises:
        ValueError: another shape, or a negative weight.
    """

    capacity: int | None = None

    def __init__(self, weights: Tensor) -> None:
        if weights.dim() != 2 or bool((weights < 0).any()):
            raise ValueError(f"Facility: expected weights [n, J] >= 0, got shape {tuple(weights.shape)}")
        self.n, self.weights = len(weights), weights.float()

    def initial(self, count: int) -> SetState:
        return {"served": torch.zeros(count, self.weights.shape[1], device=self.weights.device)}

    def gain(self, state: SetState, element: Tensor) -> Tensor:
        return (self.weights[element] - state["served"]).clamp_min(0.0).sum(1)

    def insert(self, state: SetState, element: Tensor) -> SetState:
        return {"served": torch.maximum(state["served"], self.weights[element])}

    def value(self, elements: Tensor) -> Tensor:
        return self.weights[elements].amax(1).sum(-1)

    def key(self, state: SetState) -> Tensor:
        return state["served"]


class LogDet:
    """Bayesian D-optimal design: ``F(A) = 1/2 log det(I + K_A / sigma^2)``, the information in nats that noisy
    observations at the elements of ``A`` give about a Gaussian process. An element may be observed again: the noise is
    new each time, so that ``A`` is a multiset here.

    A set is a Cholesky factor of ``K_A + sigma^2 I`` with room for ``capacity`` observations, to which an insertion
    adds a row: ``gain = 1/2 log(1 + var(s | A) / sigma^2)``.

    Args:
        covariance: ``[n, n]`` of the prior.
        noise: ``sigma^2``, above 0.
        capacity: most observations.

    Raises:
        ValueError: a covariance that is not square or symmetric, or a noise or capacity that is not positive.
    """

    capacity: int | None

    def __init__(self, covariance: Tensor, noise: float, capacity: int) -> None:
        if covariance.dim() != 2 or not torch.allclose(covariance, covariance.T, atol=1e-6):
            raise ValueError(f"LogDet: expected a symmetric covariance [n, n], got shape {tuple(covariance.shape)}")
        if not 0.0 < noise < math.inf or capacity < 1:
            raise ValueError(f"LogDet: expected noise > 0 and capacity >= 1, got {noise} and {capacity}")
        self.n, self.covariance, self.noise, self.capacity = len(covariance), covariance.double(), noise, capacity

    def initial(self, count: int) -> SetState:
        device, size = self.covariance.device, self.capacity
        assert size is not None
        # rows that are not filled yet are those of the identity: they change no solution
        factor = torch.eye(size, dtype=torch.float64, device=device).expand(count, size, size).clone()
        return {
            "factor": factor,
            "elements": torch.zeros(count, size, dtype=torch.int64, device=device),
            "count": torch.zeros(count, dtype=torch.int64, device=device),
        }

    def gain(self, state: SetState, element: Tensor) -> Tensor:
        _, variance = self._row(state, element)
        return (0.5 * torch.log1p(variance / self.noise)).float()

    def insert(self, state: SetState, element: Tensor) -> SetState:
        row, variance = self._row(state, element)
        places = torch.arange(row.shape[1], device=row.device)
        here = places == state["count"].unsqueeze(1)
        new = torch.where(here, (variance + self.noise).sqrt().unsqueeze(1), row)
        return {
            "factor": torch.where(here.unsqueeze(2), new.unsqueeze(1), state["factor"]),
            "elements": torch.where(here, element.unsqueeze(1), state["elements"]),
            "count": state["count"] + 1,
        }

    def _row(self, state: SetState, element: Tensor) -> tuple[Tensor, Tensor]:
        """The next row of the factor (without its diagonal) and ``var(s | A)``."""
        places = torch.arange(state["elements"].shape[1], device=element.device)
        filled = places < state["count"].unsqueeze(1)
        cross = torch.where(filled, self.covariance[element.unsqueeze(1), state["elements"]], 0.0)
        row = torch.linalg.solve_triangular(state["factor"], cross.unsqueeze(2), upper=False).squeeze(2)
        variance = self.covariance[element, element] - row.square().sum(1)
        return row, variance.clamp_min(0.0)

    def value(self, elements: Tensor) -> Tensor:
        block = self.covariance[elements.unsqueeze(2), elements.unsqueeze(1)] / self.noise
        eye = torch.eye(elements.shape[1], dtype=block.dtype, device=block.device)
        found: Tensor = torch.linalg.slogdet(block + eye).logabsdet
        return (0.5 * found).float()

    def key(self, state: SetState) -> Tensor:
        filled = torch.arange(state["elements"].shape[1], device=state["count"].device) < state["count"].unsqueeze(1)
        return torch.where(filled, state["elements"], self.n).sort(1).values


def curvature(function: SetFunction) -> float:
    """``c = 1 - min_s F(s | V - s) / F({s})`` over elements with ``F({s}) > 0``: 0 for additive functions, 1 where some
    element can become worthless. A guarantee of SubPO is ``(1 - c)`` of the optimum (Prajapat et al. 2024). It visits
    the ground set ``n`` times: for small instances.

    Raises:
        ValueError: the ground set does not fit into the function's capacity, or no element has a value.
    """
    n = function.n
    if function.capacity is not None and n > function.capacity:
        raise ValueError(f"curvature: expected capacity >= {n}, the ground set, got {function.capacity}")
    every = torch.arange(n)
    state = function.initial(n)
    every = every.to(next(iter(state.values())).device)
    alone = function.gain(state, every)
    for shift in range(1, n):  # copy i gets everything but i
        state = function.insert(state, (every + shift) % n)
    last, counts = function.gain(state, every), alone > 0
    if not bool(counts.any()):
        raise ValueError("curvature: expected an element of positive value, got none")
    return float(1.0 - (last[counts] / alone[counts]).min())


def submodularity_ratio(function: SetFunction) -> float:
    """``min F(s | A) / F(s | B)`` over ``A`` inside ``B`` and ``s`` outside ``B`` with ``F(s | B) > 0``, by enumeration
    of all subsets (ground sets of at most 10 elements): at least 1 exactly for submodular monotone functions. General
    rewards, for which SubPO still has marginal gains, have less.

    Raises:
        ValueError: more than 10 elements.
    """
    n = function.n
    if n > 10:
        raise ValueError(f"submodularity_ratio: expected at most 10 elements, got {n}")
    gains = torch.full((2**n, n), torch.nan)
    for bits in range(2**n):
        state = function.initial(1)
        device = next(iter(state.values())).device
        for i in range(n):
            if bits >> i & 1:
                state = function.insert(state, torch.tensor([i], device=device))
        for s in range(n):
            if not bits >> s & 1:
                gains[bits, s] = function.gain(state, torch.tensor([s], device=device))[0]
    smallest = math.inf
    for large in range(2**n):
        small = large
        while True:  # every subset of large
            for s in range(n):
                if not large >> s & 1 and gains[large, s] > 1e-9:
                    smallest = min(smallest, float(gains[small, s] / gains[large, s]))
            if small == 0:
                break
            small = (small - 1) & large
    return smallest
