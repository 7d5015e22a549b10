"""One inventory task as data: who ships to whom, demand, costs, terms, horizons."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccrl.inventory.functional_env import Network
from envs.inventory.demand import Demand, Recorded
from envs.inventory.terms import EDGE_TERMS, Terms, smallest_order

__all__ = ["Task", "horizons_of"]

SYNTHETIC_HORIZONS = {"train": (0, 50, 30), "dev": (0, 100, 60), "test": (0, 5000, 3000)}
RECORDED_HORIZONS = {"train": (0, 95, 16), "dev": (88, 37, 16), "test": (118, 37, 16)}


@dataclass(frozen=True, eq=False)
class Task:
    """One inventory task.

    Raises:
        ValueError: costs or demand that do not fit the network, costs that are negative or not finite, horizons that
            are no such triples, recorded series that are too short.
    """

    name: str
    network: Network
    demand: Demand
    holding: tuple[float, ...]
    """Per node and period, of each unit on hand after demand or shipment. Nothing in transit costs anything."""
    underage: tuple[float, ...]
    """Per store, of each unit of demand not served; with ``profit`` the price of each unit sold."""
    lost: bool
    """Demand that is not served is lost; else it waits (inventory goes below zero)."""
    profit: bool = False
    """Cost is holding minus sales."""
    edge_cost: tuple[float, ...] = ()
    """Per unit ordered, per edge; () is free."""
    random_stock: bool = False
    """Stores start with U[0, 1] times mean demand in each of their slots; else everything starts empty."""
    horizons: dict[str, tuple[int, int, int]] | None = None
    """Per split ``"train"``, ``"dev"``, ``"test"``: first week, periods, warm-up periods (of these), as in ``{"train":
    (0, 95, 16), "dev": (88, 37, 16), "test": (118, 37, 16)}``. Of recorded demand the ``history`` weeks from the first
    one on are only seen, and the periods come after them. ``None``: these for recorded demand, else 0-50 (30), 0-100
    (60), 0-5000 (3000)."""
    underage_by_series: tuple[float, ...] = ()
    """One store, recorded demand: per series instead of ``underage``."""
    lead_time_by_series: tuple[int, ...] = ()
    """One store, recorded demand: per series instead of the network's."""
    by_series: dict[str, Tensor] = field(default_factory=dict)
    """Recorded demand: constants that differ by series, ``holding`` ``[S, N]``, ``underage`` ``[S, K]``, ``edge_cost``,
    ``lead_time`` and the terms ``fixed_cost``, ``minimum``, ``lot``, ``capacity`` (all four with ``terms``), each
    ``[S, E]``; ``scale`` ``[S, K]``, the usual demand; ``stock`` ``[S, N, L]``, what the first period begins with."""
    earliest: Tensor | None = None
    """``[S, E]``: lead times are random, each order's uniform from this to ``by_series["lead_time"]``."""
    vary_lead_time: int = 0
    """Training and development have every series with lead times up to this many periods shorter and longer, for
    policies that are asked what-if. The network's lead times are then the longest of these."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes, for pictures and tables; ``()``: kinds and numbers."""
    terms: Terms | None = None
    """Terms of ordering; ``None``: any quantity, nothing expires."""

    def __post_init__(self) -> None:
        net, stores = self.network, len(self.demand.mean)
        lengths = (stores, len(self.holding), len(self.underage), len(self.edge_cost) or len(net.edges))
        if lengths != (net.stores, net.nodes, net.stores, len(net.edges)):
            raise ValueError(
                f"{self.name}: expected demand of {net.stores} stores, {net.nodes} holding costs, {net.stores} "
                f"underage costs and {len(net.edges)} (or no) edge costs, got {lengths}"
            )
        costs = (*self.holding, *self.underage, *self.edge_cost, *self.underage_by_series)
        if not all(0.0 <= cost < math.inf for cost in costs):
            raise ValueError(f"{self.name}: costs must be finite and not negative; got holding {self.holding}, "
                             f"underage {self.underage}, edge cost {self.edge_cost}")  # fmt: skip
        if not isinstance(self.split_horizons, dict) or {*self.split_horizons} != {"train", "dev", "test"}:
            raise ValueError(
                f"{self.name}: horizons: expected {{'train': (first week, periods, warm-up), 'dev': ..., 'test': "
                f"...}}, got {self.horizons!r}"
            )
        for split, window in self.split_horizons.items():
            whole = isinstance(window, (tuple, list)) and all(type(number) is int for number in window)
            if not whole or len(window) != 3 or window[0] < 0 or not 0 <= window[2] < window[1]:
                raise ValueError(
                    f"{self.name}: horizons: expected first week, periods and a shorter warm-up of {split!r}, whole "
                    f"numbers, none negative, got {window!r}"
                )
        if isinstance(self.demand, Recorded):
            weeks = self.demand.series.shape[1]
            needed = max(start + self.demand.history + periods for start, periods, _ in self.split_horizons.values())
            if weeks < needed:
                raise ValueError(
                    f"{self.name}: the splits need {needed} weeks, the series have {weeks}; give shorter horizons"
                    f"{_shorter(weeks, self.demand.history)}"
                )
        if self.nodes and len(set(self.nodes)) != net.nodes:
            raise ValueError(f"{self.name}: nodes: expected {net.nodes} different names (or none), got {self.nodes}")
        self._check_series()
        by_series = {len(self.underage_by_series), len(self.lead_time_by_series)} - {0}
        if by_series and (
            not isinstance(self.demand, Recorded)
            or net.nodes > 1
            or by_series != {len(self.demand.series)}
            or not all(1 <= lead <= net.slots and lead == int(lead) for lead in self.lead_time_by_series)
        ):
            raise ValueError(
                f"{self.name}: constants by series need one store, recorded demand, one value per series and whole "
                f"lead times from 1 to {net.slots}; got {sorted(by_series)} values"
            )

    def _check_series(self) -> None:
        net = self.network
        if not self.by_series:
            if self.terms or self.earliest is not None or self.vary_lead_time:
                raise ValueError(f"{self.name}: terms and lead times that vary need constants by_series, got none")
            return
        if not isinstance(self.demand, Recorded) or self.underage_by_series or self.lead_time_by_series:
            raise ValueError(f"{self.name}: by_series: expected recorded demand and all such constants in by_series")
        edges, count = len(net.edges), len(self.demand.series)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("lead_time", "edge_cost", *EDGE_TERMS), (edges,))
        shapes |= {"holding": (net.nodes,), "underage": (net.stores,), "scale": (net.stores,)}
        shapes |= {"stock": (net.nodes, net.slots)}
        for name, value in self.by_series.items():
            if tuple(value.shape) != (count, *shapes.get(name, (-1,))) or value.isnan().any() or (value < 0).any():
                raise ValueError(
                    f"{self.name}: by_series: expected {count} rows and then {shapes}, none negative, got {name} "
                    f"{tuple(value.shape)}"
                )
        needed = {"lead_time"} | ({*EDGE_TERMS, "scale"} if self.terms else set())
        if not needed <= self.by_series.keys():
            raise ValueError(f"{self.name}: by_series: expected also {sorted(needed - self.by_series.keys())}")
        leads, longest = self.by_series["lead_time"], torch.tensor(net.lead_times)
        if (leads < 1).any() or (leads + self.vary_lead_time > longest).any() or (leads != leads.round()).any():
            raise ValueError(
                f"{self.name}: lead_time: expected whole periods from 1 to the network's less vary_lead_time, got "
                f"{leads.min():g} to {leads.max():g} with {net.lead_times} and {self.vary_lead_time}"
            )
        if self.earliest is not None and (
            self.earliest.shape != leads.shape
            or (self.earliest < 1).any()
            or (self.earliest > leads).any()
            or (self.earliest != self.earliest.round()).any()
        ):
            raise ValueError(
                f"{self.name}: earliest: expected whole periods from 1 to the lead time for every series and edge"
            )
        if self.terms and self.terms.whole_units:
            lot, minimum, capacity = (self.by_series[name] for name in ("lot", "minimum", "capacity"))
            if not (lot > 0).all():
                raise ValueError(f"{self.name}: lot: expected positive numbers of units, got {lot.min():g}")
            small = torch.nonzero(capacity < smallest_order(lot, minimum))
            if len(small):
                s, edge = small[0].tolist()
                node = net.edges[edge][1]
                raise ValueError(
                    f"{self.name}: capacity: expected at least the minimum in whole lots, got {capacity[s, edge]:g} "
                    f"for {self.demand.product(s)} at {self.nodes[node] if self.nodes else f'node {node}'} with a "
                    f"minimum of {minimum[s, edge]:g} and lots of {lot[s, edge]:g}; nothing could ever be ordered"
                )
        if self.terms and self.terms.shelf_life and not self.lost:
            raise ValueError(f"{self.name}: shelf_life: expected lost sales, got demand that waits")

    @property
    def split_horizons(self) -> dict[str, tuple[int, int, int]]:
        """Per split: first week, periods, warm-up periods."""
        if self.horizons is not None:
            return self.horizons
        return RECORDED_HORIZONS if isinstance(self.demand, Recorded) else SYNTHETIC_HORIZONS


