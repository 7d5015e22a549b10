"""The page and the figure of the off-policy curves, from whatever runs there are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ccrl.experiment.others import read_others
from ccrl.stats import holm, t_interval
from ccrl.stats.student import t_cdf, t_quantile

__all__ = ["Run", "difference", "figure", "page", "planned", "published", "runs_of", "verdict"]

Array = NDArray[np.float64]
AT = 100_000
"""Returns are compared at this step."""
COMPARED = {
    ("HalfCheetah-v5", "sac"): ("sac", "HalfCheetah-v4"), ("HalfCheetah-v5", "sb3:sac"): ("sac", "HalfCheetah-v4"),
    ("HalfCheetah-v5", "crossq"): ("crossq", "HalfCheetah-v4"), ("Hopper-v5", "sac"): ("sac", "Hopper-v4"),
    ("Walker2d-v5", "sac"): ("sac", "Walker2d-v4"),
}  # fmt: skip
"""Which published curves an agent's runs stand beside."""
PAIRS = (
    ("HalfCheetah-v5", "sac", "sb3:sac"), ("HalfCheetah-v5", "td3", "sac"), ("HalfCheetah-v5", "crossq", "sac"),
    ("Hopper-v5", "mdpo_off_policy tsallis=1.0", "sac"), ("Hopper-v5", "mdpo_off_policy tsallis=1.4", "sac"),
    ("Hopper-v5", "mdpo_off_policy tsallis=1.4", "mdpo_off_policy tsallis=1.0"),
)  # fmt: skip
"""Comparisons of our own runs: task, first, second."""


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

    @property
    def last(self) -> float:
        """The return at ``AT`` steps."""
        return float(np.interp(AT, self.steps, self.returns))


Published = dict[tuple[str, str], list[tuple[Array, Array]]]
"""``(agent, env)`` to the steps and returns of every seed."""


def planned(path: Path | None = None) -> list[tuple[str, str, int]]:
    """``env, agent, seed`` of every run of the study."""
    spec = yaml.safe_load((path or Path(__file__).with_name("study.yaml")).read_text(encoding="utf-8"))
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
    """The rule of the page, on returns at ``AT`` steps."""
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


