"""Figures and tables of finished or running runs.

    python scripts/plot.py runs/benchmark --out docs/figures/mujoco
    python scripts/plot.py runs/a runs/b --out docs/figures/eval --metric eval/mean_reward --title "Evaluation"

Writes ``OUT_curves``, ``OUT_profile`` and ``OUT_improvement`` as PNG and SVG, ``OUT_table`` as Markdown and CSV, and
``OUT_runs.csv`` with every run at 50 points: ``plot.py OUT_runs.csv --out OUT`` draws them again without the folders.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.experiment import plots
from ccrl.experiment.curves import load_study
from ccrl.experiment.others import write_runs
from ccrl.settings import Range, Settings, Unit


@dataclass(frozen=True)
class Options(Settings):
    """What to draw, and how."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """These are run folders, folders with runs anywhere below them, or CSV files with results of others (columns env,
    agent, seed, step, return)."""
    out: Path
    """The names of the files to write begin with this path."""
    metric: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "rollout/ep_rew_mean"
    """The curves show this tag of progress.csv or eval.csv."""
    title: str | None = None
    """The figures have this title."""
    by: str | None = None
    """The values of this key of config.yaml are drawn as separate agents, for sweeps."""
    fractions: tuple[Unit, ...] = (0.5, 0.75, 0.9)
    """The sample-efficiency table has these thresholds, on the way from the lowest start to the best final score."""
    thresholds: dict[str, float] | None = None
    """Some envs have thresholds in raw units: --thresholds Hopper-v5 2000 Walker2d-v5 3000."""
    points: Annotated[int, Range(2)] = 200
    """A curve has this many grid points."""


def main(options: Options, command: str = "") -> list[Path]:
    study = load_study(options.runs, options.metric, options.by, options.points)
    tables = study.table(options.fractions, options.thresholds)  # first: what it refuses leaves no files
    written = plots.save(plots.learning_curves(study, options.title, command), f"{options.out}_curves")
    if study.shared_envs:
        written += plots.save(plots.profile(study, options.title, command), f"{options.out}_profile")
        if len(study.agents) > 1:
            written += plots.save(plots.improvement(study, options.title, command), f"{options.out}_improvement")
    for suffix, text in zip((".md", ".csv"), tables, strict=True):
        path = Path(f"{options.out}_table{suffix}")
        path.write_text(text, encoding="utf-8")
        written.append(path)
    kept = Path(f"{options.out}_runs.csv")
    if kept.resolve() not in {path.resolve() for path in options.runs}:  # thinning what was thinned loses more
        kept.write_text(write_runs((c.env, c.agent, c.seed, c.steps, c.values) for c in study.curves), encoding="utf-8")
        written.append(kept)
    for note in dict.fromkeys([*study.notes_of(study.groups), *study.notes_of(study.compared)]):
        print(f"note: {note}")
    return written


if __name__ == "__main__":
    try:
        files = main(tyro.cli(Options, description=__doc__), "python " + shlex.join(sys.argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, files)))
