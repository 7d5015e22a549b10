"""Pages of the offline studies: a value per seed, acceptance lines, pictures."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ccrl.stats import paired_t, score_after_evaluations
from scripts.studies.offline.layout import Page, groups, line, mean, seeds, spread
from scripts.studies.tables import Rows

__all__ = ["REPORTS"]


# -- CDSA -------------------------------------------------------------------------------------------------------------


def score(rows: Rows) -> list[Rows]:
    """A learned score: its loss above the least one, its relative error at three levels."""
    table: Rows = [
        {"sigma": sigma, "relative error": seeds(part, "error"), "loss": seeds(part, "loss"),
         "least loss": part[0]["least loss"]}
        for (sigma,), part in groups(rows, "sigma").items()
    ]  # fmt: skip
    near = [r for r in rows if r["sigma"] == 0.5]
    return [table, [
        line("loss within .08 of the least", (abs(r["loss"] - r["least loss"]) < 0.08 for r in near),
             seeds(near, "loss")),
        line("relative error below .12 at sigma .5", (r["error"] < 0.12 for r in near), seeds(near, "error")),
    ]]  # fmt: skip


def corridor(rows: Rows) -> list[Rows]:
    """Strengths beside the hazard."""
    table: Rows = []
    for (density, who, k_a, k_s), part in groups(rows, "density", "controller", "k_a", "k_s").items():
        name = who if who != "corrected" else f"k_a {k_a:g}" if k_a else f"k_s {k_s:g}"
        table.append({"density of": density, "controller": name}
                     | {c: seeds(part, c) for c in ("return", "VaR 5%", "CVaR 5%", "hazard steps")})  # fmt: skip
    data = [r for r in rows if r["density"] == "data"]
    good = [r for r in data if r["k_a"] == 0 and r["k_s"] in (0.05, 0.1)]
    base = [r for r in data if r["controller"] == "base"]
    ends = [r for r in data if r["k_s"] == 2.0]
    lines = [
        line("k_s .05 and .1: mean return >= 8", (r["return"] >= 8 for r in good), seeds(good, "return")),
        line("k_s .05 and .1: VaR 5% >= 8", (r["VaR 5%"] >= 8 for r in good), seeds(good, "VaR 5%")),
        line("k_s .05 and .1: no hazard steps", (r["hazard steps"] == 0 for r in good), seeds(good, "hazard steps")),
        line("base: VaR 5% <= -20", (r["VaR 5%"] <= -20 for r in base), seeds(base, "VaR 5%")),
        line("k_s 2 returns less than k_s .05 (inverted U)",
             (e["return"] < g["return"] for e, g in zip(ends, (r for r in good if r["k_s"] == 0.05))),
             seeds(ends, "return")),
    ]  # fmt: skip
    return [table, lines]


def strengths(rows: Rows) -> list[Rows]:
    """Sweeps over the strengths of each part."""
    table: Rows = []
    lines: Rows = []
    for (base,), part in groups(rows, "base").items():
        for which, other in (("k_a", "k_s"), ("k_s", "k_a")):
            by = {k[0]: p for k, p in groups([r for r in part if r[other] == 0.0], which).items()}
            table += [
                {"base": base, "part": "action" if which == "k_a" else "state", which[0]: k,
                 **{c: f"{mean(p, c):.4g} ({seeds(p, c)})" for c in ("return", "VaR 5%", "CVaR 5%")}}
                for k, p in by.items()
            ]  # fmt: skip
            runs = list(by.values())
            means = [mean(p, "return") for p in runs]
            best = int(np.argmax(means))
            gain = [f"{means[best] - means[k]:.4g}" for k in (0, -1)]
            if len(runs[0]) > 1:
                returns = [[r["return"] for r in p] for p in runs]
                pairs = (paired_t(returns[best], returns[end]) for end in (0, -1))
                gain = [f"{p[0]:.4g} [{p[1]:.4g}, {p[2]:.4g}]" for p in pairs]
            lines.append(line(
                f"{base}, {which}: inverted U (the best strength is neither 0 nor the largest)",
                [0 < best < len(means) - 1],
                f"best at {list(by)[best]:g}: {means[best]:.4g}; less that at 0: {gain[0]}, at the largest: {gain[1]}",
            ))  # fmt: skip
            tail = [mean(p, "VaR 5%") for p in by.values()]
            lines.append(line(f"{base}, {which}: some strength raises VaR 5%", [max(tail[1:]) > tail[0]],
                              f"{tail[0]:.4g} to {max(tail[1:]):.4g}"))  # fmt: skip
    return [table, lines]


def strengths_figure(rows: Rows) -> Figure:
    """Return, VaR and CVaR over strengths, seeds thin."""
    page = Figure(figsize=(11, 6), layout="constrained")
    axes = page.subplots(2, 3, sharex="row", sharey="col")
    for i, (which, other, name) in enumerate((("k_a", "k_s", "action part"), ("k_s", "k_a", "state part"))):
        for j, column in enumerate(("return", "VaR 5%", "CVaR 5%")):
            axis = axes[i][j]
            for color, ((base,), part) in enumerate(groups([r for r in rows if r[other] == 0.0], "base").items()):
                for run in groups(part, "seed").values():
                    axis.plot([r[which] for r in run], [r[column] for r in run], f"C{color}", alpha=0.3, linewidth=0.8)
                by = groups(part, which)
                axis.plot([k for (k,) in by], [mean(p, column) for p in by.values()], f"C{color}o-", label=base)
            axis.set(xlabel=f"{which} ({name})", title=column if i == 0 else "")
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    return page


def corridor_figure(rows: Rows) -> Figure:
    """Mean return and its tail over strengths of both parts."""
    page = Figure(figsize=(9, 3.6), layout="constrained")
    axes = page.subplots(1, 2, sharey=True)
    for axis, (which, other) in zip(axes, (("k_s", "k_a"), ("k_a", "k_s"))):
        for color, density in enumerate(("data", "policy")):
            part = [r for r in rows if r["density"] == density and r[other] == 0.0 and r[which] != ""]
            by = groups(part, which)
            for column, style in (("return", "o-"), ("VaR 5%", "v--")):
                axis.plot([k for (k,) in by], [mean(p, column) for p in by.values()], f"C{color}{style}",
                          label=f"{column}, density of the {density}")  # fmt: skip
        axis.set(xlabel=which, title="state part" if which == "k_s" else "action part")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("return")
    axes[0].legend(fontsize=7)
    return page


# -- baselines ---------------------------------------------------------------------------------------------------------

REFERENCE = {
    ("u_maze", "bc"): "19.5 / 18.9", ("u_maze", "td3_bc"): "43.3 / 26.4", ("u_maze", "iql tau .7"): "68.9",
    ("u_maze", "iql"): "96.9 / 64.6", ("pendulum", "bc"): "59.7", ("pendulum", "iql"): "125.7",
    ("pendulum", "td3_bc"): "1000",
}  # fmt: skip
"""Returns per seed of an independent implementation of the same recipe in NumPy and plain PyTorch."""


def short(rows: Rows) -> list[Rows]:
    """Short trainings beside an independent implementation."""
    by = groups(rows, "data", "method")
    table = [
        {"data": d, "method": m, "return": seeds(part, "return"), "independent": REFERENCE[d, m],
         "random": part[0]["random"], "data return": part[0]["data return"],
         "CPU seconds": statistics.median(r["cpu seconds"] for r in part)}
        for (d, m), part in by.items()
    ]  # fmt: skip
    value, clone = by.get(("pendulum", "td3_bc"), []), by.get(("pendulum", "bc"), [])
    lines = [
        *_maze_lines(rows, "u_maze"),
        line("pendulum: TD3+BC >= 500", (r["return"] >= 500 for r in value), seeds(value, "return")),
        line("pendulum: BC <= 150", (r["return"] <= 150 for r in clone), seeds(clone, "return")),
    ]
    return [table, lines]


def _maze_lines(rows: Rows, data: str) -> Rows:
    by = groups([r for r in rows if r["data"] == data], "method")
    cloned, best = by.get(("bc",), []), by.get(("iql",), [])
    return [
        line(f"{data}: IQL >= 2.5 x BC on every seed",
             (i["return"] >= 2.5 * b["return"] for i, b in zip(best, cloned)),
             " / ".join(f"{i['return']:.3g} and {b['return']:.3g}" for i, b in zip(best, cloned))),
        line(f"{data}: BC below random + 10", (b["return"] < b["random"] + 10 for b in cloned),
             seeds(cloned, "return")),
    ]  # fmt: skip


def clones(rows: Rows) -> list[Rows]:
    """BC and IQL on data of both controllers, more seeds."""
    by = groups(rows, "data", "method")
    table = [
        {"data": d, "method": m, "mean return, 95 %": spread(part, "return"), "runs": seeds(part, "return"),
         "random": part[0]["random"]}
        for (d, m), part in by.items()
    ]  # fmt: skip
    return [table, [x for d in dict.fromkeys(d for d, _ in by) for x in _maze_lines(rows, d)]]


def baselines(rows: Rows) -> list[Rows]:
    """Normalised scores, final and best."""
    table: Rows = []
    for (d, m), part in groups(rows, "data", "method").items():
        runs = list(groups(part, "seed").values())
        last = [run[-1] for run in runs]
        best = [max(run, key=lambda r: r["score"]) for run in runs]
        table.append({
            "data": d, "method": m, "final score, 95 %": spread(last, "score"), "final": seeds(last, "score"),
            "best": seeds(best, "score"), "final return": seeds(last, "return"), "data return": part[0]["data return"],
        })  # fmt: skip
    return [table]


def baselines_figure(rows: Rows) -> Figure:
    """Scores over training."""
    kinds = groups(rows, "data")
    page = Figure(figsize=(3.4 * len(kinds), 3.4), layout="constrained")
    axes = page.subplots(1, len(kinds), squeeze=False)[0]
    for axis, ((name,), part) in zip(axes, kinds.items()):
        for color, ((method,), own) in enumerate(groups(part, "method").items()):
            for run in groups(own, "seed").values():
                axis.plot([r["update"] for r in run], [r["score"] for r in run], f"C{color}", alpha=0.3, linewidth=0.8)
            by = groups(own, "update")
            axis.plot([k for (k,) in by], [mean(p, "score") for p in by.values()], f"C{color}", label=method)
        axis.set(title=name, xlabel="updates")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("normalised score")
    axes[0].legend(fontsize=7)
    return page


def online(rows: Rows) -> list[Rows]:
    """Returns over environment steps."""
    table: Rows = []
    for (start,), part in groups(rows, "start").items():
        row: dict[str, Any] = {"start": start, "runs": len(groups(part, "seed"))}
        for (step,), own in groups(part, "step").items():
            row[f"{step:.0f} steps"] = f"{mean(own, 'return'):.4g} ({seeds(own, 'return')})"
        table.append(row)
    return [table]


def online_figure(rows: Rows) -> Figure:
    """Returns over environment steps, seeds thin."""
    page = Figure(figsize=(5, 3.6), layout="constrained")
    axis = page.subplots()
    for color, ((start,), part) in enumerate(groups(rows, "start").items()):
        for run in groups(part, "seed").values():
            axis.plot([r["step"] for r in run], [r["return"] for r in run], f"C{color}", alpha=0.3, linewidth=0.8)
        by = groups(part, "step")
        axis.plot([k for (k,) in by], [mean(p, "return") for p in by.values()], f"C{color}o-", label=start)
    axis.set(xlabel="environment steps", ylabel="return")
    axis.grid(alpha=0.3)
    axis.legend(title="TD3 from", fontsize=7)
    return page


SPENT = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def _curves(rows: Rows) -> dict[str, Any]:
    found = {}
    for (method,), part in groups(rows, "method").items():
        low, high = part[0]["random"], part[0]["expert"]
        returns = np.array([[float(x) for x in r["returns"].split()] for r in part])
        found[method] = score_after_evaluations(100.0 * (returns - low) / (high - low), SPENT[-1])
    return found


def selection(rows: Rows) -> list[Rows]:
    """Scores of the policy chosen after so many online episodes, and every setting's returns."""
    table: Rows = [
        {"method": m, "policies": sum(r["method"] == m for r in rows)}
        | {f"{n} episodes": float(curve[n - 1]) for n in SPENT}
        for m, curve in _curves(rows).items()
    ]
    settings: Rows = [
        {"method": m, "setting": values, "return": seeds(part, "return")}
        for (m, values), part in groups(rows, "method", "values").items()
    ]
    return [table, settings]