def difference(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """``mean(x) - mean(y)`` with Welch's 95 % interval and p value, degrees of freedom rounded down."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    parts = [v.var(ddof=1) / len(v) for v in (a, b)]
    error = math.sqrt(sum(parts))
    mean = float(a.mean() - b.mean())
    if error == 0.0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    df = max(1, int(sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (a, b)))))
    half = t_quantile(0.975, df) * error
    return mean, mean - half, mean + half, 2 * t_cdf(-abs(mean) / error, df)


HEAD = """# Off-policy agents: learning curves

SAC, TD3, CrossQ and off-policy MDPO over 100,000 environment steps, the mean of ten deterministic episodes every
5,000; settings in [study.yaml](../scripts/studies/offpolicy/study.yaml), which are the agents' defaults but for
warm-up and widths named there. Pages of the methods: [sac](sac.md), [td3](td3.md), [crossq](crossq.md),
[mdpo_off_policy](mdpo_off_policy.md).

    python scripts/benchmark.py --study scripts/studies/offpolicy/study.yaml --out results/offpolicy
    python scripts/studies/offpolicy results/offpolicy

The first command trains, goes on where it was stopped, and takes some hours on one core; the second writes [every
evaluation](figures/offpolicy_runs.csv) (with commit, versions, threads, compile mode, processor time), the figure and
this page, from whatever runs there are.

**Published curves.** Ten seeds each of SAC and CrossQ from the raw results that the authors of SimbaV2 publish
(repository `dojeon-ai/SimbaV2`, commit 14fafb2, folder `results`), the [part up to 200,000
steps](figures/offpolicy_published.csv). They are of the **v4** tasks, ours of **v5**: HalfCheetah is the same task in
both; Hopper and Walker2d differ (healthy reward, contact and friction), so a difference there may be the task's.
Theirs have points at 99,996 steps (SAC) or 90,000 and 108,000 (CrossQ, interpolated).

**Rule**, written when seed 0 of SAC and TD3 on HalfCheetah had finished and no other run. At 100,000 steps, with
Student's 95 % interval of our mean and the range of the published seeds: *below* or *above* if interval and range do
not meet; *agrees* if our mean lies in the range and the published mean in our interval; *open* otherwise, and while
runs are missing. With three runs the interval is 2.5 standard deviations to each side, so *agrees* excludes little: the
half width is beside it. The difference to the published seeds (Welch's interval) was added after five runs of SAC, and
no verdict hangs on it. Seeds are 0, 1, 2 (SAC on HalfCheetah to 4), nothing was tuned, and no difference between
methods is claimed from so few runs ([protocol](protocol.md)): those below are reported with Welch's interval and Holm's
p value. Ours and SB3's begin with 10,000 uniform steps without updates; how long theirs wait is not known to us.
"""


def _range(values: Iterable[float]) -> str:
    found = list(values)
    return f"{np.mean(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"


def _at(curves: list[tuple[Array, Array]]) -> list[float]:
    return [float(np.interp(AT, steps, returns)) for steps, returns in curves]


def _groups(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Finished runs by task and agent."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda r: r.seed):
        if run.finished:
            found.setdefault((run.env, run.agent), []).append(run)
    return found


def page(runs: list[Run], theirs: Published) -> str:
    """Markdown."""
    groups, plan = _groups(runs), planned()
    keys = list(dict.fromkeys((env, agent) for env, agent, _ in plan))
    picture = "![Learning curves beside the published seeds](figures/offpolicy_curves.png)"
    lines = [
        HEAD, *_missing(runs, plan), "", picture, "", "## At 100,000 steps", "",
        "| task | agent | runs | mean, 95 % | half width | each run | CPU min a run | published: mean (range of 10) "
        "| ours less published, 95 % | verdict |",
        "|---|---|--:|---|--:|---|--:|---|---|---|",
    ]  # fmt: skip
    for key in keys:
        own, count = groups.get(key, []), sum((e, a) == key for e, a, _ in plan)
        beside = _at(theirs[COMPARED[key]]) if key in COMPARED else []
        values = [r.last for r in own]
        lines.append("| " + " | ".join([
            key[0], _name(key[1]), f"{len(own)} of {count}", *_mean(values), ", ".join(f"{v:,.0f}" for v in values),
            _minutes(own), _range(beside) if beside else "none here", _less(values, beside, count),
            verdict(values, beside, count) if beside else "",
        ]) + " |")  # fmt: skip
    return "\n".join([*lines, "", *_comparisons(groups, plan), *_made(runs)]).rstrip() + "\n"


def _name(agent: str) -> str:
    return {"crossq": "CrossQ, critics 512 wide (published: 2,048)", "sb3:sac": "SAC of SB3"}.get(agent, f"`{agent}`")


def _mean(values: list[float]) -> list[str]:
    if len(values) < 3:  # of two runs Student's interval says nothing
        return [f"{np.mean(values):,.0f}" if values else "", ""]
    mean, low, high = (float(x) for x in t_interval(values))
    return [f"{mean:,.0f} [{low:,.0f}, {high:,.0f}]", f"{(high - low) / 2:,.0f}"]


def _less(values: list[float], beside: list[float], count: int) -> str:
    if len(values) < max(3, count) or not beside:
        return ""
    mean, low, high, _ = difference(values, beside)
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


def _comparisons(groups: dict[tuple[str, str], list[Run]], plan: list[tuple[str, str, int]]) -> list[str]:
    found = []
    for env, first, second in PAIRS:
        x, y = ([r.last for r in groups.get((env, agent), [])] for agent in (first, second))
        whole = all(len(v) == sum((e, a) == (env, n) for e, a, _ in plan) for v, n in ((x, first), (y, second)))
        if len(x) > 1 and len(y) > 1 and whole:
            found.append((env, first, second, len(x), len(y), difference(x, y)))
    head = ["## Beside one another", ""]
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


def figure(runs: list[Run], theirs: Published) -> Figure:
    """A panel per task and published agent: every run thin, means of finished groups thick, published seeds grey."""
    panels = (
        ("HalfCheetah-v5", ("sac", "sb3:sac"), ("sac", "HalfCheetah-v4")),
        ("HalfCheetah-v5", ("crossq", "td3"), ("crossq", "HalfCheetah-v4")),
        ("Hopper-v5", ("sac", "mdpo_off_policy tsallis=1.0", "mdpo_off_policy tsallis=1.4"), ("sac", "Hopper-v4")),
        ("Walker2d-v5", ("sac",), ("sac", "Walker2d-v4")),
    )
    out = Figure(figsize=(11, 7.5), layout="constrained")
    axes = out.subplots(2, 2).flatten()
    for axis, (env, names, beside) in zip(axes, panels):
        for i, (steps, returns) in enumerate(theirs.get(beside, [])):
            label = f"{beside[0]}, ten published seeds ({beside[1].rpartition('-')[2]})" if i == 0 else None
            axis.plot(steps, returns, color="0.7", linewidth=0.8, marker=".", label=label)
        for color, name in enumerate(names):
            own = [r for r in runs if (r.env, r.agent) == (env, name)]
            for run in own:
                axis.plot(run.steps, run.returns, f"C{color}", linewidth=0.8, alpha=0.5)
            done = [r for r in own if r.finished]
            if done:
                mean = np.mean([np.interp(done[0].steps, r.steps, r.returns) for r in done], axis=0)
                axis.plot(done[0].steps, mean, f"C{color}", linewidth=2, label=f"{name}, {len(done)} finished")
            elif own:
                axis.plot([], [], f"C{color}", label=f"{name}, not finished")
        axis.set(title=env, xlim=(0, 1.06 * AT), xlabel="environment steps")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left")
    axes[0].set_ylabel("return, deterministic")
    axes[2].set_ylabel("return, deterministic")
    out.text(0.005, 0.002, "python scripts/studies/offpolicy results/offpolicy", fontsize=5, color="0.4")
    return out
