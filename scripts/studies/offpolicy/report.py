"""A page and a figure of learning curves, from whatever runs there are; ``pages.py`` says of which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ccrl.experiment.others import read_others
from ccrl.stats import holm, t_interval, welch_t

__all__ = ["Page", "Panel", "Run", "figure", "page", "planned", "published", "runs_of", "verdict"]

Array = NDArray[np.float64]
Published = dict[tuple[str, str], list[tuple[Array, Array]]]
"""``(agent, env)`` to the steps and returns of every seed."""


@dataclass(frozen=True)
class Panel:
    """One panel of the figure: agents on a task, and perhaps the published curves behind them."""

    env: str
    agents: tuple[str, ...]
    beside: tuple[str, str] | None = None
    """A key of ``Published``."""


@dataclass(frozen=True)
class Page:
    """What a page is about."""

    name: str
    """Numbers are in NAME_runs.csv, the figure is NAME_curves.png."""
    file: str
    """The page's file name."""
    spec: str
    """The study's file name, in this folder."""
    head: str
    """The page up to the list of runs."""
    at: int
    """Runs are compared at this step."""
    panels: tuple[Panel, ...]
    pairs: tuple[tuple[str, str, str], ...]
    """Comparisons of our own runs: task, first, second."""
    since: int | None = None
    """Runs are compared by the mean of their evaluations from this step on; None: by the return at ``at``."""
    least: float | None = None
    """The page counts runs that reach this return."""
    compared: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """Which published curves an agent's runs stand beside: (task, agent) to a key of ``Published``."""
    names: Mapping[str, str] = field(default_factory=dict)
    """How agents are called in the table where not by their own name."""

    def score(self, run: Run) -> float:
        """What runs are compared by."""
        if self.since is not None:
            return float(run.returns[run.steps >= self.since].mean())
        return float(np.interp(self.at, run.steps, run.returns))

    def planned(self) -> list[tuple[str, str, int]]:
        """``env, agent, seed`` of every run of the study."""
        return planned(Path(__file__).with_name(self.spec))


@dataclass(frozen=True)
class Run:
    """One run's evaluations: ``steps [T]``, ``returns [T]``."""

    env: str
    agent: str
    seed: int
    steps: Array
    returns: Array
    finished: bool
    cpu_seconds: float = math.nan
    commit: str = ""
    made: str = ""
    """Version of PyTorch, threads, whether updates were compiled."""


def planned(path: Path) -> list[tuple[str, str, int]]:
    """``env, agent, seed`` of every run of the study."""
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for entry in spec["entries"]:
        ((name, values),) = entry.get("sweep", {"": [""]}).items()
        labels = [f" {name}={value}" if name else "" for value in values]
        found += [
            (env, agent + label, seed)
            for env in entry["envs"] for agent in entry["agents"] for label in labels
            for seed in entry.get("seeds", spec["seeds"])
        ]  # fmt: skip
    return found


def runs_of(rows: Sequence[dict[str, str]]) -> list[Run]:
    """Runs of the table of evaluations, in its order."""
    by: dict[tuple[str, str, int], list[dict[str, str]]] = {}
    for row in rows:
        by.setdefault((row["env"], row["agent"], int(row["seed"])), []).append(row)
    found = []
    for key, part in by.items():
        one = part[0]
        made = f"PyTorch {one['torch']}, {one['threads']} thread, compile {one['compile'] or 'none'}"
        found.append(Run(
            *key, np.array([float(r["step"]) for r in part]), np.array([float(r["return"]) for r in part]),
            one["finished"] == "1", float(one["cpu_seconds"] or "nan"), one["commit"], made,
        ))  # fmt: skip
    return found


def published(path: Path) -> Published:
    """The curves of others."""
    found: Published = {}
    for env, agent, _, steps, returns in read_others(path):
        found.setdefault((agent, env), []).append((steps, returns))
    return found


