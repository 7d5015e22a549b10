"""The page and the figure, from whatever runs there are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ccrl.stats import holm, iqm_interval, paired_t
from scripts.studies.control.runs import ARMS, EPISODES
from scripts.studies.control.tasks import TASKS, TUNING_SEEDS, Task

__all__ = ["area", "figure", "final", "first", "page"]

Rows = list[dict[str, str]]
Array = NDArray[np.float64]
PAIRS = (
    ("MDPO, normalised", "PPO, normalised"), ("MDPO", "PPO"), ("PPO, normalised", "PPO"), ("MDPO, normalised", "MDPO"),
    ("BPO", "PPO"), ("A2C", "PPO"), ("TRPO, sb3-contrib", "PPO"), ("PPO", "PPO, SB3"),
)  # fmt: skip


def returns(row: dict[str, str]) -> Array:
    return np.array([float(x) for x in row["returns"].split()])


def area(row: dict[str, str]) -> float:
    """Mean return over a run's evaluations."""
    return float(returns(row).mean())


def final(row: dict[str, str]) -> float:
    """Mean return over the last tenth of a run's evaluations."""
    values = returns(row)
    return float(values[-max(1, len(values) // 10) :].mean())


def first(row: dict[str, str], threshold: float) -> float:
    """The step of the first evaluation at or above ``threshold``; inf: none, the run is censored at its end."""
    steps = (float(x) for x in row["at"].split())
    return next((step for step, value in zip(steps, returns(row)) if value >= threshold), math.inf)


def tests(rows: Rows, task: Task) -> dict[str, Rows]:
    """Every arm's test runs in the order of their seeds."""
    mine = [r for r in rows if (r["task"], r["purpose"]) == (task.id, "test")]
    return {arm: sorted((r for r in mine if r["arm"] == arm), key=lambda r: int(r["seed"])) for arm in ARMS}


def page(rows: Rows) -> str:
    """Markdown: a table per task with test runs, the paired comparisons, and what has not been run."""
    done = {name: tests(rows, task) for name, task in TASKS.items()}
    lines = [HEAD, *_missing(rows, done), ""]
    if any(runs for arms in done.values() for runs in arms.values()):
        lines += ["![Steps to the threshold of every run](figures/control_steps.png)", ""]
    for name, task in TASKS.items():
        if any(done[name].values()):
            lines += _table(task, done[name])
    return "\n".join(lines + _comparisons(done)).rstrip() + "\n"


def _missing(rows: Rows, done: dict[str, dict[str, Rows]]) -> list[str]:
    lines = []
    for name, task in TASKS.items():
        have, all_ = sum(map(len, done[name].values())), task.seeds * len(ARMS)
        tuned = sum((r["task"], r["purpose"]) == (name, "tune") for r in rows)
        if have < all_:
            tries = TUNING_SEEDS * sum(len(arm.values) for arm in ARMS.values())
            lines.append(f"* {name}: {have} of {all_} test runs, {tuned} of {tries} tuning runs")
    return ["**Not run yet** (the same command goes on with them):", "", *lines] if lines else ["Every run was made."]


def _table(task: Task, arms: dict[str, Rows]) -> list[str]:
    lines = [
        f"## {task.id}", "",
        f"{task.steps:,} steps, threshold {task.threshold:g}; tuned with {task.tuning_steps:,} steps.", "",
        "| method | setting chosen | n | final return | reached | median steps | steps up to the threshold or the end "
        "| CPU s per 100,000 steps |",
        "|---|---|--:|---|--:|--:|---|--:|",
    ]  # fmt: skip
    for arm, runs in arms.items():
        if not runs:
            lines.append(f"| {arm} | | 0 | | | | | |")
            continue
        steps = np.array([first(r, task.threshold) for r in runs])
        median = float(np.median(steps))
        cpu = np.median([float(r["cpu_seconds"]) / int(r["steps"]) for r in runs]) * 1e5
        value = float(runs[0]["value"])
        tried = ARMS[arm].values
        edge = f" ({'smallest' if value == min(tried) else 'largest'} tried)" if value in (tried[0], tried[-1]) else ""
        lines.append(
            f"| {arm} | {runs[0]['setting']} {value:g}{edge} | {len(runs)} | {_interval(map(final, runs))} | "
            f"{int(np.isfinite(steps).sum())} | {f'{median:,.0f}' if math.isfinite(median) else f'> {task.steps:,}'} | "
            f"{_interval(np.minimum(steps, task.steps))} | {cpu:.1f} |"
        )
    return [*lines, ""]


def _interval(values: Iterable[float]) -> str:
    found = list(values)
    if len(found) < 3:  # of two runs Student's interval says nothing
        return f"{np.mean(found):,.4g}"
    point, low, high = (float(x) for x in iqm_interval(found))
    form = ",.0f" if abs(point) >= 1000 else ".4g"
    return f"{point:{form}} [{low:{form}}, {high:{form}}]"


def _comparisons(done: dict[str, dict[str, Rows]]) -> list[str]:
    found = []
    for name, arms in done.items():
        for better, worse in PAIRS:
            a, b = ({r["seed"]: area(r) for r in arms[arm]} for arm in (better, worse))
            seeds = sorted(a.keys() & b.keys())
            if len(seeds) >= 5:
                pair = paired_t([a[s] for s in seeds], [b[s] for s in seeds])
                found.append((name, better, worse, len(seeds), pair))
    if not found:
        return []
    adjusted = holm([pair.p for *_, pair in found])
    lines = [
        "## Differences", "",
        "Of the mean return over all evaluations of a run, paired by seed, with Student's 95 % interval; p with Holm's "
        f"correction over these {len(found)} comparisons. With five runs a side no difference is claimed, whatever its "
        "p ([protocol](protocol.md)).", "",
        "| task | difference | n | effect | p |", "|---|---|--:|---|--:|",
    ]  # fmt: skip
    for (name, better, worse, n, pair), p in zip(found, adjusted):
        effect = f"{pair.difference:+.3g} [{pair.low:.3g}, {pair.high:.3g}]"
        lines.append(
            f"| {name} | {better} - {worse} | {n} | {effect} | {p:.2g}{' **' if n >= 10 and p < 0.05 else ''} |"
        )
    return [*lines, "", "** p below .05 with at least ten runs a side."]


def figure(rows: Rows, path: Path) -> None:
    """Every run's steps to the threshold: a dot, or an open triangle at the end for a run that did not reach it."""
    done = {name: arms for name, task in TASKS.items() if any((arms := tests(rows, task)).values())}
    if not done:
        return
    canvas = Figure(figsize=(6.2, 0.9 + 1.75 * len(done)), layout="constrained")
    axes = canvas.subplots(len(done), 1, squeeze=False)[:, 0]
    for axis, (name, arms) in zip(axes, done.items()):
        task = TASKS[name]
        for place, runs in enumerate(arms.values()):
            steps = np.array([first(r, task.threshold) for r in runs])
            height = place + np.linspace(-0.25, 0.25, max(len(runs), 1))[: len(runs)]
            held = np.isfinite(steps)
            axis.plot(steps[held] / 1000, height[held], "o", color="#0072B2", ms=4)
            axis.plot(np.full((~held).sum(), task.steps / 1000), height[~held], ">", mfc="none", color="#D55E00", ms=5)
            if 2 * held.sum() > len(runs):
                axis.plot([float(np.median(steps)) / 1000] * 2, [place - 0.35, place + 0.35], color="black", lw=2)
        axis.set_yticks(range(len(arms)), [f"{arm} ({len(runs)})" for arm, runs in arms.items()], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, task.steps / 1000 * 1.05)
        axis.set_title(f"{name}: return {task.threshold:g}", fontsize=10, loc="left")
        axis.grid(axis="x", color="0.9")
    axes[-1].set_xlabel(
        "thousand steps to the threshold: a dot per run, bar: median\n"
        "open triangle: not reached within the budget; (n) runs",
        fontsize=9,
    )
    canvas.savefig(path, dpi=100)


HEAD = f"""# Control methods in one setting

How many environment steps PPO, MDPO, BPO, A2C, and TRPO and PPO of the Stable-Baselines3 family take to a threshold
fixed beforehand, what they reach, and what a step costs. Made by `python scripts/studies/control`; every run is a line
of `docs/figures/control.csv` with its evaluations, versions, thread count and commit, and `--page-only` makes this page
and its figure again from there.

**Equal for all**: our environments (SB3's methods through an adapter), 16 copies, separate actor and critic of two
layers of 64 with tanh, orthogonal start, discount .99; GAE .95 and 2,048 steps per iteration but for A2C, which has
its own 16 x 5 and lambda 1. PPO, SB3's PPO and BPO: ten epochs in minibatches of 256. MDPO: ten full-batch steps,
critic as published; its value clipping at .2, which is in units of normalised rewards, is off where rewards are not
normalised. TRPO: the contributed defaults. One thread, uncompiled.

**Tuning**: on each task each method's step size (TRPO's: the KL bound) is the one of four with the highest mean
return over all evaluations of two runs with the seeds 1000 and 1001; the runs below have the seeds 100, 101, ...

**Scores**: the mean return of {EPISODES} episodes with the most probable actions, at twenty evenly spaced times.
*Steps*: the first evaluation at or above the threshold; a run without one is censored at its end. *Median steps*:
over all runs, censored ones counted as never. *Steps up to the threshold or the end*: IQM with a 95 % interval, which
for censored runs is a lower bound. *Final*: mean of the last tenth of evaluations, IQM with a 95 % interval.
Intervals of ten runs are percentile bootstraps, which cover 93 to 95 % in simulations; of five runs Student's of a
trimmed mean, 84 to 95 % ([statistics](statistics.md)). *CPU seconds*: of training alone, median over runs, on a
machine that others used too; [speed](speed.md) has measurements on a quiet one.
"""
