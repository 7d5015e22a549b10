"""The inventory tasks of HDPO as data: who ships to whom, demand, costs, horizons.

Source: Alvo, Russo, Kanoria and Lee 2023 (arXiv 2306.11246) and the settings of its repository. Parameters that differ
by store come from NumPy's legacy generator with the published seeds, so that they are the published numbers.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ccrl.inventory.functional_env import Network
from ccrl.settings import Count, Nonnegative, Unit, checked
from envs.inventory.demand import Demand, Normal, Poisson, Recorded, load_series, synthetic_series

__all__ = ["TASKS", "Task", "make_task"]

SYNTHETIC_HORIZONS = {"train": (0, 50, 30), "dev": (0, 100, 60), "test": (0, 5000, 3000)}
RECORDED_HORIZONS = {"train": (0, 95, 16), "dev": (88, 37, 16), "test": (118, 37, 16)}
SEEDS = {"mean": 33, "coefficient of variation": 92, "holding": 73, "underage": 28, "lead time": 41}


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
        by_series = {len(self.underage_by_series), len(self.lead_time_by_series)} - {0}
        if by_series and (
            not isinstance(self.demand, Recorded)
            or net.nodes > 1
            or by_series != {len(self.demand.series)}
            or max(self.lead_time_by_series, default=net.slots) > net.slots
        ):
            raise ValueError(
                f"{self.name}: constants by series need one store, recorded demand, one value per series and lead "
                f"times up to {net.slots}; got {sorted(by_series)} values"
            )

    @property
    def split_horizons(self) -> dict[str, tuple[int, int, int]]:
        """Per split: first week, periods, warm-up periods."""
        return self.horizons or (RECORDED_HORIZONS if isinstance(self.demand, Recorded) else SYNTHETIC_HORIZONS)


@checked
def one_store_lost(lead_time: Count = 4, underage: Nonnegative = 9.0, mean: Nonnegative = 5.0) -> Task:
    """One store, Poisson demand, lost sales. Published: lead time 1 to 4, underage 4, 9, 19, 39."""
    return Task(
        "one_store_lost", _store(lead_time), Poisson((mean,)), (1.0,), (underage,), lost=True, random_stock=True
    )


@checked
def one_store_backlogged(
    lead_time: Count = 4,
    underage: Nonnegative = 9.0,
    mean: Nonnegative = 5.0,
    std: Nonnegative = 1.6,
    clip: bool = True,
) -> Task:
    """One store, normal demand (``clip``: cut at zero), backlogged. Published: lead time 1, 4, 7, 10, 15, 20, underage
    4, 9, 19, 39."""
    demand = Normal((mean,), (std,), clip=clip)
    return Task("one_store_backlogged", _store(lead_time), demand, (1.0,), (underage,), lost=False, random_stock=True)


@checked
def serial_system(lead_time: Count = 4, underage: Nonnegative = 9.0) -> Task:
    """Two echelons, a warehouse and a store in a row, backlogged. Published: store lead time 1 to 4, underage 4, 9, 19,
    39."""
    net = Network(2, 1, 1, ((0, 1), (1, 2), (2, 3), (-1, 0)), (4, 3, lead_time, 2))
    demand = Normal((5.0,), (2.0,))
    return Task("serial_system", net, demand, (0.1, 0.2, 0.5, 1.0), (underage,), lost=False, random_stock=True)


@checked
def transshipment_backlogged(
    stores: Count = 3, lead_time: Count = 2, underage: Nonnegative = 4.0, correlation: Unit = 0.5
) -> Task:
    """A warehouse that cannot keep stock allocates what arrives; backlogged. Published: 3, 5, 10 stores, store lead
    time 2 or 6, underage 4 or 9, correlation 0 or 0.5."""
    net = _fan(stores, (lead_time,) * stores, keeps_stock=False)
    demand = _normal(stores, correlation, clip=False)
    costs = (0.5, *(1.0,) * stores)
    return Task("transshipment_backlogged", net, demand, costs, (underage,) * stores, lost=False, random_stock=True)


@checked
def one_warehouse_lost_demand(stores: Count = 5, correlation: Unit = 0.5) -> Task:
    """One warehouse and stores that differ in demand, costs and lead time (2 or 3); lost sales. Published: 3, 5, 10,
    20, 30, 50 stores."""
    leads = np.random.RandomState(SEEDS["lead time"]).randint(2, 4, stores)
    return Task(
        "one_warehouse_lost_demand",
        _fan(stores, leads.tolist()),
        _normal(stores, correlation, clip=True),
        (0.3, *_uniform("holding", 0.7, 1.3, stores)),
        _uniform("underage", 6.3, 11.7, stores),
        lost=True,
        random_stock=True,
    )


def many_warehouses_lost_demand() -> Task:
    """A far warehouse with cheap goods (5 or 6 periods to a store) and a near one with dear goods (1 or 2) for ten
    stores; half of the stores have one supplier only; lost sales."""
    # 0: not connected
    leads = ((0, 0, 6, 6, 6, 0, 6, 5, 6, 0), (2, 1, 2, 2, 1, 2, 0, 2, 2, 2))
    net = _bipartite(leads, (3, 3))
    return Task(
        "many_warehouses_lost_demand",
        net,
        _normal(10, 0.5, clip=True),
        (0.3, 0.4, *_uniform("holding", 0.7, 1.3, 10)),
        _uniform("underage", 6.3, 11.7, 10),
        lost=True,
        edge_cost=(0.0,) * net.internal + (0.5, 1.5),
        random_stock=True,
    )


@checked
def one_store_real_data(
    series: Recorded | str | Path | None = None,
    count: Count = 1024,
    horizons: dict[str, tuple[int, int, int]] | None = None,
    prices: float | Sequence[float] | None = None,
    lead_times: int | Sequence[int] | None = None,
) -> Task:
    """One store per recorded series; price and lead time differ by series; lost sales, profit, holding cost 1.

    Args:
        series: of one store, from :func:`~envs.inventory.demand.load_series` or the path of a file for it; ``None``
            makes ``count`` synthetic ones.
        horizons: see :class:`Task`.
        prices: one, or one per series; ``None`` draws them between 6.3 and 11.7 as published, and says so where the
            series are your own.
        lead_times: in weeks, one or one per series; ``None`` draws them from 4 to 6 in the same way.

    Raises:
        ValueError: another number of prices or lead times than one or that of the series.
    """
    demand = _series(series, count, 1)
    size, name = len(demand.series), f"one_store_real_data [{demand.source}]"
    if series is not None:
        _announce(name, "give them as options", {"prices": prices, "lead_times": lead_times})
    drawn = _uniform("underage", 6.3, 11.7, size)
    price = drawn if prices is None else _by_series("prices", prices, size)
    leads = tuple(np.random.RandomState(SEEDS["lead time"]).randint(4, 7, size).tolist())
    slots = 6
    if lead_times is not None:
        leads = _by_series("lead_times", lead_times, size)
        slots = max(leads)
    return Task(
        name, _store(slots), demand, (1.0,), (float(np.mean(price)),), lost=True, profit=True, horizons=horizons,
        underage_by_series=price, lead_time_by_series=leads,
    )  # fmt: skip


@checked
def many_warehouses_real_data(
    series: Recorded | str | Path | None = None,
    count: Count = 288,
    horizons: dict[str, tuple[int, int, int]] | None = None,
) -> Task:
    """Three warehouses and 21 stores with recorded demand of a product per scenario; lost sales, profit. The network,
    its lead times, costs and prices are the published ones, whatever the series are; where those are your own, it says
    so.

    Args:
        series: of 21 stores, from :func:`~envs.inventory.demand.load_series` or the path of a file for it; ``None``
            makes ``count`` synthetic ones.
        horizons: see :class:`Task`.
    """
    demand = _series(series, count, 21)
    if series is not None:
        made_up = {"network, lead times, costs and prices": None}
        _announce(f"many_warehouses_real_data [{demand.source}]", "build a Task for others", made_up)
    leads = (
        (6, 6, 6, 0, 6, 5, 5, 5, 5, 5, 5, 5, 5, 5, 0, 6, 6, 6, 6, 5, 5),
        (1, 1, 1, 1, 1, 0, 2, 2, 1, 2, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2),
        (5, 5, 5, 5, 4, 6, 5, 5, 5, 5, 5, 0, 5, 6, 5, 5, 5, 5, 5, 4, 5),
    )
    net = _bipartite(leads, (3, 3, 3))
    return Task(
        f"many_warehouses_real_data [{demand.source}]", net, demand,
        (0.3, 0.4, 0.2, *_uniform("holding", 0.7, 1.3, 21)), _uniform("underage", 6.3, 11.7, 21), lost=True,
        profit=True, edge_cost=(0.0,) * net.internal + (0.5, 1.5, 0.7), horizons=horizons,
    )  # fmt: skip


TASKS: dict[str, Callable[..., Task]] = {
    f.__name__: f
    for f in (
        one_store_lost, one_store_backlogged, serial_system, transshipment_backlogged, one_warehouse_lost_demand,
        many_warehouses_lost_demand, one_store_real_data, many_warehouses_real_data,
    )
}  # fmt: skip
"""The tasks by name: functions that return a :class:`Task`."""


def make_task(name: str, **options: Any) -> Task:
    """A task by name, with the options of its function in :data:`TASKS`.

    Raises:
        ValueError: an unknown name, or an option that does not fit.
        TypeError: an option that the task does not have.
    """
    if name not in TASKS:
        raise ValueError(f"there is no inventory task {name!r}; expected one of {', '.join(TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    if not options.keys() <= known.keys():
        raise TypeError(f"{name}: expected options among {', '.join(known) or 'none'}, got {', '.join(options)}")
    return TASKS[name](**options)


def _announce(name: str, fix: str, given: dict[str, Any]) -> None:
    """A number that nobody gave would look like a fact about the user's own sales."""
    made_up = [what for what, value in given.items() if value is None]
    if made_up:
        warnings.warn(
            f"{name}: {' and '.join(made_up)} are not given and those of a published benchmark, nothing that is known "
            f"of these series; {fix}",
            stacklevel=4,
        )


