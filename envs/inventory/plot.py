"""A picture of an inventory network for a planner: who ships how much to whom, and what lies where and when."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from envs.inventory.demand import Recorded
from envs.inventory.simulator import InventoryEnv, Trace
from envs.inventory.terms import expire

__all__ = ["plot_network"]

_STOCK, _TRANSIT, _MISSED, _DEMAND, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#262626", "#5A5A5A"
_SENDERS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00")
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.labelcolor": "#262626",
    "text.color": "#262626",
    "svg.fonttype": "none",
    "svg.hashsalt": "ccrl",
}


class _Summary(NamedTuple):
    """Means over scenarios and the periods after the warm-up, per node or edge."""

    stock: np.ndarray
    """Left at the end of the period: what holding is paid for."""
    flow: np.ndarray
    cost: np.ndarray
    served: np.ndarray
    """Per store: share of demand met from stock in its own period; NaN without demand."""


def plot_network(
    env: InventoryEnv, trace: Trace, *, scenario: int = 0, periods: int | None = None, title: str | None = None
) -> Figure:
    """One row per node, from upstream to the stores. On the left the network: lines are as wide as their mean flow;
    a node names its senders with flow and lead time; of several warehouses each has its colour. On the right the stock
    of one scenario over time: on hand at the start of the period, on the way, demand, missed demand. Numbers are means
    over all scenarios after the warm-up.

    Args:
        env: the simulator that made the trace.
        trace: from :func:`envs.inventory.simulate`.
        scenario: which one the right half shows.
        periods: how many of the last periods it shows; ``None`` is all, up to 100.
        title: ``None`` is the name of the task.

    Raises:
        ValueError: a trace of another network, a scenario it does not have, no period to show.
    """
    net = env.network
    count = trace.inventory.shape[1]
    if periods is not None and periods < 1:
        raise ValueError(f"periods: expected at least 1 to show, got {periods}")
    if trace.inventory.shape[2:] != (net.nodes, net.slots) or not 0 <= scenario < count:
        raise ValueError(
            f"expected a trace of {net.nodes} nodes with {net.slots} slots and a scenario below {count}, got "
            f"{tuple(trace.inventory.shape[2:])} and scenario {scenario}"
        )
    total = len(trace.cost)
    shown = min(total, 100 if periods is None else periods)
    row_height = max(0.42, min(1.1, 5.0 / net.nodes))
    with mpl.rc_context(_STYLE):
        height = row_height * net.nodes + 1.45
        figure = Figure(figsize=(11.0, height))
        grid = figure.add_gridspec(
            net.nodes, 2, width_ratios=(0.85, 1.0), left=0.02, right=0.845, top=1 - 0.72 / height, bottom=0.55 / height,
            wspace=0.13, hspace=0.28,
        )  # fmt: skip
        summary = _summarise(env, trace)
        _draw_network(figure.add_subplot(grid[:, 0]), env, summary)
        axes = [figure.add_subplot(grid[row, 1]) for row in range(net.nodes)]
        _draw_rows(axes, env, trace, summary, scenario, shown)
        heading = textwrap.shorten(title or env.task.name.replace("_", " "), 110, placeholder=" …")
        figure.text(0.02, 1 - 0.1 / height, heading, fontsize=12, fontweight="bold", va="top")
        after = slice(env.ignore if total > env.ignore else 0, None)
        per_store = float(trace.cost[after].double().mean()) / net.stores
        kind = "profit" if env.task.profit else "cost"
        counted = total - env.ignore if total > env.ignore else total
        figure.text(
            0.02, 1 - 0.36 / height, va="top", color=_GREY,
            s=f"{kind} {abs(per_store) if env.task.profit and per_store <= 0 else per_store:.2f} per period and store: "
            f"mean of {count} scenarios and the last {counted} of {total} periods",
        )  # fmt: skip
        _legend(figure, height, env, warm=total - shown < env.ignore)
    return figure


def _summarise(env: InventoryEnv, trace: Trace) -> _Summary:
    first, net, task = env.network.first_store, env.network, env.task
    after = slice(env.ignore if len(trace.cost) > env.ignore else 0, None)
    on_hand = trace.inventory[:-1, :, :, 0].double()[after]
    action, demand = trace.action.double()[after], trace.demand.double()[after]
    left = on_hand.clone()
    left[:, :, first:] -= demand
    for edge, (source, _) in enumerate(net.edges[: net.internal]):
        left[:, :, source] -= action[:, :, edge]
    stock = left.clamp_min(0.0)
    cost = stock * trace.seen["holding"].double()
    met = torch.minimum(on_hand[:, :, first:].clamp_min(0.0), demand)
    # Underage that differs by scenario is only in the total cost, so a single store is charged the total.
    if net.nodes == 1:
        cost = trace.cost.double()[after][:, :, None]
    else:
        price = trace.seen["underage"].double()
        cost[:, :, first:] += -price * met if task.profit else price * (-left[:, :, first:]).clamp_min(0.0)
        for edge, (_, target) in enumerate(net.edges):
            cost[:, :, target] += trace.seen["edge_cost"][:, edge].double() * action[:, :, edge]
            if "fixed_cost" in trace.seen:
                cost[:, :, target] += trace.seen["fixed_cost"][:, edge].double() * (action[:, :, edge] > 0)
        if task.terms and task.terms.waste_cost:
            cost[:, :, first:] += task.terms.waste_cost * _wasted(env, trace)[after]
    wanted = demand.clamp_min(0.0).sum((0, 1))
    served = np.where(wanted > 0, met.clamp_min(0.0).sum((0, 1)) / wanted.clamp_min(1e-12), np.nan)
    return _Summary(stock.mean((0, 1)).numpy(), action.mean((0, 1)).numpy(), cost.mean((0, 1)).numpy(), served)


def _wasted(env: InventoryEnv, trace: Trace) -> Tensor:
    """``[T, B, K]``: units that expired, from stocks and demand by the rule of the simulator."""
    ages, found = trace.seen["ages"].double(), []
    for stock, demand in zip(trace.inventory[1:, :, env.network.first_store :, 0].double(), trace.demand.double()):
        older, waste = expire(ages, demand)
        ages = torch.cat((older[..., :-1], (stock - older.sum(-1))[..., None]), -1)
        found.append(waste)
    return torch.stack(found)


def _draw_network(axis: Any, env: InventoryEnv, summary: _Summary) -> None:
    """Every node at the height of its row; columns are stages."""
    net = env.network
    last = net.echelons + (net.warehouses > 0) + 1
    stages = [*range(1, net.echelons + 1), *[net.echelons + 1] * net.warehouses, *[last] * net.stores]
    rows = [net.nodes - 0.5 - node for node in range(net.nodes)]
    axis.set_xlim(-0.15, last + 0.85)
    axis.set_ylim(0, net.nodes)
    axis.axis("off")
    widest = max(float(summary.flow.max()), 1e-9)
    incoming: dict[int, list[str]] = {node: [] for node in range(net.nodes)}
    names = _names(env)
    several = net.warehouses > 1
    colours = [_SENDERS[node % len(_SENDERS)] if several else _STOCK for node in range(net.first_store)]
    colours += [_STOCK] * net.stores
    for edge, (source, target) in enumerate(net.edges):
        flow, lead = float(summary.flow[edge]), net.lead_times[edge]
        start = (0.0, rows[target]) if source < 0 else (stages[source], rows[source])
        stop = (stages[target], rows[target])
        middle = (start[0] + stop[0]) / 2
        path = Path([start, (middle, start[1]), (middle, stop[1]), stop], [Path.MOVETO] + [Path.CURVE4] * 3)
        colour = colours[target if source < 0 else source] if several else _TRANSIT
        style = {"linewidth": 0.4 + 5.0 * flow / widest, "edgecolor": colour, "facecolor": "none"}
        axis.add_patch(PathPatch(path, alpha=0.7 if flow > 0.002 * widest else 0.2, zorder=1, **style))
        if source < 0:
            axis.plot([0.0], [rows[target]], marker="s", markersize=5, color="#8A8A8A", zorder=3)
        sender = "supplier" if source < 0 else names[source].replace("arehouse ", "").replace("chelon ", "")
        incoming[target].append(f"{sender} {flow:.1f} ({'' if 'lead_time' in env.static else '≤ '}{lead})")
    size = max(5.0, 11.0 - 0.25 * net.nodes)
    for x, y, colour in zip(stages, rows, colours):
        axis.plot(x, y, "o", markersize=size, color=colour, mec="white", zorder=3)
    box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for node, (x, y) in enumerate(zip(stages, rows)):
        aside = node >= net.first_store
        # Upstream the label goes where no line is: above, on the side that the goods do not come from or leave to.
        across = "right" if not aside and (-1, node) in net.edges else "left"
        place = {"ha": across, "va": "center" if aside else "bottom"}
        per_line = 2 if len(incoming[node]) > 2 else 1
        lines = [", ".join(incoming[node][i : i + per_line]) for i in range(0, len(incoming[node]), per_line)]
        text = "\n".join([names[node], *lines])
        axis.text(
            x + 0.11 * aside, y + 0.13 * (not aside), text, fontsize=6.5, linespacing=1.1, bbox=box, zorder=4, **place
        )
    legend = "width and numbers: mean flow per period by sender (lead time)"
    axis.text(0.0, -0.02, legend, transform=axis.transAxes, fontsize=7, color=_GREY, va="top")


def _names(env: InventoryEnv) -> list[str]:
    counts = {"echelon": env.network.echelons, "warehouse": env.network.warehouses, "store": env.network.stores}
    names = [f"{kind} {i + 1}" for kind, count in counts.items() for i in range(count)]
    own = env.task.nodes
    return list(own) if own else names


def _draw_rows(axes: list[Any], env: InventoryEnv, trace: Trace, summary: _Summary, scenario: int, shown: int) -> None:
    net, total = env.network, len(trace.cost)
    first = net.first_store
    inventory = trace.inventory[-shown - 1 : -1, scenario].double().numpy()
    demand = trace.demand[-shown:, scenario].double().numpy()
    offset = env.first_week + (env.task.demand.history if isinstance(env.task.demand, Recorded) else 0)
    time = np.arange(total - shown, total) + offset
    edges = np.append(time - 0.5, time[-1] + 0.5)
    names = _names(env)
    for node, axis in enumerate(axes):
        on_hand, pipeline = inventory[:, node, 0], inventory[:, node, 1:].sum(1)
        held = np.maximum(on_hand, 0.0)
        axis.stairs(held, edges, fill=True, color=_STOCK, alpha=0.75, linewidth=0)
        axis.stairs(held + pipeline, edges, baseline=held, fill=True, color=_TRANSIT, alpha=0.35, linewidth=0)
        summit, depth = (held + pipeline).max(), 0.0
        if node >= first:
            wanted = demand[:, node - first]
            axis.stairs(wanted, edges, baseline=None, color=_DEMAND, linewidth=0.7)
            missed = np.maximum(wanted - on_hand, 0.0)  # lost now, or waiting at the end of the period
            axis.bar(time, -missed, width=0.9, color=_MISSED)
            depth, summit = missed.max(), max(summit, wanted.max())
        axis.set_ylim(-1.08 * depth, 1.08 * max(summit, 1e-9))
        axis.set_xlim(time[0] - 0.5, time[-1] + 0.5)
        axis.axhline(0.0, color="#8A8A8A", linewidth=0.6)
        axis.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        axis.tick_params(length=2, labelsize=6.5, labelbottom=node == net.nodes - 1)
        axis.spines["bottom"].set_visible(False)
        if time[0] < env.ignore + offset:
            axis.axvspan(edges[0], env.ignore + offset - 0.5, color="#8A8A8A", alpha=0.12, linewidth=0, zorder=0)
        kind = "cost" if summary.cost[node] >= 0 else "profit"
        label = f"end stock {summary.stock[node]:.1f}   {kind} {abs(summary.cost[node]):.2f}"
        if node >= first:
            label += f"\nserved at once {100 * summary.served[node - first]:.1f} %"
        axis.text(
            1.012, 0.5, f"{names[node]}\n{label}", transform=axis.transAxes, va="center", fontsize=6.5, linespacing=1.15
        )
    recorded = env.task.demand if isinstance(env.task.demand, Recorded) else None
    axes[-1].set_xlabel("period" if recorded is None else "week" if recorded.step_days == 7 else "day", labelpad=1)


def _legend(figure: Figure, height: float, env: InventoryEnv, warm: bool) -> None:
    missed = "lost sales" if env.task.lost else "backlog"
    entries = [(_STOCK, 0.75, "on hand"), (_TRANSIT, 0.35, "on the way here"), (_MISSED, 1.0, missed)]
    handles: list[Any] = [mpl.patches.Patch(color=color, alpha=alpha, linewidth=0) for color, alpha, _ in entries]
    handles.append(mpl.lines.Line2D([], [], color=_DEMAND, linewidth=0.8))
    labels = [*(label for _, _, label in entries), "demand"]
    if warm:
        handles.append(mpl.patches.Patch(color="#8A8A8A", alpha=0.12, linewidth=0))
        labels.append("warm-up")
    figure.legend(
        handles, labels, loc="upper right", bbox_to_anchor=(0.985, 1 - 0.28 / height), ncols=5, frameon=False,
        fontsize=7, handlelength=1.2, columnspacing=1.2, borderaxespad=0,
    )  # fmt: skip
