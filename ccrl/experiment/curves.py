"""From run folders to aligned curves, final scores and the sample-efficiency table."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccrl.experiment.config import flatten
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.others import read_others
from ccrl.experiment.run import RunFolder, find_runs
from ccrl.stats import Interval, iqm, iqm_interval, optimality_gap, sample_efficiency, stratified_bootstrap

__all__ = ["Curve", "Group", "NoCurvesError", "Study", "load_study"]

Array = NDArray[np.float64]
_FINAL = 0.1
_TABLE = (
    "env", "agent", "runs", "final_step", "final_iqm", "final_low", "final_high", "threshold", "reached", "median_steps"
)  # fmt: skip


class NoCurvesError(ValueError):
    """No run has the metric."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run: ``steps [T]`` increasing, ``values [T]``."""

    run: Path
    env: str
    agent: str
    seed: int
    steps: Array
    values: Array


@dataclass(frozen=True)
class Group:
    """The runs of one agent on one env on one grid: ``steps [G]``, ``values [R, G]``.

    The grid is even, from the latest first step of the runs to the earliest last one (their common support); values
    between logged points are interpolated linearly.
    """

    env: str
    agent: str
    seeds: tuple[int, ...]
    steps: Array
    values: Array
    note: str = ""
    """What was cut from the runs, if anything."""

    @cached_property
    def band(self) -> Interval:
        """IQM over the runs and its interval (:func:`ccrl.stats.iqm_interval`), each ``[G]``."""
        return iqm_interval(self.values, axis=0)


