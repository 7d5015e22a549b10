"""Tables and figures of the inventory study, from its CSV files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.csv_table import read_rows
from ccrl.stats import Interval, t_interval
from envs import make_functional
from envs.inventory.oracle import oracle_cost
from scripts.studies.inventory.cells import simulator

__all__ = ["chosen", "groups", "write"]

Row = dict[str, str]
THRESHOLDS = {"lost": 0.5, "serial": 1.0, "backlog": 0.5, "transshipment": 2.5}
"""Largest gap, percent, that counts as reproduced."""
SPENT = ("seconds", "CPU seconds")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
SHIFT = 0.93, 1.08
"""Factors that set two policies' points beside each other."""
STYLE: dict[str, Any] = {
    "font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8A8A8A",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "legend.frameon": False,
}  # fmt: skip


def write(out: Path, figures: Path) -> list[Path]:
    """``inventory_*.md`` and ``.png`` in ``figures`` of all the CSV files that are in ``out``; returns their paths.

    Raises:
        FileNotFoundError: there is none.
    """
    pages = {"gaps": _gaps, "data": _data, "methods": _methods, "speed": _speed}
    written = []
    for name, page in pages.items():
        tables = {path.stem: read_rows(path) for path in sorted(out.glob(f"{name}*.csv"))}
        tables = {stem: rows for stem, rows in tables.items() if rows}
        if not tables:
            continue
        command = f"python scripts/studies/inventory report --out {out}"
        with mpl.rc_context(STYLE):
            text, figure = page(tables)
            figures.mkdir(parents=True, exist_ok=True)
            stem = figures / f"inventory_{name}"
            figure.savefig(stem.with_suffix(".png"), dpi=100)
        rows = [row for table in tables.values() for row in table]
        cpu = [float(row["CPU seconds"]) for row in rows if row.get("CPU seconds")]
        spent = f" {len(rows)} cells, {sum(cpu) / 60:.0f} CPU minutes of training." if cpu else f" {len(rows)} cells."
        stem.with_suffix(".md").write_text(f"`{command}`:{spent}\n\n{text}", encoding="utf-8")
        written += [stem.with_suffix(".md"), stem.with_suffix(".png")]
    if not written:
        raise FileNotFoundError(f"{out}: expected gaps_*.csv, data.csv, methods.csv or speed.csv; run a study first")
    return written


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with equal values of ``names``, in order of appearance."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def chosen(rows: list[Row]) -> Row:
    """The run with the best development cost: what one would use, before seeing any test."""
    return min(rows, key=lambda row: float(row["dev cost"]))


def _markdown(columns: list[str], lines: list[list[str]]) -> str:
    head = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*head, *("| " + " | ".join(cells) + " |" for cells in lines)]) + "\n"


def _instance(row: Row) -> str:
    short = {"lead_time": "L", "underage": "p", "stores": "K", "correlation": "corr"}
    return ", ".join(f"{short[k]} = {v:g}" for k, v in json.loads(row["options"]).items()) or "default"


def _numbers(row: Row) -> list[float]:
    return list(json.loads(row["options"]).values())


def _number(row: Row, name: str) -> float:
    return float(row[name])


# -- gaps -----------------------------------------------------------------------------------------------------------