def selection_figure(rows: Rows) -> Figure:
    """The same as curves."""
    page = Figure(figsize=(5, 3.6), layout="constrained")
    axis = page.subplots()
    for method, curve in _curves(rows).items():
        axis.plot(np.arange(1, len(curve) + 1), curve, label=method)
    axis.set(xscale="log", xlabel="online episodes spent on choosing", ylabel="normalised score")
    axis.grid(alpha=0.3)
    axis.legend()
    return page


# -- PGD --------------------------------------------------------------------------------------------------------------


def guidance(rows: Rows) -> list[Rows]:
    """Likelihood and dynamics error over strengths."""
    names = ("log pi", "error mean", "error median", "displacement")
    by = groups(rows, "strength")
    table = [{"lam": k} | {n: seeds(part, n) for n in names} for (k,), part in by.items()]
    runs = [[r for r in run if r["strength"] != "data"] for run in groups(rows, "seed").values()]
    at = [{r["strength"]: r for r in run} for run in runs]
    lines = [
        line("log pi rises strictly with lam", (
            all(a["log pi"] < b["log pi"] for a, b in itertools.pairwise(run)) for run in runs), ""),
        line("gain of log pi >= .4 at lam 1", (a[1.0]["log pi"] - a[0.0]["log pi"] >= 0.4 for a in at),
             " / ".join(f"{a[1.0]['log pi'] - a[0.0]['log pi']:.3g}" for a in at)),
        line("mean error at lam 1 <= 1.5 x that at 0", (
            a[1.0]["error mean"] <= 1.5 * a[0.0]["error mean"] for a in at),
            " / ".join(f"{a[1.0]['error mean'] / a[0.0]['error mean']:.3g}" for a in at)),
    ]  # fmt: skip
    return [table, lines]


