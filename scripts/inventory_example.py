"""Made-up files to try the planning commands with: sales, costs, a network, a stock.

python scripts/inventory_example.py --out example
"""

from __future__ import annotations

import csv
import datetime
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import check_siblings

check_siblings("envs")

from ccrl.experiment.files import write_atomic
from ccrl.settings import Count, Natural, Range, Settings
from envs.inventory import retail_sales

__all__ = ["ExampleConfig", "main"]


@dataclass(frozen=True)
class ExampleConfig(Settings):
    """How much is made up."""

    out: Path
    """The files are written to this folder."""
    products: Count = 20
    """So many products are sold."""
    weeks: Annotated[int, Range(60)] = 156
    """Sales are this many weeks long."""
    stores: Count = 1
    """They are sold in this many stores, which a warehouse serves if there are several."""
    seed: Natural = 0
    """This number decides everything."""


def main(config: ExampleConfig) -> list[Path]:
    """Write the files; returns their paths."""
    sales = retail_sales(config.products, config.weeks, config.stores, config.seed)
    assert sales.features is not None
    config.out.mkdir(parents=True, exist_ok=True)
    several = config.stores > 1
    place = ["location"] if several else []
    rows: list[list[Any]] = [["sku", "date", "units", *place, "promo"]]
    for week in range(config.weeks + 4):  # the last four are plans
        day = sales.first_day + datetime.timedelta(weeks=week)
        known = week < config.weeks
        for i, product in enumerate(sales.products):
            for k, store in enumerate(sales.locations):
                units = int(sales.series[i, week, k]) if known else None
                promo = int(sales.features[i, week, k, 0]) if known else int((i + week) % 10 == 0)
                if units or promo or units is None:
                    where = [store] if several else []
                    rows.append([product, day, "" if units is None else units, *where, promo])
    files = [_write(config.out / "sales.csv", rows)]
    usual = sales.series.mean(1)
    costs: list[list[Any]] = [["sku", "underage"], *([product, 4 + i % 8] for i, product in enumerate(sales.products))]
    files.append(_write(config.out / "costs.csv", costs))
    nodes = (["W"] if several else []) + list(sales.locations)
    stock: list[list[Any]] = [["sku", *place, "on_hand", "arriving_1"]]
    for i, product in enumerate(sales.products):
        for node in nodes:
            mean = float(usual[i, sales.locations.index(node)] if node in sales.locations else usual[i].sum())
            stock.append([product, *([node] if several else []), round(2 * mean), round(mean)])
    files.append(_write(config.out / "stock.csv", stock))
    if several:
        links: list[list[Any]] = [["source", "target", "lead_time"], ["supplier", "W", 3]]
        files.append(_write(config.out / "network.csv", links + [["W", store, 2] for store in sales.locations]))
    print("\n".join(map(str, files)))
    return files


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(ExampleConfig, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
