"""Pictures of exact optima: the law of the return with the measure that is maximised drawn on it."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.distributional import (
    OCE,
    CVaR,
    Entropic,
    Expected,
    FiniteMDP,
    Law,
    MeanCVaR,
    Objective,
    OptimisticTail,
    StockGrid,
    TargetReturn,
)
from envs.stock import CostBudget, Homeostat, SABChain

__all__ = ["gaps", "objectives"]

BLUE, GREY, RED = "#3B6FB6", "#C9C9C9", "#B03A2E"
Rows = list[dict[str, Any]]


def objectives() -> tuple[Figure, Rows]:
    """One panel per objective: seven of numbers, CVaR at two levels, on the chain of four steps; two of vectors.

    Red is the objective: a line where it is a return, an arrow where it is a distance from minus c_0.
    """
    chain = SABChain()
    mean = chain.optimum(Expected()).law
    panels: list[tuple[str, Objective]] = [
        ("expected return", Expected()),
        ("CVaR at .25", CVaR(0.25)),
        ("CVaR at .5", CVaR(0.5)),
        ("mean-CVaR, half each, .25", MeanCVaR(0.5, 0.25)),
        ("OCE, slopes 4 and .5", OCE(4.0, 0.5)),
        ("entropic, rate 1", Entropic(1.0)),
        ("target return 3", TargetReturn(3.0)),
        ("optimistic tail beyond 6", OptimisticTail(6.0)),
    ]
    page = Figure(figsize=(6.2, 11.0), layout="constrained")
    axes = page.subplots(-(-(len(panels) + 2) // 2), 2).flatten()
    rows: Rows = []
    for axis, (name, objective) in zip(axes, panels):
        found = chain.optimum(objective)
        axis.bar(mean.atoms - 0.18, mean.weights, 0.36, color=GREY, label="best mean")
        axis.bar(found.law.atoms + 0.18, found.law.weights, 0.36, color=BLUE, label="best for the objective")
        start = float(found.start) + 0.0  # type: ignore[arg-type]  # no -0
        if not isinstance(objective, Expected):
            axis.axvline(-start, color="#5A5A5A", linestyle=":", linewidth=1.0, label="minus c_0")
        mark = found.value
        if isinstance(objective, TargetReturn | OptimisticTail):
            # values are distances: the mean one to the target, the mean gain beyond the threshold
            ends = (-start + mark, -start - mark) if mark < 0 else (-start, -start + mark)
            height = 0.5 * float(found.law.weights.max())
            arrow = {"arrowstyle": "<->", "color": RED, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
            axis.annotate("", (ends[0], height), (ends[1], height), arrowprops=arrow)
        else:
            axis.axvline(mark, color=RED, linewidth=1.5, label="the objective")
        axis.set_title(f"{name}: {mark:.3g} ({float(objective.value(*mean)):.3g})", fontsize=9, loc="left")
        if isinstance(objective, CVaR):
            axis.axvspan(-12, -start, color=RED, alpha=0.08)
        if isinstance(objective, OptimisticTail):
            axis.axvspan(-start, 14, color=RED, alpha=0.08)
        axis.set_xlim(-9, 13)
        axis.tick_params(labelsize=8)
        rows.append(
            {"objective": name, "value": mark, "c_0": start, "value of the best mean": float(objective.value(*mean))}
        )
    page.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)

    home_axis, budget_axis = axes[len(panels) : len(panels) + 2]
    home = Homeostat()
    found = home.optimum()
    _scatter(home_axis, _moved(found.law, found.start), f"homeostasis from (-1, -1): {found.value:.3g}")
    home_axis.plot(0, 0, "+", color=RED, markersize=14)
    circle = torch.linspace(0.0, 2.0 * torch.pi, 100)
    home_axis.plot(found.value * circle.cos(), found.value * circle.sin(), color=RED)  # the mean distance
    home_axis.set_xlabel("deviation of food at the end", fontsize=9)
    home_axis.set_ylabel("of water", fontsize=9)
    rows.append({"objective": "homeostasis", "value": found.value, "c_0": str(found.start)})

    budget = CostBudget()
    found = budget.optimum()
    _scatter(budget_axis, found.law, f"earned less 3 x cost beyond 3: {found.value:.3g}")
    budget_axis.axhline(-3.0, color=RED, linewidth=1.5)
    budget_axis.set_xlabel("earned", fontsize=9)
    budget_axis.set_ylabel("minus cost", fontsize=9)
    rows.append({"objective": "soft constraints", "value": found.value, "c_0": str(found.start)})
    page.suptitle(
        "Probability of each return under the exact best policy, chain of four steps,\ngamma 1. Red: the objective; in "
        "brackets what the policy of the best mean has",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    return page, rows


def _moved(law: Law, start: Any) -> Law:
    return Law(law.atoms + torch.tensor(start, dtype=law.atoms.dtype), law.weights)


def _scatter(axis: Any, law: Law, title: str) -> None:
    axis.scatter(law.atoms[:, 0], law.atoms[:, 1], s=500 * law.weights, color=BLUE, alpha=0.6)
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.margins(0.2)


def gaps() -> tuple[Figure, Rows]:
    """Gap of the k-th iterate against its bound: rewards -1, 0, 1 for ever, ``f(x) = -|x|``, whose optimum is known."""
    mdp = FiniteMDP.of([[[(1.0, r, 0)] for r in (-1.0, 0.0, 1.0)]])
    page = Figure(figsize=(6.0, 3.8), layout="constrained")
    axis = page.subplots()
    rows: Rows = []
    for color, gamma in (("C0", 0.5), ("C1", 0.8)):
        reach = 1.0 / (1.0 - gamma)
        stocks = torch.linspace(-4 * reach, 4 * reach, 6401, dtype=torch.float64)
        grid = StockGrid(mdp, stocks, TargetReturn(0.0), gamma, atoms=16)
        exact = -(stocks.abs() - reach).clamp_min(0.0)
        # the ends of the grid, whose successors leave it, are left out
        middle, law, found = stocks.abs() <= 2 * reach, grid.start(), []
        for _ in range(16):
            found.append(float((exact - grid.values(law)[0])[middle].max()))
            law = grid.improve(law).law
        bound = [gamma**k * reach for k in range(16)]
        axis.semilogy(found, "o-", color=color, markersize=4, label=f"gap, gamma {gamma}")
        axis.semilogy(bound, "--", color=color, label=f"bound gamma^k / (1 - gamma), gamma {gamma}")
        rows.append({"objective": f"gap, gamma {gamma}", "value": found[8], "value of the best mean": bound[8]})
    axis.set_xlabel("sweeps k")
    axis.set_ylabel("largest gap to the optimum")
    axis.legend(fontsize=9, frameon=False)
    axis.grid(color="#E6E6E6")
    return page, rows
