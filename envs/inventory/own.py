"""A planner's own task: sales, costs, lead times, terms, network and stock from files or options. Nothing is made up:
what is missing is refused, what is assumed is announced."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccrl.inventory.functional_env import Network
from ccrl.settings import Count, Natural, Nonnegative, checked
from envs.inventory.demand import Recorded
from envs.inventory.sales import Period, read_sales
from envs.inventory.tables import Table, as_number, read_table, refuse
from envs.inventory.task import Task, horizons_of
from envs.inventory.terms import Terms

__all__ = ["own_demand", "read_stock"]

SUPPLIER = "supplier"
"""The name of the outside supplier in a network file."""

_DEFAULTS = {"unit_cost": 0.0, "fixed_cost": 0.0, "minimum": 0.0, "lot": 1.0, "capacity": math.inf}
_NODE = ("holding", "underage")
_EDGE = ("lead_time", "lead_time_min", *_DEFAULTS)
_WHOLE = ("lead_time", "lead_time_min", "lot")


@dataclass(frozen=True)
class _Links:
    network: Network
    nodes: tuple[str, ...]
    given: dict[str, np.ndarray]
    """Columns of the network file: name -> ``[E]``, NaN where blank."""


@checked
def own_demand(
    sales: str | Path | Recorded,
    *,
    holding: Nonnegative | None = None,
    underage: Nonnegative | None = None,
    lead_time: Count | None = None,
    lead_time_min: Count | None = None,
    unit_cost: Nonnegative | None = None,
    fixed_cost: Nonnegative | None = None,
    minimum: Nonnegative | None = None,
    lot: Count | None = None,
    capacity: Nonnegative | None = None,
    shelf_life: Natural = 0,
    waste_cost: Nonnegative | None = None,
    costs: str | Path | None = None,
    network: str | Path | None = None,
    stock: str | Path | None = None,
    stock_periods: Nonnegative | None = None,
    lost: bool = True,
    vary_lead_time: Natural = 0,
    horizons: dict[str, tuple[int, int, int]] | None = None,
    product: str = "sku",
    date: str = "date",
    units: str = "units",
    location: str | None = None,
    promotion: Sequence[str] = (),
    price: str | None = None,
    period: Period = "auto",
    history: Count | None = None,
) -> Task:
    """Your products in your stores. Costs are per unit and period; orders are whole units.

    Args:
        sales: a file for :func:`~envs.inventory.sales.read_sales`, which takes ``product`` ... ``history``, or what it
            returns (``product`` and ``location`` then name columns of the other tables alone).
        holding: of a unit on stock at the end of a period. underage: of a unit of demand that is not served.
        lead_time: periods from an order to the period in which it can be sold, at least 1. With ``lead_time_min`` each
            order's is random, uniform between the two.
        unit_cost: of each unit ordered; fixed_cost: of each order; minimum, lot, capacity: units of an order.
        shelf_life: periods until goods in a store are waste; 0: they keep. waste_cost: of each, needed with it.
        costs: a table of the columns ``holding ... capacity`` (any of them), for products and locations (columns named
            as in the sales; blank or absent: all). It wins over the options.
        network: a table ``source, target, lead_time`` and optionally ``lead_time_min`` ... ``capacity``, a row per
            link. Targets are locations of the sales or warehouses, sources warehouses or ``supplier``. ``None``: every
            location orders from a supplier.
        stock: a table of what lies and is on its way at the start, see :func:`read_stock`. stock_periods: instead, so
            many periods of each node's usual demand lie there. Neither: nothing, which the warm-up is for.
        lost: demand that is not served is lost; else it waits.
        vary_lead_time: the policy is trained for lead times up to this many periods shorter and longer, too.
        horizons: see :class:`~envs.inventory.task.Task`; ``None``: by the length of the series, see
            :func:`~envs.inventory.task.horizons_of`.

    Raises:
        FileNotFoundError, ImportError: see :func:`~envs.inventory.tables.read_table`.
        ValueError: something that nobody gave, or that does not fit; rows are named.
    """
    if isinstance(sales, Recorded):
        given = {
            "date": date != "date", "units": units != "units", "promotion": bool(promotion), "price": bool(price),
            "period": period != "auto", "history": history is not None,
        }  # fmt: skip
        unread = ", ".join(name for name in given if given[name])
        if unread:
            raise ValueError(f"{unread}: expected with a file of sales, got sales that are read already")
        demand = sales
    else:
        demand = read_sales(
            sales, product=product, date=date, units=units, location=location, promotion=tuple(promotion), price=price,
            period=period, history=history,
        )  # fmt: skip
    places = demand.locations or ("store",)
    if len(places) != demand.series.shape[2]:
        places = tuple(demand.location(k) for k in range(demand.series.shape[2]))
    links = _alone(places) if network is None else _links(read_table(network, "network"), places)
    table = read_table(costs, "costs") if costs is not None else None
    values = {
        "holding": holding, "underage": underage, "lead_time": lead_time, "lead_time_min": lead_time_min,
        "unit_cost": unit_cost, "fixed_cost": fixed_cost, "minimum": minimum, "lot": lot, "capacity": capacity,
    }  # fmt: skip
    numbers = _resolve(demand, links, table, values, product, location or "location")
    leads, earliest = numbers["lead_time"], numbers["lead_time_min"]
    random = bool((earliest < leads).any())
    if (earliest > leads).any():
        raise ValueError(f"lead_time_min: expected at most lead_time, got {earliest.max():g} and {leads.min():g}")
    longest = tuple(int(lead) + vary_lead_time for lead in leads.amax(0).tolist())
    net = Network(
        0, links.network.warehouses, links.network.stores, links.network.edges, longest, links.network.keeps_stock
    )
    if shelf_life and waste_cost is None:
        raise ValueError("waste_cost: expected the cost of a unit that expires with shelf_life, got none; 0 is a cost")
    if waste_cost and not shelf_life:
        raise ValueError(f"shelf_life: expected periods with waste_cost {waste_cost:g}, got none")
    by_series = {
        "holding": numbers["holding"], "underage": numbers["underage"], "edge_cost": numbers["unit_cost"],
        "lead_time": leads, **{k: numbers[k] for k in ("fixed_cost", "minimum", "lot", "capacity")},
    }  # fmt: skip
    windows = horizons_of(demand.series.shape[1], demand.history, demand.history) if horizons is None else horizons
    start, periods, _ = windows.get("train", (0, 0, 0))
    training = demand.series[:, start : start + demand.history + periods]
    usual = training.mean(1)
    # a product without a sale in training has no scale of its own
    by_series["scale"] = usual.clamp_min(1.0 / training.shape[1])
    if (usual == 0).any():
        late = [demand.product(i) for i in torch.nonzero((usual == 0).any(1)).flatten().tolist()]
        warnings.warn(
            f"{demand.source}: nothing sold in the training periods, in some location: {', '.join(late[:5])} "
            f"({len(late)} products); they are planned as the slowest movers",
            stacklevel=4,
        )
    if stock is not None and stock_periods is not None:
        raise ValueError("stock_periods: expected none with a stock table, got both; leave one of them out")
    if stock_periods is not None:
        on_hand = torch.zeros(len(usual), net.nodes, net.slots)
        below = usual.sum(1, keepdim=True).expand(-1, net.first_store)
        on_hand[:, :, 0] = (stock_periods * torch.cat((below, usual), 1)).round()
        by_series["stock"] = on_hand
    if stock is not None:
        by_series["stock"] = read_stock(stock, demand, net, links.nodes, product, location or "location")
    return Task(
        f"own_demand [{demand.source}]", net, demand, (1.0,) * net.nodes, (1.0,) * net.stores, lost=lost,
        horizons=windows, by_series=by_series, earliest=earliest if random else None, vary_lead_time=vary_lead_time,
        terms=Terms(shelf_life=shelf_life, waste_cost=waste_cost or 0.0), nodes=links.nodes,
    )  # fmt: skip


def _alone(places: tuple[str, ...]) -> _Links:
    edges = tuple((-1, k) for k in range(len(places)))
    return _Links(Network(0, 0, len(places), edges, (1,) * len(places)), places, {})


def _links(table: Table, places: tuple[str, ...]) -> _Links:
    """The network file: warehouses are the sources that are no supplier, in the order in which they appear."""
    table.need("source", "target", "lead_time")
    table.only(["source", "target", *_EDGE])
    sources, targets = table.columns["source"], table.columns["target"]
    warehouses = tuple(dict.fromkeys(name for name in sources if name and name.lower() != SUPPLIER))
    bad = [
        (row, f"{source or 'nobody'} ships to {target or 'nobody'}")
        for row, (source, target) in enumerate(zip(sources, targets, strict=True))
        if not source or target not in (*warehouses, *places) or source in places
    ]
    known = ", ".join(places[:8])
    refuse(
        table, bad, f"Targets are locations of the sales ({known}) or warehouses, sources warehouses or {SUPPLIER!r}"
    )
    inner = [(row, f"{s} ships to {t}") for row, (s, t) in enumerate(zip(sources, targets, strict=True))
             if t in warehouses and s.lower() != SUPPLIER]  # fmt: skip
    refuse(table, inner, "Warehouses order from the supplier; build a Task for more echelons")
    number = {name: i for i, name in enumerate((*warehouses, *places))} | {SUPPLIER: -1}
    ends = [(number.get(s, -1), number[t]) for s, t in zip(sources, targets, strict=True)]
    if len(set(ends)) != len(ends):
        raise ValueError(f"{table.name}: expected every link once, got {len(ends)} rows with repetitions")
    order = sorted(range(len(ends)), key=lambda i: (ends[i][0] < 0, ends[i]))
    given = {}
    for name in _EDGE:
        if name not in table.columns:
            continue
        column = table.columns[name]
        wrong = [
            (i, f"{name} {text!r} is no number") for i, text in enumerate(column) if text and as_number(text) is None
        ]
        refuse(table, wrong, "Correct these rows")
        given[name] = np.array([float(column[i]) if column[i] else np.nan for i in order])
    edges = tuple(ends[i] for i in order)
    net = Network(0, len(warehouses), len(places), edges, (1,) * len(edges))
    return _Links(net, (*warehouses, *places), given)


def _resolve(
    demand: Recorded, links: _Links, table: Table | None, options: Mapping[str, Any], product: str, location: str
) -> dict[str, Tensor]:
    """Every number for every series and node or edge: from the network file, else the costs file, else the options."""
    count, net = len(demand.series), links.network
    products = [demand.product(i) for i in range(count)]
    number: dict[str, int | slice] = {"": slice(None)} | {name: i for i, name in enumerate(products)}
    place: dict[str, int | slice] = {"": slice(None)} | {name: i for i, name in enumerate(links.nodes)}
    at = np.full((len(options), count, net.nodes), np.nan)
    names = list(options)
    for i, name in enumerate(names):
        if options[name] is not None:
            at[i] = options[name]
    if table is not None:
        table.only([product, location, *names])
        for name in ("lead_time", "lead_time_min"):
            if name in table.columns and name in links.given:
                raise ValueError(f"{table.name}: {name} is a column of the network file; take it out of one of them")
        rows = list(range(table.rows))
        who = table.columns.get(product, [""] * table.rows)
        where = table.columns.get(location, [""] * table.rows)
        strange = [r for r in rows if who[r] not in number or where[r] not in place]
        bad = [(r, f"{who[r]} {where[r]} is not among the sales or the network") for r in strange]
        bad += [(r, f"{name} {table.columns[name][r]!r} is no number of at least 0") for name in names
                if name in table.columns for r in rows
                if table.columns[name][r] and not (as_number(table.columns[name][r]) or 0) >= 0]  # fmt: skip
        bad += [(r, f"{name} {table.columns[name][r]!r} is no number") for name in names if name in table.columns
                for r in rows if table.columns[name][r] and as_number(table.columns[name][r]) is None]  # fmt: skip
        refuse(table, bad, "Correct these rows")
        for r in sorted(rows, key=lambda r: bool(who[r]) + bool(where[r])):  # what is said of one wins over all
            chosen, node = number[who[r]], place[where[r]]
            for i, name in enumerate(names):
                if name in table.columns and table.columns[name][r]:
                    at[i, chosen, node] = float(table.columns[name][r])
    found: dict[str, np.ndarray] = {}
    target = np.array([t for _, t in net.edges])
    for i, name in enumerate(names):
        if name in _NODE:
            found[name] = at[i][:, net.first_store :] if name == "underage" else at[i]
            continue
        found[name] = at[i][:, target]
        if name in links.given:
            column = np.broadcast_to(links.given[name], found[name].shape)
            found[name] = np.where(np.isnan(column), found[name], column)
        if name in _DEFAULTS:
            found[name] = np.where(np.isnan(found[name]), _DEFAULTS[name], found[name])
    found["lead_time_min"] = np.where(np.isnan(found["lead_time_min"]), found["lead_time"], found["lead_time_min"])
    ends = {name: [links.nodes[t] for t in target] for name in _EDGE}
    ends |= {"holding": list(links.nodes), "underage": list(links.nodes[net.first_store :])}
    for name, values in found.items():
        if np.isnan(values).any():
            s, n = np.argwhere(np.isnan(values))[0]
            raise ValueError(
                f"{name}: expected a number for every product and location, got none for {products[s]} at "
                f"{ends[name][n]}; give the option {name}, or a column {name} in the costs file"
            )
        least = 1 if name in _WHOLE else 0
        if (values < least).any() or (name in _WHOLE and (values != np.round(values)).any()):
            s, n = np.argwhere((values < least) | ((name in _WHOLE) & (values != np.round(values))))[0]
            raise ValueError(
                f"{name}: expected {'whole numbers of' if least else 'numbers of'} at least {least}, got "
                f"{values[s, n]:g} for {products[s]} at {ends[name][n]}"
            )
    return {name: torch.from_numpy(np.ascontiguousarray(values)).float() for name, values in found.items()}


def read_stock(
    path: str | Path, demand: Recorded, network: Network, nodes: Sequence[str], product: str, location: str
) -> Tensor:
    """``[S, N, L]``: what lies where, and when what is on its way arrives.

    The table has the columns ``product``, ``on_hand``, optionally ``arriving_1``, ``arriving_2`` ... (units that can be
    sold 1, 2 ... periods from now) and, of more than one node, ``location`` (warehouses too).

    Raises:
        FileNotFoundError, ImportError: see :func:`~envs.inventory.tables.read_table`.
        ValueError: products or places that are missing, unknown or given twice; units that are negative or no whole
            number; arrivals later than the longest lead time.
    """
    table = read_table(path, "stock")
    several = len(nodes) > 1
    arriving = [f"arriving_{j}" for j in range(1, network.slots)]
    table.need(product, "on_hand", *((location,) if several else ()))
    table.only([product, location, "on_hand", *arriving])
    if arriving and not set(arriving) & table.columns.keys():
        warnings.warn(f"{table.name}: no columns arriving_1 ...: nothing is taken to be on its way", stacklevel=3)
    products = {demand.product(i): i for i in range(len(demand.series))}
    found = np.full((len(products), len(nodes), network.slots), np.nan)
    bad: list[tuple[int, str]] = []
    for row, name in enumerate(table.columns[product]):
        place = table.columns[location][row] if location in table.columns else ""
        if name not in products or (several and place not in nodes) or (place and place not in nodes):
            bad.append((row, f"{name} {place} is not among the sales or the network"))
            continue
        at = found[products[name], list(nodes).index(place) if place else 0]
        if not np.isnan(at[0]):
            bad.append((row, f"{name} {place} is given twice"))
            continue
        at[:] = 0.0
        for j, column in enumerate(["on_hand", *arriving]):
            text = table.columns[column][row] if column in table.columns else "0"
            units = as_number(text or "0")
            if units is None or units < 0 or units != round(units):
                bad.append((row, f"{column} {text!r} of {name} is no whole number of units"))
            else:
                at[j] = units
    refuse(table, bad, "Correct these rows")
    if np.isnan(found).any():
        s, n, _ = np.argwhere(np.isnan(found))[0]
        missing = int(np.isnan(found[..., 0]).sum())
        raise ValueError(
            f"{table.name}: expected the stock of every product{' and place' if several else ''}, got none of "
            f"{demand.product(int(s))}{f' at {nodes[n]}' if several else ''} ({missing} missing); write 0 where there "
            "is none"
        )
    return torch.from_numpy(found).float()
