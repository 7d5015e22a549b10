"""Curves and paths of the study of coverage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("envs")

from ccrl.stats import t_interval
from envs.coverage import Coverage, Groups
from scripts.studies.look import look
from scripts.studies.tables import Rows

__all__ = ["curves", "draw", "interval", "paths"]

NAN = float("nan")


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; of one run the bounds are NaN."""
    if len(values) < 2:
        return values[0], NAN, NAN
    mean, low, high = t_interval(values)
    return float(mean), float(low), float(high)


def curves(rows: Rows, methods: Sequence[str], bounds: list[tuple[str, float, str]], title: str) -> Figure:
    """Mean F over training with 95 % intervals of the mean over seeds."""
    page = Figure(figsize=(6.4, 5.0), layout="constrained")
    axis = page.subplots()
    for i, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        times = sorted({row["iteration"] for row in mine})
        mean, low, high = zip(*(interval([r["value"] for r in mine if r["iteration"] == t]) for t in times))
        axis.plot(times, mean, label=method, **look(i))
        axis.fill_between(times, low, high, color=look(i)["color"], alpha=0.15, lw=0)
    for (name, value, _), style in zip(bounds, ("--", "-")):
        axis.axhline(value, color="#8A8A8A", lw=0.8, ls=style, label=name)
    axis.set_xlabel("batches")
    axis.set_ylabel("mean F of a batch")
    axis.grid(color="#E6E6E6")
    axis.set_title(title, loc="left", fontsize=10)
    page.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return page


def paths(env: Any, shown: list[tuple[str, str, float]], command: str) -> Figure:
    """Paths on the floor of ``env``.

    :param shown: title, cells and value of each.
    """
    columns = min(len(shown), 5)
    page = Figure(figsize=(2.3 * columns, 2.6 * -(-len(shown) // columns) + 0.3), layout="constrained")
    axes = page.subplots(-(-len(shown) // columns), columns, squeeze=False).flatten()
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, cells, value) in zip(axes, shown):
        draw(axis, env, [int(c) for c in cells.split()])
        axis.set_title(f"{title}\nF = {value:.4g}", fontsize=8)
    page.supxlabel(command, x=0.01, ha="left", fontsize=6, color="#5A5A5A")
    return page


def draw(axis: Any, env: Any, path: list[int]) -> None:
    """A path on its floor: grey what its cells are worth alone (of coverage: what can be covered; of items the colour
    of their group), blue what it covered, a black square where it starts."""
    function: Any = env.function
    size = getattr(env.env, "size", None)
    if size is None:
        side = round(function.n**0.5)
        size = (side, side)
    if isinstance(function, Coverage):
        worth = function.weights[: function.n].view(size)
        covered = torch.zeros(len(function.weights), dtype=torch.bool)
        covered[function.footprints[torch.tensor(path)].flatten()] = True
        # the last weight is that of the padding
        shade = covered[: function.n].view(size).float()
    elif isinstance(function, Groups):
        # groups have numbers from 1 on
        worth = (function.members * torch.arange(1, function.members.shape[1] + 1)).amax(1).view(size)
        shade = torch.zeros(size)
    else:
        worth = function.gain(function.initial(function.n), torch.arange(function.n)).view(size)
        shade = torch.zeros(size)
    if isinstance(function, Groups):
        axis.imshow(torch.where(worth > 0, worth, NAN).T, origin="lower", cmap="Set2", alpha=0.8, vmin=1.0, vmax=8.0)
    else:
        axis.imshow(worth.T, origin="lower", cmap="Greys", alpha=0.35, vmin=0.0)
    axis.imshow(torch.where(shade > 0, shade, NAN).T, origin="lower", cmap="Blues", alpha=0.5, vmin=0.0, vmax=1.5)
    xs, ys = [c // size[1] for c in path], [c % size[1] for c in path]
    marks = {"markersize": 2.0, "marker": "o"} if function.n <= 1000 else {}
    axis.plot(xs, ys, "-", color="C3", lw=1.0, **marks)
    axis.plot(xs[0], ys[0], "s", color="black", markersize=4)
    axis.set_xticks([])
    axis.set_yticks([])
