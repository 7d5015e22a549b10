"""Gradient estimators side by side: the same rollouts for all, against the exact gradient.

    python scripts/gradient_lab.py --env lqr --estimators mc gpomdp bpg1 bpg2c --samples 5 20 100 --out figures/lqr
    python scripts/gradient_lab.py --env random-walk --estimators mc gpomdp gae bac ppo --samples 1 5 20
    python scripts/gradient_lab.py --env Pendulum-v1 --estimators gpomdp gae nharpg --samples 10

Environments: bandit-linear, bandit-quadratic, lqr, random-walk, random-mdp (exact), mountain-car, or any id with a
small perceptron (against a large sample). Writes ``OUT.md``, ``OUT.csv`` and ``OUT.png``.
"""

from __future__ import annotations

import csv
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment.csv_table import read_rows
from ccrl.seeding import stream_seed
from ccrl.updaters import GradientEstimate
from scripts import gradient_lab_estimators as estimators
from scripts import gradient_lab_problems as problems

__all__ = ["Options", "figure", "main", "measure", "summary", "table"]


@dataclass(frozen=True)
class Options:
    """What to compare."""

    env: str = "lqr"
    """A problem's name, or an environment id."""
    estimators: tuple[str, ...] = ("mc", "gpomdp", "bpg1", "bpg2c")
    """Names; a wrong one prints them all."""
    samples: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Episodes per estimate."""
    repetitions: int = 100
    """Estimates of each kind."""
    seed: int = 0
    """Of everything."""
    reference: int = 20_000
    """Episodes of the reference gradient, where there is no exact one."""
    path_step: float = 0.02
    """First step of the path along which momentum methods arrive at the policy."""
    out: Path | None = None
    """Path and first part of the names of the files to write; None: print only."""
    redraw: Path | None = None
    """Nothing is measured: the figure of this CSV file is drawn again beside it."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.estimators if name not in estimators.NAMES]
        if unknown or not self.estimators:
            raise ValueError(f"estimators: expected some of {', '.join(estimators.NAMES)}, got {', '.join(unknown)}")
        if min(self.samples, default=0) < 1 or self.repetitions < 2:
            raise ValueError(f"expected samples >= 1 and repetitions >= 2, got {self.samples} and {self.repetitions}")


