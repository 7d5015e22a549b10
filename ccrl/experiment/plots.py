"""Figures of a :class:`~ccrl.experiment.curves.Study`: learning curves, performance profiles, pairwise comparison.

Every function returns a ``matplotlib.figure.Figure`` that belongs to no window; :func:`save` writes PNG and SVG. The
text under a figure says what is drawn, from how many runs, and which command drew it.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ccrl.experiment.curves import Study, short
from ccrl.stats import (
    performance_profile,
    probability_of_improvement_interval,
    stratified_bootstrap,
)

__all__ = ["improvement", "learning_curves", "profile", "save"]

# Okabe and Ito's colours, told apart with all common kinds of colour blindness; yellow is left out (too pale on white).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)))
_GREY = "#5A5A5A"
_LABELS = {
    "rollout/ep_rew_mean": "training return",
    "rollout/ep_len_mean": "training episode length",
    "eval/mean_reward": "evaluation return",
    "eval_stochastic/mean_reward": "evaluation return (sampled actions)",
}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "axes.labelcolor": "#262626",
    "text.color": "#262626",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ccrl",  # the same figure gives the same file
}


def learning_curves(study: Study, title: str | None = None, command: str = "") -> Figure:
    """One panel per env: IQM over the runs and its 95 % interval against steps."""
    groups = study.groups
    envs = study.envs
    columns = min(3, len(envs))
    rows = -(-len(envs) // columns)
    with mpl.rc_context(_STYLE):
        size = (5.6, 3.4) if columns == 1 else (3.6 * columns, 2.6 * rows)
        page = _Page(*size, study, study.notes_of(groups), title, command)
        axes = page.axes(rows, columns)
        for axis, env in zip(axes, envs, strict=False):
            for agent in study.agents:
                group = groups.get((env, agent))
                if group is None:
                    continue
                colour, dash = _look(study, agent)
                axis.fill_between(group.steps, group.band.low, group.band.high, color=colour, alpha=0.18, linewidth=0)
                axis.plot(group.steps, group.band.point, color=colour, linestyle=dash, label=agent)
            axis.set_title(env, loc="left", fontweight="bold")
            axis.set_xlim(left=0)
            axis.margins(x=0)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        for axis in axes[len(envs) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(envs) - columns) : len(envs)]:
            axis.set_xlabel(f"{study.unit}s")
        for axis in axes[::columns]:
            axis.set_ylabel(_LABELS.get(study.metric, study.metric))
        return page.finish(
            f"Line: interquartile mean over {_runs(study)}; band: {study.interval}. Linear interpolation between "
            "logged points."
        )


def profile(study: Study, title: str | None = None, command: str = "") -> Figure:
    """Fraction of runs with a normalised final score above a threshold, with 95 % bootstrap bands."""
    _needs_shared(study)
    scores = {agent: study.normalised(agent) for agent in study.agents}
    pooled = np.concatenate([task for tasks in scores.values() for task in tasks])
    thresholds = np.linspace(min(0.0, float(pooled.min())) - 0.02, max(1.0, float(pooled.max())) + 0.02, 201)
    with mpl.rc_context(_STYLE):
        page = _Page(5.6, 3.4, study, study.notes_of(study.compared), title, command)
        (axis,) = page.axes(1, 1)
        for agent in study.agents:
            statistic = partial(_profile, thresholds=thresholds)
            band = stratified_bootstrap(scores[agent], statistic)
            colour, dash = _look(study, agent)
            axis.fill_between(thresholds, band.low, band.high, color=colour, alpha=0.15, linewidth=0, step="post")
            axis.plot(thresholds, band.point, color=colour, linestyle=dash, label=agent, drawstyle="steps-post")
        axis.set_xlabel("normalised final score τ")
        axis.set_ylabel("fraction of runs above τ")
        axis.set_ylim(-0.02, 1.02)
        axis.margins(x=0)
        return page.finish(
            f"{_runs(study)} on {_tasks(study)}. Score 0: lowest IQM at the start, 1: best final IQM of any agent "
            "(final: mean of the last tenth of the steps). Band: 95 % stratified-bootstrap interval."
        )


def improvement(study: Study, title: str | None = None, command: str = "") -> Figure:
    """Probability that a run of one agent ends above a run of another, for all pairs, with 95 % intervals."""
    _needs_shared(study)
    if len(study.agents) < 2:
        raise ValueError(f"expected at least two agents to compare; received {study.agents}.")
    final = {agent: [study.final(env, agent) for env in study.shared_envs] for agent in study.agents}
    pairs = list(itertools.combinations(study.agents, 2))
    intervals = [probability_of_improvement_interval(final[a], final[b]) for a, b in pairs]
    with mpl.rc_context(_STYLE):
        page = _Page(5.6, 0.7 + 0.34 * len(pairs), study, study.notes_of(study.compared), title, command)
        (axis,) = page.axes(1, 1)
        axis.axvline(0.5, color="#8A8A8A", linewidth=1, zorder=1)
        for row, (interval, (first, _)) in enumerate(zip(intervals, pairs, strict=True)):
            colour = _look(study, first)[0]
            axis.plot(
                [interval.low, interval.high],
                [row, row],
                color=colour,
                linewidth=5,
                alpha=0.3,
                zorder=2,
                solid_capstyle="butt",
            )
            axis.plot([interval.point], [row], "o", color=colour, markersize=6, zorder=3)
        axis.set_yticks(range(len(pairs)), [f"{a} > {b}" for a, b in pairs])
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        axis.set_xlim(-0.03, 1.03)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0, labelcolor="#262626")
        axis.set_xlabel("probability of improvement P(X > Y)")
        return page.finish(
            f"Final scores, {_runs(study)} on {_tasks(study)}; ties count one half. Bar: 95 % stratified-bootstrap "
            "interval. Where it crosses 0.5, the two are not told apart.",
            legend=False,
        )


def save(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    """Write ``stem.png`` (200 dpi) and ``stem.svg``; makes the folder; returns both paths."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    with mpl.rc_context(_STYLE):
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


