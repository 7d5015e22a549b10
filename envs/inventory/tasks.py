"""The inventory tasks of HDPO as data: who ships to whom, demand, costs, horizons.

Source: Alvo, Russo, Kanoria and Lee 2023 (arXiv 2306.11246) and the settings of its repository. Parameters that differ
by store come from NumPy's legacy generator with the published seeds, so that they are the published numbers.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ccrl.inventory.functional_env import Network
from ccrl.settings import Count, Nonnegative, Unit, checked
from envs.inventory.demand import Normal, Poisson, Recorded, load_series, synthetic_series
from envs.inventory.own import own_demand
from envs.inventory.task import Task

__all__ = ["TASKS", "Task", "make_task"]

SEEDS = {"mean": 33, "coefficient of variation": 92, "holding": 73, "underage": 28, "lead time": 41}


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
    count: Count | None = None,
    horizons: dict[str, tuple[int, int, int]] | None = None,
    prices: float | Sequence[float] | None = None,
    lead_times: int | Sequence[int] | None = None,
) -> Task:
    """One store per recorded series; price and lead time differ by series; lost sales, profit, holding cost 1.

    Args:
        series: of one store, from :func:`~envs.inventory.demand.load_series` or the path of a file for it; ``None``
            makes synthetic ones.
        count: how many; ``None``: 1,024.
        horizons: see :class:`Task`.
        prices: one, or one per series; ``None`` draws them between 6.3 and 11.7 as published, and says so where the
            series are your own.
        lead_times: in weeks, one or one per series; ``None`` draws them from 4 to 6 in the same way.

    Raises:
        ValueError: another number of prices or lead times than one or that of the series; a count of one's own series.
    """
    demand = _series(series, count, 1024, 1)
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
    count: Count | None = None,
    horizons: dict[str, tuple[int, int, int]] | None = None,
) -> Task:
    """Three warehouses and 21 stores with recorded demand of a product per scenario; lost sales, profit. The network,
    its lead times, costs and prices are the published ones, whatever the series are; where those are your own, it says
    so.

    Args:
        series: of 21 stores, from :func:`~envs.inventory.demand.load_series` or the path of a file for it; ``None``
            makes synthetic ones.
        count: how many; ``None``: 288.
        horizons: see :class:`Task`.
    """
    demand = _series(series, count, 288, 21)
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
        many_warehouses_lost_demand, one_store_real_data, many_warehouses_real_data, own_demand,
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


def _series(series: Recorded | str | Path | None, count: int | None, usual: int, stores: int) -> Recorded:
    if series is None:
        return synthetic_series(usual if count is None else count, stores)
    if count is not None:
        raise ValueError(f"count: expected none with series of your own, all of which are taken, got {count}")
    if isinstance(series, Recorded):
        return series
    if not isinstance(series, str | Path):
        raise TypeError(f"series: expected the path of a file or Recorded demand, got {series!r}")
    return load_series(series)


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
