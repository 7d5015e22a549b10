"""Learning curves of the off-policy agents, from run folders to numbers, page and figure.

    python scripts/benchmark.py --study scripts/studies/offpolicy/study.yaml --out results/offpolicy   # hours
    python scripts/studies/offpolicy results/offpolicy      # docs/figures/offpolicy_*, docs/off_policy_curves.md
    python scripts/studies/offpolicy                        # page and figure again, from the numbers there are

With ``discrete.yaml`` and ``--which discrete``: DQN, double DQN and QR-DQN, docs/q_learning_curves.md; with
``pendulum.yaml`` and ``--which pendulum``: a small check of SAC, TD3 and CrossQ, docs/pendulum_curves.md; with
``published.yaml`` and ``--which published``: SAC with the settings of published curves, docs/sac_published_curves.md.

The second command may be run at any time: runs that are not there, or not finished, are named on the page.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from ccrl.experiment.config import flatten
from ccrl.experiment.csv_table import read_columns, read_rows
from ccrl.experiment.files import write_atomic
from ccrl.experiment.run import RunFolder, find_runs
from ccrl.packages import ROOT
from scripts.studies.offpolicy import report
from scripts.studies.offpolicy.pages import PAGES

__all__ = ["COLUMNS", "Options", "main", "rows_of"]

FIGURES = ROOT / "docs" / "figures"
COLUMNS = (
    "env", "agent", "seed", "step", "return", "finished", "commit", "torch", "threads", "compile", "cpu_seconds"
)  # fmt: skip
"""One row per evaluation. ``return`` is the mean of the deterministic episodes; ``cpu_seconds`` is that of the whole
run, and empty where it was resumed or is not finished. ``scripts/plot.py`` reads this file as results of others."""


@dataclass(frozen=True)
class Options:
    """Where runs are and where results go."""

    runs: tyro.conf.Positional[Path | None] = None
    """The folder of the runs; none: page and figure are made from the numbers of an earlier call."""
    out: Path = FIGURES
    """The numbers and the figure are written to this folder."""
    page: Path | None = None
    """The page is written here; by default into docs, or into OUT if that is another folder."""
    which: Literal["continuous", "discrete", "pendulum", "published"] = "continuous"
    """The page is that of the agents for continuous actions, for discrete ones, the small check on Pendulum, or that of
    SAC with the settings of published curves."""


def rows_of(run: RunFolder) -> Iterator[dict[str, Any]]:
    """A row per evaluation of one run."""
    info: dict[str, Any] = run.info
    file = run.path / "eval.csv"
    if not file.exists() or not file.stat().st_size:  # a run that has only begun
        return
    swept = run.path.parent.name.split("__")[1:]
    done, threads = info.get("finished"), info.get("threads", {})
    whole = done is not None and not done["since"]
    about = {
        "finished": int(done is not None), "commit": str((info.get("git") or {}).get("commit", ""))[:12],
        "torch": str(info["versions"]["torch"]).partition("+")[0], "threads": threads.get("torch", ""),
        "compile": _compiled(run), "cpu_seconds": f"{done['cpu_seconds']:.0f}" if done is not None and whole else "",
    }  # fmt: skip
    table = read_columns(file)
    for step, value in zip(table["step"], table["eval/mean_reward"]):
        yield {
            "env": info["env"], "agent": " ".join([info["agent"], *swept]), "seed": int(info["seed"]),
            "step": int(step), "return": f"{float(value):.6g}", **about,
        }  # fmt: skip


def _compiled(run: RunFolder) -> str:
    how = flatten(run.config()).get("agent.compile")
    if how != "auto":
        return "" if how is None else str(how)
    log = run.path / "log.txt"  # which an unfinished run of a benchmark has elsewhere
    if not log.exists():
        return "auto"
    return "on" if "updates are compiled" in log.read_text(errors="replace") else "off"


def collect(folder: Path) -> str:
    """The table of all runs below ``folder``, as CSV; of one run made twice the one that got further.

    :raises ValueError: there is no evaluation.
    """
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in find_runs([folder]):
        rows = list(rows_of(run))
        if rows:
            key = (rows[0]["env"], rows[0]["agent"], rows[0]["seed"])
            found[key] = max(found.get(key, []), rows, key=len)
    if not found:
        raise ValueError(f"{folder}: expected runs with evaluations, found none; run the study first")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for key in sorted(found):
        writer.writerows(found[key])
    return text.getvalue()


def main(options: Options) -> str:
    """Write numbers, figure and page; the page."""
    about = PAGES[options.which]
    path = options.out / f"{about.name}_runs.csv"
    if options.runs is not None:
        text = collect(options.runs)
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(text.encode()))
    if not path.exists():
        raise ValueError(f"{path}: expected the numbers of an earlier call, found none; name the folder of the runs")
    runs = report.runs_of(read_rows(path))
    published = report.published(FIGURES / "offpolicy_published.csv")
    usual = (ROOT / "docs" if options.out.resolve() == FIGURES else options.out) / about.file
    text = report.page(about, runs, published)
    write_atomic(options.page or usual, lambda file: file.write(text.encode()))
    report.figure(about, runs, published).savefig(options.out / f"{about.name}_curves.png", dpi=110)
    print(text)
    return text