class _Page:
    """A figure with room in inches for title, legend and caption, whatever the height of the panels."""

    def __init__(
        self, width: float, height: float, study: Study, notes: Sequence[str], title: str | None, command: str
    ) -> None:
        self.width, self.height, self.study, self.notes = width, height, study, notes
        self.title, self.command = title, command
        self.figure = Figure()

    def axes(self, rows: int, columns: int) -> list[Any]:
        return list(self.figure.subplots(rows, columns, squeeze=False).flat)

    def finish(self, caption: str, legend: bool = True) -> Figure:
        wrap = partial(textwrap.wrap, width=int(self.width * 19))
        lines = wrap(caption)
        for note in self.notes:
            lines += wrap(f"{note}.")
        if self.command:
            command = textwrap.wrap(self.command, int(self.width * 15.5), break_on_hyphens=False)
            lines += ["", *command[:2]]
            lines[-1] += " …" if len(command) > 2 else ""
        bottom, top = 0.15 * len(lines) + 0.15, 0.1
        entries = dict[str, Any]()
        for axis in self.figure.axes:
            handles, labels = axis.get_legend_handles_labels()
            entries.update(zip(labels, handles, strict=True))
        entries = {agent: entries[agent] for agent in self.study.agents if agent in entries}
        per_row = max(1, int(self.width / (0.7 + 0.085 * max(map(len, entries), default=1))))
        legend_rows = -(-len(entries) // per_row) if legend and len(entries) > 1 else 0
        total = self.height + bottom + top + 0.2 * legend_rows + (0.3 if self.title else 0.0)
        self.figure.set_size_inches(self.width, total)
        y = 1 - top / total
        if self.title:
            self.figure.text(0.1 / self.width, y, self.title, fontsize=12, fontweight="bold", va="top")
            y -= 0.3 / total
        if legend_rows:
            anchor = (0.1 / self.width, y + 0.02 / total)
            spacing = {
                "borderaxespad": 0,
                "borderpad": 0,
                "handlelength": 1.6,
                "columnspacing": 1.4,
                "labelspacing": 0.25,
            }
            self.figure.legend(
                list(entries.values()), list(entries), loc="upper left", bbox_to_anchor=anchor, ncols=per_row, **spacing
            )
            y -= 0.2 * legend_rows / total
        for i, line in enumerate(reversed(lines)):
            family = "monospace" if self.command and i < len(lines) - lines.index("") - 1 else None
            size = 6 if family else 7
            self.figure.text(
                0.1 / self.width,
                (0.08 + 0.15 * i) / total,
                line,
                fontsize=size,
                color=_GREY,
                family=family,
                va="bottom",
            )
        self.figure.tight_layout(rect=(0, bottom / total, 1, y), pad=0.5, h_pad=1.2, w_pad=1.2)
        return self.figure


def _profile(scores: Any, axis: int, thresholds: Any) -> Any:
    return performance_profile(scores, thresholds, axis)


def _look(study: Study, agent: str) -> tuple[str, Any]:
    index = study.agents.index(agent)
    return _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]


def _runs(study: Study) -> str:
    counts: Sequence[int] = sorted({len(group.seeds) for group in study.groups.values()})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} seed{'' if number == '1' else 's'} per agent and env"


def _tasks(study: Study) -> str:
    shared = study.shared_envs
    return ", ".join(shared) if len(shared) < 7 else f"{len(shared)} envs"


def _needs_shared(study: Study) -> None:
    if not study.shared_envs:
        raise ValueError(f"expected an env on which all agents have runs; received none for {', '.join(study.agents)}.")