def _gaps(tables: dict[str, list[Row]]) -> tuple[str, Figure]:
    parts: list[str] = []
    panels: dict[str, Any] = {}
    for stem, rows in tables.items():
        kind = stem.removeprefix("gaps_")
        limit, lost = THRESHOLDS[kind], kind == "lost"
        columns = ["instance", "bound" if kind == "transshipment" else "optimum"]
        columns += ["capped base stock"] * lost
        columns += ["cost", "gap, %", f"<= {limit:g} %", "seed, step size (of)", "gaps of all, %"]
        columns += ["updates x batch", "CPU s"]
        lines, panels[kind] = [], []
        same = groups(rows, "options", "policy", "epochs", "batch_size", "n_train")
        for runs in sorted(same.values(), key=lambda runs: (runs[0]["policy"] != "vanilla", *_numbers(runs[0]))):
            best = chosen(runs)
            gaps = [_number(run, "gap %") for run in runs]
            panels[kind].append((best, runs))
            line = [f"{_instance(best)}, {best['policy']}", f"{_number(best, 'optimum'):.4f}"]
            if lost:
                verdict = "beaten" if best["better than capped"] == "True" else "NOT beaten"
                line.append(f"{_number(best, 'capped base stock'):.4f}, {verdict}")
            line += [
                f"{_number(best, 'cost'):.4f} +- {_number(best, 'se'):.4f}",
                f"{_number(best, 'gap %'):.2f} +- {_number(best, 'gap se %'):.2f}",
                "yes" if _number(best, "gap %") <= limit else "NO",
                f"{best['seed']}, {best['learning_rate'] or 'published'} ({len(runs)})",
                f"{min(gaps):.2f} to {max(gaps):.2f}",
                f"{best['updates']} x {best['batch_size']}",
                f"{_number(best, 'CPU seconds'):.0f}",
            ]
            lines.append(line)
        within = sum(line[columns.index(f"<= {limit:g} %")] == "yes" for line in lines)
        parts.append(
            f"**{kind}**: {within} of {len(lines)} instances within {limit:g} %.\n\n{_markdown(columns, lines)}"
        )
    note = (
        "Cost per period and store, mean and standard error over test scenarios (5,000 periods, 3,000 warm-up), with a "
        "policy of known cost on the same demand as control variate. Of several seeds and step sizes the one with the "
        "best cost on common development scenarios counts.\n\n"
    )
    return note + "\n".join(parts), _gap_figure(panels)


def _gap_figure(panels: dict[str, list[tuple[Row, list[Row]]]]) -> Figure:
    """Two columns of panels: as wide as a page's text, names of instances legible."""
    kinds = list(panels)
    lines = [kinds[i : i + 2] for i in range(0, len(kinds), 2)]
    heights = [0.9 + 0.2 * max(max(len(panels[kind]) for kind in line), 3) for line in lines]
    page = Figure(figsize=(7.0, sum(heights) + 0.5), layout="constrained")
    grid = page.subplots(len(lines), min(2, len(kinds)), squeeze=False, height_ratios=heights)
    for axis in grid.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, (kind, panel) in zip(grid.flat, panels.items()):
        _gap_panel(axis, kind, panel)
    entries: dict[str, Any] = {}
    for axis in page.axes:
        entries |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    page.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=2, fontsize=8)
    return page


def _gap_panel(axis: Any, kind: str, panel: list[tuple[Row, list[Row]]]) -> None:
    # a run that failed would squeeze the others into one point: it becomes an arrow at the edge
    edge = 4 * THRESHOLDS[kind]
    for y, (best, runs) in enumerate(panel):
        others = [_number(run, "gap %") for run in runs if run is not best]
        inside = [gap for gap in others if gap < edge]
        axis.plot(inside, [y] * len(inside), "o", mfc="none", color="#4D4D4D", ms=4, label="other seeds or step sizes")
        if len(inside) < len(others):
            axis.plot(edge, y, ">", color="#4D4D4D", ms=5, label="the same, beyond the edge: failed")
        error = 1.96 * _number(best, "gap se %")
        axis.errorbar(_number(best, "gap %"), y, xerr=error, fmt="o", color=COLOURS[0], ms=4, linewidth=1.4,
                      label="run that development chose, 95 % over test scenarios")  # fmt: skip
        if best.get("capped base stock"):
            other = 100 * (_number(best, "capped base stock") / _number(best, "optimum") - 1)
            axis.plot(other, y, "x", color=COLOURS[1], ms=5, label="best capped base stock")
    axis.axvline(0.0, color="#262626", linewidth=0.8)
    left, right = axis.get_xlim()
    axis.set_xlim(max(left, -THRESHOLDS[kind]), min(right, 1.03 * edge))
    axis.axvline(THRESHOLDS[kind], color="#5A5A5A", linewidth=1, linestyle="--", label="target")
    several = len({best["policy"] for best, _ in panel}) > 1
    short = {"echelon_stock": "echelon"}
    names = [_instance(b) + (f", {short.get(b['policy'], b['policy'])}" if several else "") for b, _ in panel]
    axis.set_yticks(range(len(panel)), names, fontsize=8)
    axis.set_ylim(len(panel) - 0.5, -0.5)
    axis.set_xlabel("gap to the bound, %" if kind == "transshipment" else "gap to the optimum, %")
    axis.set_title(f"{kind}, <= {THRESHOLDS[kind]:g} %", loc="left")


