"""The page of ``inventory_report.py``: tables and pictures in one HTML file that opens offline. It is no command."""

from __future__ import annotations

import base64
import csv
import datetime
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("envs")

from ccrl.experiment.files import write_atomic
from envs.inventory import InventoryEnv, Recorded
from envs.inventory.plot import plot_network

if TYPE_CHECKING:
    from scripts.inventory_report import Row

__all__ = ["network_picture", "product_picture", "text_table", "write_page", "write_products"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
img { background: white; display: block; height: auto; margin: .5rem 0 1.5rem; max-width: 100%; }
table { border-collapse: collapse; font-size: 14px; } .wide { overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
td.number { font-variant-numeric: tabular-nums; text-align: right; }
"""
_COLUMNS = ("method", "cost", "policy minus it", "fill rate", "stock", "orders", "units")


def _cells(row: Row) -> list[str]:
    found = row.scores
    pair = "" if row.difference is None else "{:+.3g} ({:+.3g} to {:+.3g})".format(*row.difference)
    return [
        row.name, f"{float(found.cost.mean()):.4g}", pair, f"{100 * float(found.fill_rate.nanmean()):.1f} %",
        f"{float(found.stock.mean()):.4g}", f"{float(found.orders.mean()):.3g}", f"{float(found.units.mean()):.4g}",
    ]  # fmt: skip


def text_table(rows: Sequence[Row]) -> str:
    """The comparison in lines of text: means over products, per product and period."""
    lines = [list(_COLUMNS), *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def write_products(path: Path, demand: Recorded, rows: Sequence[Row]) -> None:
    """A CSV file with a row per product and method."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["product", "method", "cost", "fill_rate", "stock", "orders", "units"])
    for i in range(len(demand.series)):
        for row in rows:
            values = [f"{float(column[i]):.6g}" for column in row.scores]
            writer.writerow([demand.product(i), row.name, *values])
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))


def _encoded(figure: Figure) -> str:
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=80)
    return base64.b64encode(target.getvalue()).decode()


def product_picture(env: InventoryEnv, demand: Recorded, ours: Row, best: Row, product: int) -> str:
    """Demand, stock and orders of one product over the held-out periods, all stores together: the trained policy above,
    the best rule below. A PNG in base64."""
    net = env.network
    first = env.first_week + demand.history + env.ignore
    start = demand.first_day + datetime.timedelta(days=demand.step_days * first)
    count = env.periods - env.ignore
    days = [start + datetime.timedelta(days=demand.step_days * t) for t in range(count)]
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True, sharey=True)
        for axis, row in zip(axes, (ours, best), strict=True):
            trace = row.trace
            stock = trace.inventory[:-1, product, :, 0].clamp_min(0.0).sum(1)[env.ignore :].numpy()
            wanted = trace.demand[env.ignore :, product].sum(1).numpy()
            on_hand = trace.inventory[:-1, product, net.first_store :, 0].clamp_min(0.0)
            missed = (trace.demand[:, product] - on_hand).clamp_min(0.0).sum(1)[env.ignore :].numpy()
            ordered = trace.action[env.ignore :, product, net.internal :].sum(1).numpy()
            axis.fill_between(days, stock, step="mid", color="#0072B2", alpha=0.3, linewidth=0, label="stock")
            axis.step(days, wanted, where="mid", color="#262626", linewidth=0.9, label="demand")
            axis.bar(days, -missed, width=0.8 * demand.step_days, color="#D55E00", label="not served")
            axis.plot(np.array(days)[ordered > 0], ordered[ordered > 0], "v", ms=4, color="#009E73", label="orders")
            cost, fill = float(row.scores.cost[product]), 100 * float(row.scores.fill_rate[product])
            axis.set_title(f"{row.name}: cost {cost:.3g} a period, {fill:.0f} % served at once", loc="left", fontsize=8)
        axes[0].legend(loc="upper right", ncols=4, frameon=False, fontsize=7)
    return _encoded(figure)


def network_picture(env: InventoryEnv, ours: Row, product: int) -> str:
    """The network with its flows (means over products) and the stocks of one product. A PNG in base64."""
    return _encoded(plot_network(env, ours.trace, scenario=product, periods=env.periods - env.ignore))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(
        "<tr>" + "".join(
            f"<td{' class=number' if i else ''}>{html.escape(text)}</td>" for i, text in enumerate(line)
        ) + "</tr>" for line in lines
    )  # fmt: skip
    return f"<div class=wide><table><tr>{titles}</tr>{body}</table></div>"


def write_page(
    path: Path, env: InventoryEnv, rows: Sequence[Row], questions: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[str, str]], network: str,
) -> None:  # fmt: skip
    """One HTML file with everything in it."""
    task, demand = env.task, env.task.demand
    assert isinstance(demand, Recorded)
    span = env.periods - env.ignore
    first = demand.first_day + datetime.timedelta(
        days=demand.step_days * (env.first_week + demand.history + env.ignore)
    )
    kind = "weeks" if demand.step_days == 7 else "days"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Inventory report</title><style>{_STYLE}</style><h1>Inventory report</h1>",
        f"<p>{html.escape(demand.source)}: {len(demand.series)} products, {env.network.stores} locations, "
        f"{env.network.warehouses} warehouses. {span} held-out {kind} from {first}, never used for training or tuning; "
        f"the {env.ignore} {kind} before them are simulated and not counted. Orders are whole units.</p>",
        f"<h2>Held-out {kind}</h2>",
        "<p>Means over products, per product and period. Rules are tuned product by product on the "
        "development periods. <em>Policy minus it</em>: difference of costs, paired by product, with its 95 % "
        "interval; below 0 the trained policy is cheaper.</p>",
        _table(_COLUMNS, [_cells(row) for row in rows]),
    ]
    if questions:
        head = ("what if", "policy's cost", "fill rate", "stock", "best rule as tuned before", "best rule tuned again")
        lines = [
            [q["question"], f"{q['cost']:.4g}", f"{100 * q['fill_rate']:.1f} %", f"{q['stock']:.4g}",
             f"{q['kept']}: {q['kept_cost']:.4g}", f"{q['again']}: {q['again_cost']:.4g}"] for q in questions
        ]  # fmt: skip
        parts += ["<h2>What if</h2><p>Nothing is trained again.</p>", _table(head, lines)]
    image = "<img alt='{}' src='data:image/png;base64,{}'>"
    parts += ["<h2>Network</h2>", image.format("The network and its flows", network)]
    parts.append("<h2>Products</h2>")
    for name, picture in pictures:
        parts += [f"<h3>{html.escape(name)}</h3>", image.format(html.escape(name, quote=True), picture)]
    if task.vary_lead_time:
        parts.append(f"<p>Trained for lead times up to {task.vary_lead_time} longer and shorter.</p>")
    write_atomic(path, lambda file: file.write("\n".join(parts).encode()))