def _shorter(weeks: int, history: int) -> str:
    """Horizons that these weeks allow, as an example: the last fifths for development and test."""
    fifth = weeks // 5
    first = weeks - 2 * fifth - history
    if fifth < 2 or first < 1:
        return f"; they begin with {history} weeks of history"
    periods = weeks - 2 * fifth - history
    windows = {"train": (0, periods), "dev": (first, fifth), "test": (first + fifth, fifth)}
    example = {split: (start, length, min(16, length // 2)) for split, (start, length) in windows.items()}
    return f", for example horizons={example}: first week, periods, warm-up"


def horizons_of(periods: int, history: int, warm_up: int) -> dict[str, tuple[int, int, int]]:
    """Horizons of a task for recorded series of this length: the last fifth is held out, the fifth before it for
    development, everything between the history and these for training. Before development and held-out periods
    ``warm_up`` periods (fewer where there are no more) are simulated that do not count, so that all of them do.

    Raises:
        ValueError: series that are too short: a fifth of fewer than four periods, or training of fewer than those of
            the warm-up.
    """
    fifth = periods // 5
    training = periods - 2 * fifth - history
    if fifth < 4 or training < max(warm_up, 8):
        needed = next(n for n in range(1, 10**6) if n // 5 >= 4 and n - 2 * (n // 5) - history >= max(warm_up, 8))
        raise ValueError(
            f"sales: expected at least {needed} periods (a history of {history}, a warm-up of {warm_up}, and a fifth "
            f"each for development and as held-out periods), got {periods}; give a shorter history, or longer series"
        )
    found = {"train": (0, training, min(warm_up, training // 2))}
    for split, first in (("dev", history + training), ("test", history + training + fifth)):
        found[split] = (first - history - warm_up, fifth + warm_up, warm_up)
    return found