# -- data efficiency ------------------------------------------------------------------------------------------------


def _interval(values: list[float]) -> Interval:
    """Mean and Student's 95 % interval over seeds; of one seed, itself."""
    return t_interval(values) if len(values) > 1 else Interval(*(np.asarray(values[0]),) * 3)


def _data(tables: dict[str, list[Row]]) -> tuple[str, Figure]:
    rows = tables["data"]
    lines = []
    page = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = page.subplots()
    for i, ((policy,), mine) in enumerate(groups(rows, "policy").items()):
        sizes = sorted(groups(mine, "n_train").items(), key=lambda item: int(item[0][0]))
        bands = []
        for (size,), runs in sizes:
            costs = [_number(run, "cost") for run in runs]
            bands.append(_interval(costs))
            axis.plot([int(size) * SHIFT[i % 2]] * len(costs), costs, "o", mfc="none", color=COLOURS[i], ms=4)
            lines.append(
                [policy, size, f"{bands[-1].point:.3f}", f"{bands[-1].low:.3f} to {bands[-1].high:.3f}",
                 ", ".join(f"{c:.3f}" for c in costs), f"{statistics.fmean(_number(r, 'se') for r in runs):.3f}",
                 f"{runs[0]['updates']} x {runs[0]['batch_size']}",
                 f"{statistics.fmean(_number(r, 'CPU seconds') for r in runs):.0f}"]
            )  # fmt: skip
        x = [int(size) * SHIFT[i % 2] ** 2 for (size,), _ in sizes]
        error = np.abs([[b.point - b.low, b.high - b.point] for b in bands]).T
        axis.errorbar(
            x, [b.point for b in bands], yerr=error, color=COLOURS[i], marker="os"[i % 2], ms=5, capsize=3,
            label=policy, linestyle=("-", "--")[i % 2],
        )  # fmt: skip
    axis.set_xscale("log")
    ticks = sorted({int(r["n_train"]) for r in rows})
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel("training scenarios")
    axis.set_ylabel("test cost per period and store")
    seeds = len({row["seed"] for row in rows})
    axis.set_title(
        f"One warehouse, {_instance(rows[0])}: {seeds} seeds (open), mean and 95 % interval (Student's t)",
        loc="left",
        fontsize=8,
    )
    axis.legend()
    columns = ["policy", "training scenarios", "cost", "95 % interval", "seeds", "test se", "updates x batch", "CPU s"]
    return _markdown(columns, lines), page


# -- methods --------------------------------------------------------------------------------------------------------