def verdict(ours: Sequence[float], theirs: Sequence[float], planned_runs: int) -> str:
    """The rule of the page, on what runs are compared by."""
    if len(ours) < planned_runs:
        return f"open ({len(ours)} of {planned_runs} runs)"
    if planned_runs < 3:
        return "two runs: no interval"
    mean, low, high = (float(x) for x in t_interval(ours))
    least, most = min(theirs), max(theirs)
    if high < least:
        return "below"
    if low > most:
        return "above"
    inside = least <= mean <= most and low <= float(np.mean(theirs)) <= high
    return "agrees" if inside else "open"


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{np.mean(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"


def _at(curves: list[tuple[Array, Array]], at: int) -> list[float]:
    return [float(np.interp(at, steps, returns)) for steps, returns in curves]


def _groups(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Finished runs by task and agent."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda r: r.seed):
        if run.finished:
            found.setdefault((run.env, run.agent), []).append(run)
    return found


def page(about: Page, runs: list[Run], theirs: Published) -> str:
    """Markdown."""
    groups, plan = _groups(runs), about.planned()
    keys = list(dict.fromkeys((env, agent) for env, agent, _ in plan))
    what = f"At {about.at:,} steps" if about.since is None else f"Mean of the evaluations from {about.since:,} steps on"
    columns = ["task", "agent", "runs", "mean, 95 %", "half width", "each run", "CPU min a run"]
    aligned = ["---", "---", "--:", "---", "--:", "---", "--:"]
    if about.least is not None:
        columns.append(f"at least {about.least:g}")
        aligned.append("--:")
    if about.compared:
        columns += ["published: mean (range of 10)", "ours less published, 95 %", "verdict"]
        aligned += ["---"] * 3
    lines = [
        about.head, *_missing(runs, plan), "", f"![Learning curves](figures/{about.name}_curves.png)", "",
        "Thin: runs. Thick: the mean of finished ones, from five on with Student's 95 % interval at every evaluation.",
        "", f"## {what}", "", f"| {' | '.join(columns)} |", f"|{'|'.join(aligned)}|",
    ]  # fmt: skip
    for key in keys:
        own, count = groups.get(key, []), sum((e, a) == key for e, a, _ in plan)
        values = [about.score(r) for r in own]
        row = [
            key[0], about.names.get(key[1], f"`{key[1]}`"), f"{len(own)} of {count}", *_mean(values),
            ", ".join(f"{v:,.0f}" for v in values), _minutes(own),
        ]  # fmt: skip
        if about.least is not None:
            row.append(f"{sum(v >= about.least for v in values)} of {len(values)}" if values else "")
        if key in about.compared:
            beside = _at(theirs[about.compared[key]], about.at)
            row += [_range(beside), _less(values, beside, count), verdict(values, beside, count)]
        elif about.compared:
            row += ["none here", "", ""]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([*lines, "", *_comparisons(about, groups, plan), *_made(runs)]).rstrip() + "\n"


def _mean(values: list[float]) -> list[str]:
    if len(values) < 3:  # of two runs Student's interval says nothing
        return [f"{np.mean(values):,.0f}" if values else "", ""]
    mean, low, high = (float(x) for x in t_interval(values))
    return [f"{mean:,.0f} [{low:,.0f}, {high:,.0f}]", f"{(high - low) / 2:,.0f}"]


def _less(values: list[float], beside: list[float], count: int) -> str:
    if len(values) < max(3, count) or not beside:
        return ""
    mean, low, high, _ = welch_t(values, beside)
    return f"{mean:,.0f} [{low:,.0f}, {high:,.0f}]"


def _minutes(runs: list[Run]) -> str:
    known = [r.cpu_seconds / 60 for r in runs if math.isfinite(r.cpu_seconds)]
    return f"{np.median(known):.1f}" if known else ""


def _missing(runs: list[Run], plan: list[tuple[str, str, int]]) -> list[str]:
    done = {(r.env, r.agent, r.seed) for r in runs if r.finished}
    begun = {(r.env, r.agent, r.seed): r.steps[-1] for r in runs if not r.finished}
    left = [key for key in plan if key not in done]
    if not left:
        return [f"Every one of the {len(plan)} runs was made."]
    lines = [f"**{len(plan) - len(left)} of {len(plan)} runs are finished.** Not yet:", ""]
    for env, agent in dict.fromkeys((e, a) for e, a, _ in left):
        seeds = [
            f"{s} (at {begun[env, agent, s]:,.0f} steps)" if (env, agent, s) in begun else str(s)
            for e, a, s in left if (e, a) == (env, agent)
        ]  # fmt: skip
        lines.append(f"* {agent} on {env}: seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}")
    return lines


def _comparisons(about: Page, groups: dict[tuple[str, str], list[Run]], plan: list[tuple[str, str, int]]) -> list[str]:
    found = []
    for env, first, second in about.pairs:
        x, y = ([about.score(r) for r in groups.get((env, agent), [])] for agent in (first, second))
        whole = all(len(v) == sum((e, a) == (env, n) for e, a, _ in plan) for v, n in ((x, first), (y, second)))
        if len(x) > 1 and len(y) > 1 and whole:
            found.append((env, first, second, len(x), len(y), welch_t(x, y)))
    head = ["## Beside one another", ""]
    if not about.pairs:
        return []
    if not found:
        return [*head, "No pair of agents has all its runs yet.", ""]
    lines = [*head, "| task | first | second | runs | first - second, 95 % | p, Holm |", "|---|---|---|--:|---|--:|"]
    adjusted = holm([f[-1][3] for f in found])
    for (env, first, second, n, m, (mean, low, high, _)), p in zip(found, adjusted):
        lines.append(f"| {env} | `{first}` | `{second}` | {n}, {m} | {mean:,.0f} [{low:,.0f}, {high:,.0f}] | {p:.2g} |")
    return [*lines, ""]


def _made(runs: list[Run]) -> list[str]:
    """What the runs were made by."""
    made = sorted({r.made for r in runs})
    commits = sorted({r.commit for r in runs if r.commit})
    return ["Runs were made by " + "; ".join(made) + "; commits " + ", ".join(commits) + "."] if runs else []


def figure(about: Page, runs: list[Run], theirs: Published) -> Figure:
    """Every run thin, means of finished groups thick, published seeds grey."""
    columns = min(2, len(about.panels))
    rows = -(-len(about.panels) // columns)
    out = Figure(figsize=(5.5 * columns if columns > 1 else 7.5, 3.75 * rows + (columns == 1)), layout="constrained")
    axes = out.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flatten(), about.panels):
        curves = theirs.get(panel.beside, []) if panel.beside is not None else []
        for i, (steps, returns) in enumerate(curves):
            assert panel.beside is not None
            label = f"{panel.beside[0]}, ten published seeds ({panel.beside[1].rpartition('-')[2]})" if i == 0 else None
            near = steps <= 1.06 * about.at  # what is not seen would stretch the other axis
            axis.plot(steps[near], returns[near], color="0.7", linewidth=0.8, label=label)
        for color, name in enumerate(panel.agents):
            _draw(axis, f"C{color}", name, [r for r in runs if (r.env, r.agent) == (panel.env, name)])
        axis.set(title=panel.env, xlim=(0, 1.06 * about.at), xlabel="environment steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("return, deterministic")
    out.text(0.005, 0.002, f"from {about.name}_runs.csv, by python scripts/studies/offpolicy", fontsize=5, color="0.4")
    return out


def _draw(axis: Axes, color: str, name: str, own: list[Run]) -> None:
    for run in own:
        axis.plot(run.steps, run.returns, color, linewidth=0.8, alpha=0.4)
    done = [r for r in own if r.finished]
    if done:
        values = np.array([np.interp(done[0].steps, r.steps, r.returns) for r in done])
        axis.plot(done[0].steps, values.mean(axis=0), color, linewidth=2, label=f"{name}, {len(done)} finished")
        if len(done) >= 5:
            _, low, high = t_interval(values, axis=0)
            axis.fill_between(done[0].steps, low, high, color=color, alpha=0.15, linewidth=0)
    elif own:
        axis.plot([], [], color, label=f"{name}, not finished")