def _by_series(name: str, value: Any, size: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence | np.ndarray) else (value,) * size
    if len(values) != size or isinstance(value, str):
        raise ValueError(f"{name}: expected one, or one for each of the {size} series, got {value!r}")
    whole = name == "lead_times"
    kind: Any = Integral if whole else Real
    if not all(isinstance(each, kind) and 0 < each < math.inf and not isinstance(each, bool) for each in values):
        raise ValueError(f"{name}: expected {'weeks, at least 1' if whole else 'positive numbers'}, got {value!r}")
    return values


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


def _series(series: Recorded | str | Path | None, count: int, stores: int) -> Recorded:
    if series is None:
        return synthetic_series(count, stores)
    return load_series(series) if isinstance(series, (str, Path)) else series


def _store(lead_time: int) -> Network:
    return Network(0, 0, 1, ((-1, 0),), (lead_time,))


def _fan(stores: int, leads: Sequence[int], keeps_stock: bool = True) -> Network:
    return _bipartite((leads,), (3,), keeps_stock)


def _bipartite(leads: Sequence[Sequence[int]], supply_leads: Sequence[int], keeps_stock: bool = True) -> Network:
    """Warehouses with an outside supplier each and stores; ``leads[w][k]`` is 0 where ``w`` does not serve ``k``."""
    count = len(leads)
    links = [(w, count + k, lead) for w, row in enumerate(leads) for k, lead in enumerate(row) if lead]
    links += [(-1, w, lead) for w, lead in enumerate(supply_leads)]
    edges = tuple((source, target) for source, target, _ in links)
    return Network(0, count, len(leads[0]), edges, tuple(lead for _, _, lead in links), keeps_stock)


def _uniform(what: str, low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(np.random.RandomState(SEEDS[what]).uniform(low, high, count).tolist())


def _normal(stores: int, correlation: float, clip: bool) -> Normal:
    mean = np.array(_uniform("mean", 2.5, 7.5, stores)).round(3)
    std = (mean * np.array(_uniform("coefficient of variation", 0.25, 0.5, stores))).round(3)
    return Normal(tuple(mean.tolist()), tuple(std.tolist()), correlation, clip)