def made_rows(rows: Rows) -> list[Rows]:
    """Returns on rows of each kind, and paired differences."""
    by = groups(rows, "base", "rows")
    table = [
        {"base": b, "rows": r, "return, 95 %": spread(part, "return"), "runs": seeds(part, "return")}
        for (b, r), part in by.items()
    ]
    pairs: Rows = []
    for base in dict.fromkeys(b for b, _ in by):
        for other in ("real", "unguided", "model"):
            mine = {r["seed"]: r["return"] for r in by.get((base, "guided"), [])}
            theirs = {r["seed"]: r["return"] for r in by.get((base, other), [])}
            common = sorted(mine.keys() & theirs.keys())
            if len(common) > 1:
                middle, low, high = paired_t([mine[s] for s in common], [theirs[s] for s in common])[:3]
                verdict = "guided is better" if low > 0 else "guided is worse" if high < 0 else "open"
                pairs.append({"base": base, "guided less": other, "mean": float(middle), "95 % from": float(low),
                              "to": float(high), "verdict": verdict})  # fmt: skip
    return [table, pairs] if pairs else [table]


def rows_figure(rows: Rows) -> Figure:
    """A dot per run."""
    kinds = groups(rows, "base")
    page = Figure(figsize=(4 * len(kinds), 3.4), layout="constrained")
    axes = page.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axis, ((base,), part) in zip(axes, kinds.items()):
        by = groups(part, "rows")
        for x, own in enumerate(by.values()):
            axis.plot([x] * len(own), [r["return"] for r in own], "o", color="C0", alpha=0.6)
            axis.plot([x - 0.2, x + 0.2], [mean(own, "return")] * 2, "k-")
        axis.set_xticks(range(len(by)), [k for (k,) in by])
        axis.set(title=base)
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("return on the U-maze")
    return page


