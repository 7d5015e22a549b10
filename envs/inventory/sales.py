"""A planner's own sales: long and wide tables of days or weeks, with promotions, prices and several locations.

sku,date,units,location,promo          long: one row per product, location and period; columns are named by options
sku,2024-01-01,2024-01-08,...          wide: one row per product (and location), one column per period
date,P1,P2,...                         wide: one row per period, one column per product
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from ccrl.settings import Count, checked
from envs.inventory.demand import Recorded
from envs.inventory.tables import Table, as_day, as_number, read_table, refuse

__all__ = ["Period", "measured_as", "read_sales"]

Period = Literal["auto", "week", "day"]

_HISTORY = {7: 16, 1: 28}
"""Periods that a policy sees: 16 weeks as published, or 28 days."""


class _Cell(NamedTuple):
    row: int
    product: str
    location: str
    day: datetime.date
    units: float | None
    """``None``: a plan for a period to come."""


@checked
def read_sales(
    path: str | Path,
    *,
    product: str = "sku",
    date: str = "date",
    units: str = "units",
    location: str | None = None,
    promotion: Sequence[str] = (),
    price: str | None = None,
    period: Period = "auto",
    history: Count | None = None,
) -> Recorded:
    """Sales of products by day or week as :class:`~envs.inventory.demand.Recorded`, names kept.

    Periods without a row count as zero demand, and a warning says how many. Rows after the last period with units,
    whose units are blank, are plans: their promotions and prices are known ahead.

    Args:
        path: ``.csv`` or ``.parquet``, long or wide (see the head of this file).
        product, date, units, location: names of the columns. Without ``location`` all is one store.
        promotion: columns of numbers that are planned ahead (0 and 1, or a discount); long tables only.
        price: a column of prices planned ahead; policies see it over the product's median of the first half, minus one.
        period: ``"week"`` adds days up to weeks from Monday; ``"auto"`` keeps the step that the dates have.
        history: periods that policies see, and that precede the first simulated one; ``None``: 16 weeks or 28 days.

    Raises:
        FileNotFoundError, ImportError: see :func:`~envs.inventory.tables.read_table`.
        ValueError: columns that are missing; rows without a name or a day, with units that are no number or negative,
            or that repeat others: the message names them.
    """
    table = read_table(path, "sales")
    extra = (*promotion, *((price,) if price else ()))
    if len(set(extra)) != len(extra):
        raise ValueError(f"promotion, price: expected different columns, got {', '.join(extra)}")
    dated = [name for name in table.columns if as_day(name)]
    if {product, date, units} <= table.columns.keys():
        cells = _long(table, product, date, units, location, extra)
    elif dated and product in table.columns:
        cells = _wide(table, product, dated, location, extra)
    elif date in table.columns:
        cells = _by_product(table, date, location, extra)
    else:
        raise ValueError(
            f"{table.name}: expected the columns {product}, {date}, {units}, or {product} and one column per day "
            f"(2024-01-01), or {date} and one column per product; got {', '.join(list(table.columns)[:12])}; name the "
            f"columns with the options product, date and units"
        )
    return _recorded(table, cells, promotion, price, period, history)


def _long(table: Table, product: str, date: str, units: str, location: str | None, extra: Sequence[str]) -> list[_Cell]:
    table.need(product, date, units, *((location,) if location else ()), *extra)
    bad: list[tuple[int, str]] = []
    found: list[_Cell] = []
    where = table.columns[location] if location else [""] * table.rows
    for row, (name, text, amount, place) in enumerate(
        zip(table.columns[product], table.columns[date], table.columns[units], where, strict=True)
    ):
        day = as_day(text)
        number = as_number(amount) if amount else None
        if not name or (location and not place):
            bad.append((row, f"no {location if name else product}"))
        elif day is None:
            bad.append((row, f"{date} {text!r} is no day such as 2024-01-31"))
        elif amount and number is None:
            bad.append((row, f"{units} {amount!r} is no number"))
        elif number is not None and number < 0:
            bad.append((row, f"{units} {amount} is negative"))
        else:
            found.append(_Cell(row, name, place, day, number))
    refuse(table, bad, "Correct these rows; returned goods are no demand: set them to 0")
    last = max((cell.day for cell in found if cell.units is not None), default=None)
    if last is None:
        raise ValueError(f"{table.name}: expected numbers in the column {units}, got none")
    blank = [(cell.row, f"{units} is blank") for cell in found if cell.units is None and cell.day <= last]
    refuse(table, blank, f"Blank {units} are for plans after the last period ({last}); write 0 or take the rows out")
    return found


def _wide(table: Table, product: str, dated: Sequence[str], location: str | None, extra: Sequence[str]) -> list[_Cell]:
    if extra:
        raise ValueError(f"{table.name}: promotion and price are columns of long tables, got a column per period")
    table.only([product, *((location,) if location else ()), *dated])
    table.need(product, *((location,) if location else ()))
    bad: list[tuple[int, str]] = []
    found: list[_Cell] = []
    where = table.columns[location] if location else [""] * table.rows
    for name in dated:
        day = as_day(name)
        assert day is not None
        for row, text in enumerate(table.columns[name]):
            number = as_number(text) if text else 0.0
            if number is None or number < 0 or not table.columns[product][row] or (location and not where[row]):
                bad.append((row, f"{name} is {text!r} for {table.columns[product][row] or 'no product'}"))
            else:
                found.append(_Cell(row, table.columns[product][row], where[row], day, number))
    refuse(table, bad, "Expected units that are not negative, and a name in every row")
    return found


def _by_product(table: Table, date: str, location: str | None, extra: Sequence[str]) -> list[_Cell]:
    if extra or location:
        raise ValueError(f"{table.name}: location, promotion and price are columns of long tables, got one per product")
    bad: list[tuple[int, str]] = []
    found: list[_Cell] = []
    for row, text in enumerate(table.columns[date]):
        day = as_day(text)
        if day is None:
            bad.append((row, f"{date} {text!r} is no day such as 2024-01-31"))
            continue
        for name, column in table.columns.items():
            if name == date:
                continue
            number = as_number(column[row]) if column[row] else 0.0
            if number is None or number < 0:
                bad.append((row, f"{name} is {column[row]!r}"))
            else:
                found.append(_Cell(row, name, "", day, number))
    refuse(table, bad, "Expected days, and units that are not negative")
    return found


def _recorded(
    table: Table, cells: list[_Cell], promotion: Sequence[str], price: str | None, period: Period, history: int | None
) -> Recorded:
    days = sorted({cell.day for cell in cells})
    gaps = {(day - days[0]).days for day in days}
    step = 7 if period == "week" or (period == "auto" and len(days) > 1 and all(gap % 7 == 0 for gap in gaps)) else 1
    daily = step == 7 and any(gap % 7 for gap in gaps)
    # added up, weeks begin on Mondays
    first = days[0] - datetime.timedelta(days=days[0].weekday()) if daily else days[0]
    repeated: dict[tuple[str, str, datetime.date], int] = {}
    bad = []
    for cell in cells:
        before = repeated.setdefault((cell.product, cell.location, cell.day), cell.row)
        if before != cell.row:
            bad.append((cell.row, f"repeats row {table.row(before)} ({cell.product} {cell.location} {cell.day})"))
    if len(repeated) != len(cells) and not bad:
        bad.append((cells[0].row, "a period is given twice"))
    refuse(table, bad, "Expected one row per product, location and period; add them up, or name the location column")
    products = tuple(dict.fromkeys(cell.product for cell in cells))
    places = tuple(dict.fromkeys(cell.location for cell in cells))
    sold = [cell for cell in cells if cell.units is not None]
    periods = (max(cell.day for cell in sold) - first).days // step + 1
    known = (max(cell.day for cell in cells) - first).days // step + 1
    rows = {name: i for i, name in enumerate(products)}
    columns = {name: k for k, name in enumerate(places)}
    demand = np.zeros((len(products), periods, len(places)))
    seen = np.zeros(demand.shape, dtype=bool)
    for cell in sold:
        place = rows[cell.product], (cell.day - first).days // step, columns[cell.location]
        demand[place] += cell.units or 0.0
        seen[place] = True
    cut = 0
    if daily:  # weeks of which the file has a part would look like weak weeks
        ends = (max(cell.day for cell in sold) - first).days + 1
        cut, short = (1 if days[0] != first else 0), ends % 7
        demand, seen = demand[:, cut : periods - (short > 0)], seen[:, cut : periods - (short > 0)]
        if cut or short:
            warnings.warn(f"{table.name}: the first or last week is not complete and is left out", stacklevel=4)
        if not demand.shape[1]:
            raise ValueError(f"{table.name}: expected at least one whole week from Monday to Sunday, got none")
    absent = int((~seen).sum())
    if absent:
        warnings.warn(
            f"{table.name}: {absent} of {seen.size} product-{'weeks' if step == 7 else 'days'} have no row and count "
            f"as zero demand ({sum(not s[0].any() for s in seen)} products begin later than the first)",
            stacklevel=4,
        )
    dead = [name for name, series in zip(products, demand, strict=True) if not series.any()]
    if dead:
        raise ValueError(f"{table.name}: expected some demand of every product, got none of {', '.join(dead[:5])}")
    names = (*(f"promotion:{name}" for name in promotion), *((f"price:{price}",) if price else ()))
    features = measures = None
    if names:
        total = np.zeros((len(products), known, len(places), len(names)))
        count = np.zeros(total.shape)
        texts = [table.columns[name] for name in (*promotion, *((price,) if price else ()))]
        wrong: list[tuple[int, str]] = []
        for cell in cells:
            values = [as_number(text[cell.row]) if text[cell.row] else np.nan for text in texts]
            if None in values:
                wrong.append((cell.row, f"{names[values.index(None)]} is no number"))
                continue
            given = np.array(values, dtype=float)
            place = rows[cell.product], (cell.day - first).days // step, columns[cell.location]
            total[place] += np.nan_to_num(given)
            count[place] += ~np.isnan(given)
        refuse(table, wrong, "Promotion and price columns hold numbers")
        # days that are added up to weeks: the share of days with a promotion, the mean price
        grid = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
        features, measures = map(torch.from_numpy, _planned(table, grid[:, cut:], len(promotion)))
    first += datetime.timedelta(days=cut * step)
    return Recorded(
        torch.from_numpy(demand.astype(np.float32)), table.name, first, history or _HISTORY[step], step, products,
        places if places != ("",) else (), features, names, measures,
    )  # fmt: skip


def measured_as(new: Recorded, old: Recorded) -> Recorded:
    """``new`` with its promotions and prices in the units of ``old``, which has the same products, locations and
    features: what a policy learnt is what these numbers mean. A promotion that ``old`` had nothing of keeps its own.
    """
    if new.features is None or new.feature_units is None or old.feature_units is None:
        return new
    ratio = torch.where(old.feature_units > 0, new.feature_units / old.feature_units, 1.0)[:, None]
    level = torch.tensor([float(name.startswith("price:")) for name in new.feature_names])  # a price is shown minus 1
    return replace(new, features=(new.features + level) * ratio - level)


def _planned(table: Table, grid: np.ndarray, promotions: int) -> tuple[np.ndarray, np.ndarray]:
    """Features ``[S, W', K, F]`` without gaps: no promotion where no row says so, prices go on, relative; and what they
    are relative to, ``[S, K, F]``."""
    flags = np.nan_to_num(grid[..., :promotions])
    largest = np.abs(flags).max((0, 1, 2), initial=0.0)
    flags = flags / np.where(largest > 0, largest, 1.0)
    prices = grid[..., promotions:]
    if (prices <= 0).any():
        raise ValueError(f"{table.name}: expected positive prices, got {np.nanmin(prices):g}")
    index = np.where(np.isnan(prices), -1, np.arange(prices.shape[1])[None, :, None, None])
    index = np.maximum.accumulate(index, 1)
    opening = np.where(np.isnan(prices), prices.shape[1], np.arange(prices.shape[1])[None, :, None, None]).min(1)
    index = np.where(index < 0, np.minimum(opening, prices.shape[1] - 1)[:, None], index)
    prices = np.take_along_axis(prices, index, 1)
    if np.isnan(prices).any():
        raise ValueError(f"{table.name}: expected a price for every product and location, got none for some")
    usual = np.median(prices[:, : max(1, prices.shape[1] // 2)], 1, keepdims=True)
    measures = np.concatenate((np.broadcast_to(largest, flags[:, 0].shape), usual[:, 0]), -1)
    return np.concatenate((flags, prices / usual - 1.0), -1).astype(np.float32), measures.astype(np.float32)
