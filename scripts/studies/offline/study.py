"""Offline agents side by side (docs/offline.md, docs/cdsa.md, docs/pgd.md).

    python scripts/studies/offline score --out results/offline      # CDSA: a learned score beside the exact one
    python scripts/studies/offline corridor --out results/offline   # CDSA beside a hazard: strengths, VaR, CVaR
    python scripts/studies/offline short --out results/offline      # U-maze and pendulum, two layers of 128
    python scripts/studies/offline clones --seeds 10 --out results/offline   # BC and IQL on U-mazes of two controllers
    python scripts/studies/offline guidance --out results/offline   # PGD: likelihood and dynamics error
    python scripts/studies/offline maze --out results/offline       # CDSA: strengths on the point maze
    python scripts/studies/offline hopper --out results/offline     # CDSA: strengths on Hopper
    python scripts/studies/offline rows --out results/offline       # PGD: real, unguided, guided, world-model rows
    python scripts/studies/offline baselines --out results/offline  # four Minari data sets, four agents
    python scripts/studies/offline online --out results/offline     # TD3 from nothing, from TD3+BC, with its data
    python scripts/studies/offline selection --out results/offline  # what choosing settings costs in online episodes
    python scripts/studies/offline hopper_far --out results/offline # CDSA on Hopper: strengths beyond the grid's ends
    python scripts/studies/offline all --out results/offline        # every one of them, in this order
    python scripts/studies/offline all --out results/offline --report   # pages from the runs that are there

Data sets are made on the spot. Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with
more seeds, runs what is missing. In the end ``FIGURES/offline_NAME.md``, ``.csv`` and ``.png`` are written.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ccrl.experiment.cells import CellsFailed, complete
from ccrl.experiment.csv_table import read_rows
from ccrl.settings import Count, Natural, Settings
from scripts.studies import tables
from scripts.studies.command import choose
from scripts.studies.offline import layout, report
from scripts.studies.offline.cells import GRIDS, play_baseline, play_online, play_selection, play_short
from scripts.studies.offline.correction import FAR, play_corridor, play_score, play_strengths
from scripts.studies.offline.data import SETS
from scripts.studies.offline.diffused import play_guidance, play_rows
from scripts.studies.tables import Rows

__all__ = ["STUDIES", "Study", "main"]

METHODS = ("bc", "td3_bc", "iql", "rebrac")


@dataclass(frozen=True)
class Plan:
    """What a study runs."""

    play: Any
    """``play(cell, out) -> rows`` of one cell; data sets that cells share are in ``out``."""
    sizes: dict[str, int]
    """How long a run is; options of the same name replace them."""
    axes: tuple[dict[str, Any], ...]
    """The settings that differ, crossed with the seeds."""


def _cross(**axes: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(axes, values)) for values in itertools.product(*axes.values()))


STUDIES: dict[str, Plan] = {
    "score": Plan(play_score, {"updates": 4_000}, ({},)),
    "corridor": Plan(play_corridor, {"updates": 4_000, "episodes": 400}, _cross(density=("data", "policy"))),
    "short": Plan(
        play_short, {"updates": 10_000, "episodes": 100, "steps": 100_000},
        (*_cross(data=("u_maze",), method=("bc", "td3_bc", "iql tau .7", "iql")),
         *_cross(data=("pendulum",), method=("bc", "td3_bc", "iql"))),
    ),
    "clones": Plan(
        play_short, {"updates": 10_000, "episodes": 100, "steps": 100_000},
        _cross(data=("u_maze", "u_maze tour"), method=("bc", "iql")),
    ),
    "guidance": Plan(play_guidance, {"steps": 100_000, "denoiser_steps": 3_000, "trajectories": 300}, ({},)),
    "maze": Plan(
        play_strengths, {"updates": 10_000, "score_updates": 10_000, "episodes": 100, "steps": 100_000},
        _cross(data=("u_maze",), base=("bc", "td3_bc")),
    ),
    "hopper": Plan(
        play_strengths, {"updates": 30_000, "score_updates": 10_000, "episodes": 100, "steps": 100_000},
        _cross(data=("hopper",), base=("bc", "td3_bc")),
    ),
    "rows": Plan(
        play_rows, {"updates": 10_000, "episodes": 100, "steps": 100_000, "denoiser_steps": 3_000,
                    "trajectories": 2_000},
        _cross(base=("td3_bc", "iql"), rows=("real", "unguided", "guided", "model")),
    ),
    "baselines": Plan(
        play_baseline, {"updates": 30_000, "episodes": 100, "steps": 100_000},
        _cross(data=tuple(SETS), method=METHODS),
    ),
    "online": Plan(
        play_online, {"updates": 10_000, "online": 10_000, "every": 2_000, "episodes": 50, "steps": 100_000},
        _cross(start=("nothing", "networks", "networks and data")),
    ),
    "selection": Plan(
        play_selection, {"updates": 10_000, "episodes": 100, "steps": 100_000},
        tuple({"method": m, "setting": i} for m, grid in GRIDS.items() for i in range(len(grid))),
    ),
    "hopper_far": Plan(
        partial(play_strengths, strengths=FAR),
        {"updates": 30_000, "score_updates": 10_000, "episodes": 100, "steps": 100_000},
        _cross(data=("hopper",), base=("bc", "td3_bc")),
    ),
}  # fmt: skip
"""In the order of ``all``: cheap and telling ones first."""


@dataclass(frozen=True)
class Study(Settings):
    """What all studies have."""

    out: Path = Path("results/offline")
    """Finished runs and data sets are kept in this folder."""
    figures: Path = Path("docs/figures")
    """The report is written to this folder."""
    jobs: Count = 1
    """So many runs go at a time, each a process with one thread."""
    seeds: Count = 3
    """Each cell has so many runs."""
    first_seed: Natural = 100
    """The first of these seeds; those up to 99 are for looking."""
    report: bool = False
    """Nothing is run: the pages are drawn from the runs that are there."""
    updates: Natural = 0
    """Agents (of CDSA the base policies) take so many gradient steps; 0: as many as on the page, as with all sizes
    below."""
    score_updates: Natural = 0
    """CDSA's score and models take so many gradient steps in the sweeps."""
    episodes: Natural = 0
    """So many episodes are played for every number."""
    steps: Natural = 0
    """Data sets have at most so many transitions."""
    denoiser_steps: Natural = 0
    """PGD's denoiser takes so many gradient steps."""
    trajectories: Natural = 0
    """So many trajectories are generated at a time."""
    online: Natural = 0
    """So many environment steps are taken after the offline training."""
    every: Natural = 0
    """Online training is evaluated at every so many environment steps."""

    def cells(self, name: str) -> list[dict[str, Any]]:
        """The runs of a study, seed after seed."""
        plan = STUDIES[name]
        sizes = {k: getattr(self, k) or v for k, v in plan.sizes.items()}
        found = []
        for seed in range(self.first_seed, self.first_seed + self.seeds):
            for axes in plan.axes:
                cell = {**axes, "seed": seed, **sizes}
                if name == "short" and cell["data"] == "pendulum":
                    cell["updates"] //= 2
                found.append(cell)
        return found

    def command(self, name: str) -> str:
        """What a page says it was made by: folders and jobs, which change no number, are left out."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        kept = {k: v for k, v in given.items() if k not in ("out", "figures", "jobs", "report")}
        flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in kept.items())
        return f"python scripts/studies/offline {name} --out results/offline {flags}".rstrip()

    def run(self, name: str) -> Rows:
        """Run what is missing unless only the report is asked for; write the page. Its first table.

        :raises ValueError: nothing is there to report.
        """
        path, cells = self.out / f"{name}.csv", self.cells(name)
        failed: CellsFailed | None = None
        if not self.report:
            play = partial(_traced, play=STUDIES[name].play, out=self.out, made=tables.made())
            try:
                complete(path, cells, play, jobs=self.jobs, name=f"offline {name}")
            except CellsFailed as error:
                failed = error
        rows = _finished(path, cells)
        if failed is not None and not rows:
            raise failed
        if not rows:
            raise ValueError(f"{path}: expected finished runs of {name}, found none; run it without --report")
        kind = report.REPORTS[name]
        found, stem = kind.tables(rows), self.figures / f"offline_{name}"
        keys = list(cells[0])
        done = len({tuple(row[k] for k in keys) for row in rows})
        found = [layout.undecided(table, done, len(cells)) for table in found]
        command = self.command(name)
        tables.write(stem, command, found[0], rows, *found[1:], note=layout.made_by(rows, done, len(cells)))
        if kind.figure is not None:
            page = kind.figure(rows)
            page.suptitle(kind.title.format(n=len({row["seed"] for row in rows})), fontsize=9)
            engine = page.get_layout_engine()
            assert isinstance(engine, ConstrainedLayoutEngine)
            engine.set(rect=(0.0, 0.03, 1.0, 0.97))  # the command has the lowest lines for itself
            page.text(0.005, 0.002, command, fontsize=5, color="0.4")
            page.savefig(stem.with_suffix(".png"), dpi=110)
        if failed is not None:
            raise failed
        return found[0]


def _traced(cell: dict[str, Any], play: Any, out: Path, made: dict[str, Any]) -> Rows:
    return [row | made for row in play(cell, out=out)]


def _finished(path: Path, cells: list[dict[str, Any]]) -> Rows:
    """Rows of the cells that are in the file, in the cells' order; numbers as numbers."""
    order = {tuple(str(v) for v in cell.values()): i for i, cell in enumerate(cells)}
    keys = list(cells[0])
    rows = [r for r in (read_rows(path) if path.exists() else []) if tuple(r[k] for k in keys) in order]
    rows.sort(key=lambda r: order[tuple(r[k] for k in keys)])
    return [{k: _number(v) for k, v in row.items()} for row in rows]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def main(argv: list[str]) -> list[Rows]:
    """Run one of the studies, or all; their first tables."""
    chosen = choose(argv, (*STUDIES, "all"), __doc__)
    torch.set_num_threads(1)
    study = tyro.cli(Study, args=argv[1:], description=__doc__, prog=f"offline {chosen}")
    found = []
    for name in STUDIES if chosen == "all" else (chosen,):
        if chosen == "all" and study.report and not (study.out / f"{name}.csv").exists():
            continue
        found.append(study.run(name))
    return found