def guidance_figure(rows: Rows) -> Figure:
    """Likelihood against error, a line per seed."""
    page = Figure(figsize=(8, 3.4), layout="constrained")
    axes = page.subplots(1, 2)
    for run in groups(rows, "seed").values():
        kept = [r for r in run if r["strength"] != "data"]
        x = range(len(kept))
        axes[0].plot(x, [r["log pi"] for r in kept], "C0o-", alpha=0.6)
        axes[1].plot(x, [r["error mean"] for r in kept], "C1o-", alpha=0.6)
        axes[1].plot(x, [r["error median"] for r in kept], "C2v--", alpha=0.6)
        for axis in axes:
            axis.set_xticks(list(x), [f"{r['strength']:g}" for r in kept])
    data = [r["log pi"] for r in rows if r["strength"] == "data"]
    if data and all(map(math.isfinite, data)):
        axes[0].axhline(statistics.fmean(data), color="0.5", linestyle=":", label="rows of the data")
        axes[0].legend()
    axes[0].set(xlabel="lam", title="mean log pi, without its constant")
    axes[1].set(xlabel="lam", title="dynamics error: mean (o), median (v)", yscale="log")
    return page


REPORTS: dict[str, Page] = {
    "score": Page(score),
    "corridor": Page(corridor, corridor_figure, "means of {n} seeds"), "short": Page(short),
    "clones": Page(clones),
    "guidance": Page(guidance, guidance_figure, "{n} seeds, a line each"),
    "maze": Page(strengths, strengths_figure), "rows": Page(made_rows, rows_figure, "{n} seeds, a dot each; bar: mean"),
    "baselines": Page(baselines, baselines_figure), "hopper": Page(strengths, strengths_figure),
    "hopper_far": Page(strengths, strengths_figure), "online": Page(online, online_figure),
    "selection": Page(selection, selection_figure, "every setting with {n} seeds"),
}  # fmt: skip
