"""One HTML page of a benchmark that needs no other file: curves, tables, every run, and how configurations differ.

    python scripts/report.py runs/benchmark --out report.html
    python scripts/report.py runs/benchmark others.csv --out report.html --title "Ours beside theirs"

A CSV file among the runs is results of others: columns env, agent, seed, step, return.
"""

from __future__ import annotations

import base64
import html
import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from matplotlib.figure import Figure

from ccrl.experiment import plots
from ccrl.experiment.config import flatten
from ccrl.experiment.curves import NoCurvesError, Study, load_study
from ccrl.experiment.files import write_atomic, writing
from ccrl.experiment.run import RunFolder, find_runs
from ccrl.settings import Settings

__all__ = ["Options", "main"]

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
img { background: white; border-radius: 4px; display: block; height: auto; margin: 1rem 0; max-width: 100%; }
.wide { overflow-x: auto; } code { font-size: 13px; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 14px; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; }
th { text-align: left; } td.number { font-variant-numeric: tabular-nums; text-align: right; }
tr:hover { background: var(--soft); }
"""
SKIPPED = {"seed", "run_root", "progress", "tensorboard"}
"""Keys of a configuration that say nothing of the method."""


@dataclass(frozen=True)
class Options(Settings):
    """What the page shows."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """These are run folders, folders with runs anywhere below them, or CSV files with results of others."""
    out: Path
    """The page is written to this file."""
    metrics: tuple[str, ...] = ("rollout/ep_rew_mean", "eval/mean_reward")
    """Each of these tags has curves and a table; those that no run has are left out."""
    title: str = "Benchmark"
    """The page has this title."""
    by: str | None = None
    """The values of this key of config.yaml are shown as separate agents, for sweeps."""


def main(options: Options, command: str = "") -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: no run has any of the metrics, or a file is damaged.
        WriteError: the page cannot be written.
    """
    parts, refused = [], []
    for metric in options.metrics:
        try:
            study = load_study(options.runs, metric, options.by)
        except NoCurvesError as error:
            refused.append(error)
            continue
        parts += _metric(study)
    if not parts:
        raise refused[0]
    runs = find_runs([path for path in options.runs if path.suffix != ".csv"])
    parts += _runs(runs) + _differences(runs)
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(options.title)}</title><style>{STYLE}</style><h1>{html.escape(options.title)}</h1>"
        f"<p><code>{html.escape(command)}</code></p>{''.join(parts)}</html>\n"
    )
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, lambda file: file.write(text.encode()))
    return options.out


def _metric(study: Study) -> list[str]:
    parts = [f"<h2>{html.escape(study.metric)}</h2>", _image(plots.learning_curves(study), "learning curves")]
    if study.shared_envs and len(study.agents) > 1:
        parts.append(_image(plots.improvement(study), "probability of improvement"))
    if len(study.shared_envs) > 1:
        parts.append(_image(plots.profile(study), "performance profile"))
    return [*parts, _markdown(study.table()[0])]


def _image(figure: Figure, name: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'


def _markdown(text: str) -> str:
    """The tables, emphasis and lists that :meth:`Study.table` writes."""
    out: list[str] = []
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if table:
            out.append(_table(table[0], table[2:]))
            table = []
        if line:
            escaped = html.escape(line.replace("`", ""))
            bold = escaped.split("**")
            out.append("<p>" + "".join(f"<b>{x}</b>" if i % 2 else x for i, x in enumerate(bold)) + "</p>")
    return "".join(out)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cell(text: str) -> str:
        number = text[:1].isdigit() or text[:2].strip("-").isdigit()
        return f"<td{' class=number' if number else ''}>{html.escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{body}</table></div>'


def _runs(runs: list[RunFolder]) -> list[str]:
    if not runs:
        return []
    rows = []
    for run in runs:
        info: dict[str, Any] = run.info
        state = "finished" if "finished" in info else "failed" if "error" in info else "not finished"
        versions = info.get("versions", {})
        torch = versions.get("torch", "") if isinstance(versions, dict) else ""
        commit = str((info.get("git") or {}).get("commit", ""))[:10]
        names = [str(info[key]) for key in ("env", "agent", "seed")]
        rows.append([*names, state, commit, str(torch), run.path.name])
    return ["<h2>Runs</h2>", _table(["env", "agent", "seed", "state", "commit", "torch", "folder"], rows)]


def _differences(runs: list[RunFolder]) -> list[str]:
    """Keys whose values are not the same in all runs, by agent and environment."""
    configs: dict[tuple[str, str], dict[str, set[str]]] = {}
    for run in runs:
        group = configs.setdefault((str(run.info["agent"]), str(run.info["env"])), {})
        for key, value in flatten(run.config()).items():
            if key not in SKIPPED:
                group.setdefault(key, set()).add(str(value))
    keys = sorted({key for group in configs.values() for key in group})
    differing = [k for k in keys if len({frozenset(group.get(k, set())) for group in configs.values()}) > 1
                 or any(len(group.get(k, set())) > 1 for group in configs.values())]  # fmt: skip
    if not differing:
        return []
    rows = [
        [key, *(", ".join(sorted(group.get(key, {"-"}))) for group in configs.values())] for key in differing
    ]  # fmt: skip
    return ["<h2>Where configurations differ</h2>", _table(["key", *(f"{a} on {e}" for a, e in configs)], rows)]


if __name__ == "__main__":
    try:
        print(main(tyro.cli(Options, description=__doc__), "python " + shlex.join(sys.argv)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
