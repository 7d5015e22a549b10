"""Terms of ordering: whole units, lot sizes, a minimum, a capacity, a fixed cost, a shelf life.

The forward pass is exact, in training as in evaluation: what is simulated is what would be delivered and paid. What is
not differentiable has a stated derivative:

* rounding to lots and to the minimum: 1 (straight through; Bengio, Leonard, Courville 2013, arXiv 1308.3432);
* capacity: that of ``min``, 0 above it;
* fixed cost ``F`` of an order ``q > 0``: that of ``F (1 - exp(-q / w))``, with ``w`` one lot or half a period's mean
  demand, whichever is more;
* shelf life: stock is sold oldest first and expires by ``min``, whose subgradients are autograd's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.inventory.functional_env import State

__all__ = ["EDGE_TERMS", "Terms", "expire", "fixed_charge", "place", "smallest_order"]

EDGE_TERMS = ("fixed_cost", "minimum", "lot", "capacity")
"""Constants per edge, under these names in scenarios and observations."""

_SLACK = 1e-3
"""A wish of 4.9999 units is one of 5: float32 shares of a stock rarely are whole."""


@dataclass(frozen=True)
class Terms:
    """Terms of a task; arrays by product are in ``Task.by_series`` under the names of :data:`EDGE_TERMS`.

    Raises:
        ValueError: a shelf life below one period, a negative waste cost.
    """

    whole_units: bool = True
    """Orders are whole units (or whole lots)."""
    shelf_life: int = 0
    """Periods from arrival at a store to waste; 0: goods keep."""
    waste_cost: float = 0.0
    """Per unit that expires."""

    def __post_init__(self) -> None:
        if self.shelf_life < 0 or not 0.0 <= self.waste_cost < math.inf:
            raise ValueError(
                f"shelf_life, waste_cost: expected whole periods and a finite cost, none negative, got "
                f"{self.shelf_life} and {self.waste_cost}"
            )
        if self.waste_cost and not self.shelf_life:
            raise ValueError(f"waste_cost: expected 0 without a shelf life, got {self.waste_cost}")


def smallest_order(lot: Tensor, minimum: Tensor) -> Tensor:
    """The fewest units that an order can have: whole lots, at least one, of at least the minimum."""
    return torch.maximum(lot, torch.ceil(minimum / lot - _SLACK) * lot)


def place(action: Tensor, terms: State, internal: int) -> Tensor:
    """What is ordered ``[B, E]`` where ``action`` was wanted: whole lots of at least the minimum, up to the capacity.

    From the outside supplier a wish is rounded to the nearest lot, and to nothing or the minimum, whichever is nearer;
    inside the network it is rounded down, since a node cannot ship what it does not have (below the minimum: nothing).

    Args:
        terms: ``lot``, ``minimum`` and ``capacity`` ``[B, E]`` (``inf``: none).
        internal: how many edges are internal; they come first.
    """
    capped = torch.minimum(action, terms["capacity"])
    with torch.no_grad():
        lot, minimum = terms["lot"], terms["minimum"]
        lots = capped / lot
        down = torch.floor(lots + _SLACK) * lot
        whole = torch.where(lots - torch.floor(lots) >= 0.5 - _SLACK, torch.ceil(lots - _SLACK) * lot, down)
        least = torch.ceil(minimum / lot - _SLACK) * lot
        small = torch.where(2.0 * capped >= least, least, 0.0)
        outside = torch.where(whole < least, small, whole)
        outside = torch.where(outside > terms["capacity"], torch.floor(terms["capacity"] / lot + _SLACK) * lot, outside)
        inside = torch.where(down < minimum, 0.0, down)
        exact = torch.cat((inside[:, :internal], outside[:, internal:]), 1)
    return exact + (capped - capped.detach())


def fixed_charge(ordered: Tensor, terms: State, width: Tensor) -> Tensor:
    """``[B]``: the fixed cost of every edge that carries an order; its derivative is in the head of this file.

    Args:
        ordered: ``[B, E]``.
        width: ``[B, E]`` or ``[1, E]``, ``w``.
    """
    exact = terms["fixed_cost"] * (ordered.detach() > 0)
    smooth = terms["fixed_cost"] * (1.0 - torch.exp(-ordered / width))
    return (exact + (smooth - smooth.detach())).sum(1)


def expire(ages: Tensor, demand: Tensor) -> tuple[Tensor, Tensor]:
    """Sell the oldest first, then let the oldest bucket expire.

    Args:
        ages: ``[B, K, A]`` units on hand by the periods they still keep, those of the last period first.
        demand: ``[B, K]``.

    Returns:
        What is left one period later ``[B, K, A]`` (nothing in the freshest bucket yet), and the waste ``[B, K]``.
    """
    through = ages.cumsum(-1)
    sold = torch.minimum(through, demand.unsqueeze(-1))
    sold = torch.cat((sold[..., :1], sold[..., 1:] - sold[..., :-1]), -1)
    left = ages - sold
    return torch.cat((left[..., 1:], torch.zeros_like(left[..., :1])), -1), left[..., 0]