# Okabe and Ito's, told apart with all common kinds of colour blindness; marks tell them apart without colours
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
MARKS = "os^Dv<>ph*"
COLUMNS = {
    "angle": "angle to the true gradient, degrees",
    "angle_se": "its standard error",
    "bias": "norm of the mean error, over |g|",
    "bias_se": "what that norm would be on average without any bias",
    "std": "root of the total variance, over |g|",
    "rmse": "root of the mean squared error, over |g|",
    "snr": "|mean|^2 over the total variance",
    "coverage": "share of components inside mean +- 1.96 posterior deviations (calibrated: 0.95)",
    "chi2": "error^T covariance^-1 error over n, median (calibrated: about 0.7 to 1)",
    "ms": "milliseconds per estimate, without sampling",
}
"""Column -> meaning. Errors of surrogates with standardised advantages are in another scale: read their angles."""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per estimator and number of episodes."""
    setting = problems.Setting(options.env, options.seed, reference=options.reference)
    rows = []
    for m in options.samples:
        built = {name: estimators.build(name, setting, m, path_step=options.path_step) for name in options.estimators}
        collected: dict[str, list[tuple[Tensor, float, float]]] = {name: [] for name in built}
        seconds = dict.fromkeys(built, 0.0)
        rollouts = setting.rollouts(m, stream_seed(options.seed, f"{m} episodes"))
        for _ in range(options.repetitions):
            data = next(rollouts)
            for name, estimate in built.items():
                start = time.perf_counter()
                got = estimate(data)
                seconds[name] += time.perf_counter() - start
                collected[name].append((got.mean.detach().double(), *_calibration(got, setting.truth)))
        for name, results in collected.items():
            row = {"env": options.env, "estimator": name, "episodes": m, "repetitions": options.repetitions}
            row |= summary(results, setting.truth) | {"ms": 1e3 * seconds[name] / options.repetitions}
            rows.append(row | {"components": _components(torch.stack([mean for mean, *_ in results]))})
            print(_line(rows[-1]), flush=True)
    return rows


def summary(results: list[tuple[Tensor, float, float]], truth: Tensor) -> dict[str, float]:
    """Statistics of estimates ``(mean [n], coverage, chi2)`` of ``truth``."""
    means = torch.stack([mean for mean, *_ in results])
    size, count = truth.norm(), len(results)
    lengths = means.norm(dim=1)
    # an estimate of length 0 points nowhere: a right angle, what a random direction has on average
    cosine = torch.where(lengths > 0, (means @ truth) / (lengths.clamp_min(1e-300) * size), 0.0)
    angle = torch.rad2deg(cosine.clamp(-1.0, 1.0).arccos())
    variance = means.var(0).sum()
    covered = torch.tensor([c for _, c, _ in results])
    chi2 = torch.tensor([x for *_, x in results])
    return {
        "angle": float(angle.mean()),
        "angle_se": float(angle.std() / math.sqrt(count)),
        "bias": float((means.mean(0) - truth).norm() / size),
        "bias_se": float((variance / count).sqrt() / size),
        "std": float(variance.sqrt() / size),
        "rmse": float((means - truth).square().sum(1).mean().sqrt() / size),
        "snr": float(means.mean(0).square().sum() / variance) if variance > 0 else math.inf,
        "coverage": float(covered.mean()),
        "chi2": float(chi2.median()),
    }


def _calibration(estimate: GradientEstimate, truth: Tensor) -> tuple[float, float]:
    """Share of components inside their 95 % intervals, and the squared error in units of the covariance, over n."""
    if estimate.covariance is None:
        return math.nan, math.nan
    n = truth.shape[0]
    matrix = torch.stack([estimate.covariance(e) for e in torch.eye(n, dtype=torch.float64)])
    error = estimate.mean.detach().double() - truth
    deviations = matrix.diagonal().clamp_min(0.0).sqrt()
    inside = (error.abs() <= 1.96 * deviations).double().mean()
    if not bool(matrix.isfinite().all()):
        return math.nan, math.nan
    # the pseudo-inverse: directions in which the posterior is certain (and the covariance singular) do not count
    return float(inside), float(error @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ error / n)


def _components(means: Tensor) -> str:
    """Mean and standard deviation of up to four components, as publications print them."""
    if means.shape[1] > 4:
        return ""
    pairs = zip(means.mean(0).tolist(), means.std(0).tolist())
    return ", ".join(f"{mean:.3f} ± {std:.2g}" for mean, std in pairs)


# -- output -----------------------------------------------------------------------------------------------------------


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}" if abs(x) < 1000 else f"{x:.2e}"


def _line(row: dict[str, Any]) -> str:
    return f"{row['estimator']:>12} {row['episodes']:>5}  " + "  ".join(f"{k} {_number(row[k])}" for k in COLUMNS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = [k for k in COLUMNS if not k.endswith("_se")]
    few = any(row["components"] for row in rows)
    names = ["estimator", "episodes", *columns, *(["components"] if few else [])]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "---:|" * (len(names) - 1)]
    for row in rows:
        cells = [f"{row['estimator']}", f"{row['episodes']}"]
        for name in columns:
            error = row.get(f"{name}_se") if name == "angle" else None
            cells.append(_number(row[name]) + (f" ± {_number(error)}" if error is not None else ""))
        lines.append("| " + " | ".join(cells + ([row["components"]] if few else [])) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Angle, error, coverage and time against the number of episodes."""
    panels = (
        ("angle", False, "angle to the true gradient, degrees"),
        ("rmse", True, "root mean squared error / |g|"),
        ("coverage", False, "share inside 95 % posterior intervals"),
        ("ms", True, "milliseconds per estimate"),
    )
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    ticks = sorted({row["episodes"] for row in rows})
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        page = Figure(figsize=(6.4, 6.0), layout="constrained")
        axes = page.subplots(2, 2)
        for axis, (column, log, heading) in zip(axes.flat, panels):
            for i, name in enumerate(names):
                mine = [row for row in rows if row["estimator"] == name and not math.isnan(row[column])]
                # side by side: estimators that agree would hide each other
                shift = 1.0 + 0.03 * (i - len(names) / 2)
                x, y = [row["episodes"] * shift for row in mine], [row[column] for row in mine]
                colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]
                look: dict[str, Any] = {"color": colour, "marker": mark, "ms": 5, "lw": 1.2, "mfc": "none"}
                label = name if column == "angle" else None
                if column == "angle":
                    error = [1.96 * row["angle_se"] for row in mine]
                    axis.errorbar(x, y, yerr=error, capsize=2, label=label, **look)
                else:
                    axis.plot(x, y, **look)
            axis.set_xscale("log")
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
            if log:
                axis.set_yscale("log")
            axis.set_title(heading, loc="left", fontsize=9)
            axis.set_xlabel("episodes per estimate")
            axis.grid(color="#E6E6E6")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].axhline(0.95, color="#5A5A5A", linewidth=1, linestyle=":")
        axes[1, 0].text(ticks[0], 0.965, "calibrated: .95", fontsize=8, va="bottom", color="#5A5A5A")
        axes[1, 0].set_ylim(-0.02, 1.08)
        page.legend(loc="outside lower center", ncols=4, frameon=False)
        bars = f"{rows[0]['env']}: {rows[0]['repetitions']} estimates of each kind; bars: 95 % interval of the angle"
        page.suptitle(bars, fontsize=10)
    return page


def _kept(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file that this command wrote."""
    text = ("env", "estimator", "components")
    return [
        {k: v if k in text else int(v) if k in ("episodes", "repetitions") else float(v) for k, v in row.items()}
        for row in read_rows(path)
    ]


def main(argv: list[str]) -> list[dict[str, Any]]:
    """Measure, print, write."""
    torch.set_num_threads(1)
    options = tyro.cli(Options, args=argv, description=__doc__)
    if options.redraw is not None:
        rows = _kept(options.redraw)
        figure(rows).savefig(options.redraw.with_suffix(".png"), dpi=100)
        return rows
    rows = measure(options)
    text = table(rows)
    print("\n" + text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        command = "python scripts/gradient_lab.py " + shlex.join(argv)
        meanings = "\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())
        options.out.with_suffix(".md").write_text(f"`{command}`\n\n{text}\n{meanings}\n", encoding="utf-8")
        with options.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        figure(rows).savefig(options.out.with_suffix(".png"), dpi=100)
        print(f"[ccrl] wrote {options.out.with_suffix('.md')}, .csv and .png")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