def _methods(tables: dict[str, list[Row]]) -> tuple[str, Figure]:
    instances = groups(tables["methods"], "env", "options")
    page = Figure(figsize=(2.6 * len(instances), 4.6), layout="constrained")
    lines = []
    axes = page.subplots(2, len(instances), squeeze=False, sharey="col")
    for (upper, lower), ((env, options), rows) in zip(axes.T, instances.items()):
        name = env.removeprefix("ccrl/Inventory").removesuffix("-v0")
        optimum = oracle_cost(simulator(make_functional(env, **json.loads(options))).task)
        for i, ((method,), runs) in enumerate(sorted(groups(rows, "method").items())):
            by_rate = list(groups(runs, "learning_rate").values())
            seeds = max(len(group) for group in by_rate)  # what was only tried on a seed is not compared with a mean
            by_rate = [group for group in by_rate if len(group) == seeds]
            mine = min(by_rate, key=lambda g: statistics.fmean(_number(r, "dev cost") for r in g))
            costs = [_number(r, "cost") for r in mine]
            gap = "" if optimum is None else f"{100 * (statistics.fmean(costs) / optimum - 1):.1f}"
            average = {k: statistics.fmean(_number(r, k) for r in mine) for k in ("se", "samples used", *SPENT)}
            lines.append(
                [f"{name} ({_instance(mine[0])})", method, mine[0]["learning_rate"] or "published", str(len(costs)),
                 f"{statistics.fmean(costs):.3f} ({min(costs):.3f} to {max(costs):.3f})", f"{average['se']:.3f}", gap,
                 f"{average['samples used'] / 1e6:.1f} M", mine[0]["updates"], f"{average['seconds']:.0f}",
                 f"{average['CPU seconds']:.0f}"]
            )  # fmt: skip
            drawn = np.array([[tuple(map(float, point.split(":"))) for point in r["curve"].split(";")] for r in mine])
            curves = drawn.mean(0), drawn.min(0), drawn.max(0)
            for axis, column in ((upper, 0), (lower, 1)):
                x = curves[0][:, column]
                axis.plot(x, curves[0][:, 2], color=COLOURS[i], label=method)
                axis.fill_between(x, curves[1][:, 2], curves[2][:, 2], color=COLOURS[i], alpha=0.2, linewidth=0)
        if optimum is not None:
            for axis in (upper, lower):
                axis.axhline(optimum, color="#262626", linewidth=0.8, linestyle="--")
            upper.set_ylim(0.97 * optimum, 1.35 * optimum)
        upper.set_title(f"{name}\n{_instance(rows[0])}", loc="left", fontsize=7)
        upper.set(xscale="log", xlabel="scenario periods")
        lower.set(xscale="log", xlabel="CPU seconds, scores included")
        lower.xaxis.set_minor_formatter(NullFormatter())  # less than a decade: its numbers would overlap
    for axis in axes[:, 0]:
        axis.set_ylabel("development cost")
    axes[0, 0].legend()
    columns = ["instance", "method", "step size", "seeds", "test cost, mean (range)", "test se", "gap, %", "samples"]
    note = (
        "Curves: mean and range over seeds. Dashed: optimum, for transshipment a lower bound. Same test demand and "
        "cost for all: per period and store, after the warm-up of 5,000-period scenarios, orders not rounded. Of the "
        "step sizes with most seeds the one with the best mean development cost.\n\n"
    )
    return note + _markdown([*columns, "updates", "wall s", "CPU s"], lines), page


# -- speed ----------------------------------------------------------------------------------------------------------


def _speed(tables: dict[str, list[Row]]) -> tuple[str, Figure]:
    rows = tables["speed"]
    lines = []
    for row in rows:
        forward = [row["forward, ms"], row["forward, store-periods/s"]]
        both = [row["forward and backward, ms"], row["forward and backward, store-periods/s"]]
        lines.append(
            [row["env"].removeprefix("ccrl/Inventory").removesuffix("-v0"), _instance(row), row["policy"],
             row["batch_size"], row["compile"], f"{row['device name']}, {row['threads used']} threads",
             *(f"{float(x):,.0f}" if x else "" for x in forward + both), f"{_number(row, 'first seconds'):.1f}"]
        )  # fmt: skip
    page = Figure(figsize=(6.2, 2.9), layout="constrained")
    left, right = page.subplots(1, 2)
    looks = {"off": ("-", "eager"), "period": ("--", "compiled")}
    one, many = ([r for r in rows if ("OneStore" in r["env"]) is first] for first in (True, False))
    for i, ((device, mode), mine) in enumerate(groups(one, "device", "compile").items()):
        dash, text = looks[mode]
        y = [_number(r, "forward and backward, store-periods/s") / 1e6 for r in mine]
        left.plot(
            [int(r["batch_size"]) for r in mine], y, dash, marker="o", ms=3, color=COLOURS[i], label=f"{device}, {text}"
        )
    left.axhline(0.6, color="#6A6A6A", linewidth=0.8, linestyle=":", label="wanted: .6")
    left.set_xscale("log", base=2)
    left.set(xlabel="scenarios per update", ylabel="million store-periods/s", ylim=(0, None))
    left.set_title("One store, forward and backward", loc="left")
    for i, ((device, policy), mine) in enumerate(groups(many, "device", "policy").items()):
        stores = [json.loads(r["options"])["stores"] for r in mine]
        y = [_number(r, "forward and backward, ms") for r in mine]
        right.plot(stores, y, marker="o", ms=3, color=COLOURS[i], label=f"{device}, {policy}")
    right.set(xlabel="stores", ylabel="ms per update", ylim=(0, None))
    right.set_title("One warehouse, forward and backward", loc="left")
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    columns = ["network", "instance", "policy", "batch", "compile", "device", "forward, ms", "store-periods/s"]
    return _markdown([*columns, "forward and backward, ms", "store-periods/s", "first call, s"], lines), page