@dataclass(frozen=True)
class Study:
    """Curves of agents on envs, and everything that is said about them.

    ``notes`` says in plain words which runs were left out; figures and tables carry it. ``unit`` names, in the
    singular, what curves are drawn against.
    """

    metric: str
    curves: tuple[Curve, ...]
    points: int = 200
    notes: tuple[str, ...] = ()
    unit: str = "step"

    @property
    def envs(self) -> list[str]:
        """Names in alphabetical order."""
        return sorted({curve.env for curve in self.curves})

    @property
    def agents(self) -> list[str]:
        """Names in alphabetical order, numbers in them by value (m=2 before m=10)."""
        return sorted({curve.agent for curve in self.curves}, key=_by_value)

    @property
    def interval(self) -> str:
        """What the intervals of single tasks are, in words: they depend on the number of runs."""
        counts = [len(group.seeds) for group in self.groups.values()]
        names = ["Student's, of the trimmed mean"] if min(counts) < 10 else []
        names += ["percentile bootstrap"] if max(counts) >= 10 else []
        return f"95 % interval ({'; from ten runs on '.join(names)})"

    @property
    def shared_envs(self) -> list[str]:
        """The envs on which every agent has runs: only these enter comparisons across envs."""
        have = {(curve.env, curve.agent) for curve in self.curves}
        return [env for env in self.envs if all((env, agent) in have for agent in self.agents)]

    @cached_property
    def groups(self) -> dict[tuple[str, str], Group]:
        """``(env, agent)`` to the aligned runs, each agent on its own common support."""
        groups = {}
        for env in self.envs:
            for agent in self.agents:
                curves = [curve for curve in self.curves if (curve.env, curve.agent) == (env, agent)]
                if curves:
                    groups[env, agent] = self._align(curves, f"{agent} on {env}")
        return groups

    @cached_property
    def compared(self) -> dict[tuple[str, str], Group]:
        """As ``groups``, but all agents of an env on one grid, so that equal steps are compared."""
        groups = {}
        for env in self.envs:
            curves = [curve for curve in self.curves if curve.env == env]
            whole = self._align(curves, f"comparison of agents on {env}")
            for agent in dict.fromkeys(curve.agent for curve in curves):
                rows = [i for i, curve in enumerate(curves) if curve.agent == agent]
                seeds = tuple(curves[i].seed for i in rows)
                groups[env, agent] = Group(env, agent, seeds, whole.steps, whole.values[rows], whole.note)
        return groups

    def notes_of(self, groups: Mapping[tuple[str, str], Group]) -> list[str]:
        """``notes`` and what was cut in ``groups``."""
        return [*self.notes, *dict.fromkeys(group.note for group in groups.values() if group.note)]

    def final(self, env: str, agent: str) -> Array:
        """Final score of each run ``[R]``: the mean of the last tenth of the compared grid."""
        last = max(1, round(_FINAL * self.points))
        return np.asarray(self.compared[env, agent].values[:, -last:].mean(axis=1))

    def span(self, env: str) -> tuple[float, float]:
        """What normalised scores 0 and 1 mean: the lowest IQM at the start and the highest final IQM of any agent."""
        agents = [agent for agent in self.agents if (env, agent) in self.compared]
        low = min(float(iqm(self.compared[env, agent].values[:, 0])) for agent in agents)
        high = max(float(iqm(self.final(env, agent))) for agent in agents)
        return low, high

    def normalised(self, agent: str) -> list[Array]:
        """Normalised final scores per shared env, ``[R]`` each."""
        scores = []
        for env in self.shared_envs:
            low, high = self.span(env)
            scores.append((self.final(env, agent) - low) / (high - low if high > low else 1.0))
        return scores

    def table(
        self, fractions: Sequence[float] = (0.5, 0.75, 0.9), thresholds: Mapping[str, float] | None = None
    ) -> tuple[str, str]:
        """Final scores and steps to thresholds, as Markdown and as CSV.

        Args:
            fractions: thresholds as fractions of the way from ``span``'s 0 to its 1.
            thresholds: env to one threshold in raw units, used instead there.

        Raises:
            ValueError: a threshold of an env that has no runs.
        """
        if unknown := sorted(set(thresholds or {}) - set(self.envs)):
            raise ValueError(f"thresholds: expected some of {', '.join(self.envs)}; received {', '.join(unknown)}.")
        lines = [
            f"Metric `{self.metric}`. Final: IQM of the runs' means over the last tenth of the {self.unit}s, with its "
            f"{self.interval}. {self.unit.capitalize()}s: median over runs of the first {self.unit} at or "
            "above the threshold (runs that reached it / all runs).",
            "",
        ]
        long: list[list[object]] = []
        for env in self.envs:
            agents = [agent for agent in self.agents if (env, agent) in self.compared]
            low, high = self.span(env)
            marks = [low + f * (high - low) for f in fractions]
            if thresholds and env in thresholds:
                marks = [thresholds[env]]
            steps = self.compared[env, agents[0]].steps
            lines += [
                f"**{env}**, to {steps[-1]:,.0f} {self.unit}s",
                "",
                "| agent | runs | final | " + " | ".join(f"{self.unit}s to {mark:.4g}" for mark in marks) + " |",
                "|---|---|---|" + "---|" * len(marks),
            ]
            for agent in agents:
                group = self.compared[env, agent]
                final = iqm_interval(self.final(env, agent))
                cells = []
                for mark in marks:
                    first = sample_efficiency(group.steps, group.values, mark)
                    median, reached = float(np.median(first)), int(np.isfinite(first).sum())
                    cells.append(f"{short(median) if np.isfinite(median) else 'not reached'} ({reached}/{len(first)})")
                    interval = [float(x) for x in final]
                    long.append([env, agent, len(first), steps[-1], *interval, mark, reached, median])
                interval_text = f"{final.point:.4g} [{final.low:.4g}, {final.high:.4g}]"
                lines.append(f"| {agent} | {len(group.seeds)} | {interval_text} | {' | '.join(cells)} |")
            lines.append("")
        lines += self._aggregate()
        lines += [f"* {note}" for note in self.notes_of(self.compared)]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_TABLE, *long])
        return "\n".join(lines).rstrip() + "\n", text.getvalue()

    def _aggregate(self) -> list[str]:
        shared = self.shared_envs
        if len(shared) < 2:
            return []
        lines = [
            f"**All of {', '.join(shared)}**, normalised scores (0: lowest IQM at the start, 1: best final IQM)",
            "",
            "| agent | IQM | optimality gap |",
            "|---|---|---|",
        ]
        for agent in self.agents:
            scores = self.normalised(agent)
            both = [
                stratified_bootstrap(scores, iqm),
                stratified_bootstrap(scores, lambda x, axis: optimality_gap(x, axis=axis)),
            ]
            cells = " | ".join(f"{x.point:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in both)
            lines.append(f"| {agent} | {cells} |")
        return [*lines, ""]

    def _align(self, curves: Sequence[Curve], what: str) -> Group:
        start = max(curve.steps[0] for curve in curves)
        shortest = min(curves, key=lambda curve: float(curve.steps[-1]))
        end, longest = shortest.steps[-1], max(curve.steps[-1] for curve in curves)
        if end <= start and len(curves) > 1:
            raise ValueError(
                f"{what}: expected runs with {self.unit}s in common; received one that ends at {end:,.0f} "
                f"({shortest.run}) and one that starts at {start:,.0f}. Leave out the short run."
            )
        note = ""
        if longest > 1.02 * end:  # two runs rarely end on the same step: a rollout's length is not news
            note = (
                f"{what}: cut to {short(end)} {self.unit}s, the length of the shortest run ({shortest.agent}, seed "
                f"{shortest.seed}); the longest has {short(longest)}"
            )
        grid = np.linspace(start, end, self.points)
        values = np.stack([np.interp(grid, curve.steps, curve.values) for curve in curves])
        return Group(curves[0].env, curves[0].agent, tuple(curve.seed for curve in curves), grid, values, note)


def load_study(
    paths: Iterable[str | os.PathLike[str]],
    metric: str = "rollout/ep_rew_mean",
    by: str | None = None,
    points: int = 200,
) -> Study:
    """Read ``metric`` of all runs at or below ``paths`` (``progress.csv`` or ``eval.csv``); a path to a CSV file is
    results of others, see :func:`ccrl.experiment.others.read_others`.

    Args:
        by: a key of ``config.yaml`` (``a.b`` for nested ones) whose value splits an agent into several.
        points: of the grid that the runs are compared on.

    Raises:
        NoCurvesError: no run has the metric; the message lists those that are there.
        ValueError: fewer than two points, a path without runs, a file that is damaged, or infinite values.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, the first and the last step; received {points}.")
    places = [Path(path) for path in paths]
    files = [path for path in places if path.suffix == ".csv" and path.is_file()]
    for path in places:
        if path not in files and not find_runs([path]):
            raise ValueError(f"{path}: expected a run, a folder with runs below it or a CSV file, found none of them")
    runs = find_runs([path for path in places if path not in files])
    curves: dict[tuple[str, str, int], Curve] = {}
    notes: list[str] = []
    seen: set[str] = set()
    for run in runs:
        info = run.info
        agent = str(info["agent"])
        if by is not None:
            config = flatten(run.config())
            if by not in config:
                raise ValueError(f"{run.config_file}: expected the key {by}; received {', '.join(config)}.")
            agent = f"{agent} {by.rpartition('.')[2]}={config[by]}"
        steps, values = _read(run, metric, seen)
        if not len(steps):
            notes.append(f"left out {run.path.name}: no values of {metric}")
            continue
        key = (str(info["env"]), agent, int(info["seed"]))
        new, old = Curve(run.path, *key, steps, values), curves.get(key)
        if old is not None:  # the same seed twice is one run, not two: counted twice it would narrow the interval
            new, old = (new, old) if new.steps[-1] > old.steps[-1] else (old, new)
            notes.append(f"left out {old.run.name}: same env, agent and seed as the longer {new.run.name}")
        curves[key] = new
    if runs and not curves:
        files = []  # a figure of a metric that none of our runs has
    for file in files:
        for env, agent, seed, steps, values in read_others(file):
            key = (env, agent, seed)
            if key in curves:
                raise ValueError(f"{file}: {agent} with seed {seed} on {env} is in {curves[key].run} too; rename one")
            curves[key] = Curve(file, *key, steps, values)
        notes.append(f"{file.name}: results from that file, column return")
    if not curves:
        known = f"metrics there: {', '.join(sorted(seen))}" if seen else "no run.json or no rows found"
        raise NoCurvesError(f"expected runs with {metric}; received {len(runs)} runs, none with it ({known}).")
    return Study(metric, tuple(curves[key] for key in sorted(curves)), points, tuple(notes))


def _read(run: RunFolder, metric: str, seen: set[str]) -> tuple[Array, Array]:
    for name in ("progress.csv", "eval.csv"):
        path = run.path / name
        columns = read_columns(path) if path.exists() else {}
        seen |= columns.keys() - {"step"}
        if metric in columns:
            if "step" not in columns or np.isnan(columns["step"]).any():
                raise ValueError(f"{path}: expected a number in the column 'step' of every row; the file is damaged")
            kept = ~np.isnan(columns[metric])
            steps, values = columns["step"][kept], columns[metric][kept]
            if np.isinf(values).any():
                raise ValueError(f"{path}: expected finite numbers in the column {metric}, got "
                                 f"{values[np.isinf(values)][0]} at step {steps[np.isinf(values)][0]:,.0f}; leave that "
                                 "run out, and say so")  # fmt: skip
            # Of several rows with one step the last holds; np.unique keeps the first, so look from the end.
            unique, index = np.unique(steps[::-1], return_index=True)
            if len(unique):
                return unique, values[::-1][index]
    return np.empty(0), np.empty(0)


def _by_value(name: str) -> list[tuple[bool, float, str]]:
    parts = re.split(r"(\d+\.?\d*)", name)
    return [(i % 2 == 1, float(part) if i % 2 else 0.0, part) for i, part in enumerate(parts)]


def short(steps: float) -> str:
    """``1.5M``, ``300k``, ``250``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if steps >= size:
            return f"{steps / size:.3g}{unit}"
    return f"{steps:.3g}"
