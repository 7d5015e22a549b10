"""Figures of the pages again, from the files of single runs beside them; nothing is trained.

    python scripts/studies/redraw.py                              # all that can be
    python scripts/studies/redraw.py hacking_tomato flow_guard    # these

``control``, ``inventory`` and ``lab`` have commands of their own (docs/protocol.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.path.remove(str(Path(__file__).resolve().parent))  # this folder's modules have common names

import tyro
from matplotlib.figure import Figure

from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT, check_siblings

check_siblings("agents", "envs")

from scripts.studies.flow import study as flow
from scripts.studies.hacking import exact, sampled
from scripts.studies.momentum import study as momentum
from scripts.studies.submodular import pictures
from scripts.studies.submodular import study as submodular
from scripts.studies.tables import Rows

__all__ = ["FIGURES", "Options", "main"]

NOWHERE = Path("unused")
"""Folder of runs, which drawing does not read."""


def _number(text: str) -> Any:
    try:
        return float(text or "nan")
    except ValueError:
        return text


def _seeds(rows: Rows) -> int:
    return len({row["seed"] for row in rows})


def _flow(name: str) -> Callable[[Rows], Figure]:
    return lambda rows: replace(flow.Study(NOWHERE), name=name).figure(rows)


def _sampled(task: str) -> Callable[[Rows], Figure]:
    return lambda rows: sampled.Sampled(NOWHERE, task=task, seeds=_seeds(rows)).figure(rows)


def _submodular(task: str) -> Callable[[Rows], Figure]:
    def draw(rows: Rows) -> Figure:
        methods = tuple(dict.fromkeys(row["method"] for row in rows))
        study = submodular.Study(out=NOWHERE, task=task, methods=methods)
        title = f"{task}: means of {_seeds(rows)} seeds; bands: 95 % (Student's t)"
        return pictures.curves(rows, methods, study.bounds, title)

    return draw


FIGURES: dict[str, Callable[[Rows], Figure]] = {
    "momentum_cartpole": lambda rows: momentum.figure(momentum.typed(rows), 180.0),
    "hacking_exact": lambda rows: exact.Exact(NOWHERE).figure(rows),
    **{f"hacking_{task}": _sampled(task) for task in ("tomato", "point")},
    **{f"flow_{name}": _flow(name) for name in flow.PLANS if name != "guard_grid"},
    **{f"submodular_{task}": _submodular(task) for task in ("grid", "items", "large", "design", "point", "ant")},
}
"""Name of the files -> the figure of their rows."""


@dataclass(frozen=True)
class Options:
    """Which figures, where."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Figures by the names of their files; none named: all."""
    folder: Path = ROOT / "docs" / "figures"
    """NAME.csv is read from this folder, and NAME.png written to it."""

    def __post_init__(self) -> None:
        if unknown := set(self.names) - set(FIGURES):
            raise ValueError(f"names: expected some of {', '.join(FIGURES)}, got {', '.join(sorted(unknown))}")


def main(options: Options) -> list[Path]:
    """Draw, and return what was written."""
    written = []
    for name in options.names or FIGURES:
        rows: Rows = [{k: _number(v) for k, v in row.items()} for row in read_rows(options.folder / f"{name}.csv")]
        written.append(options.folder / f"{name}.png")
        FIGURES[name](rows).savefig(written[-1], dpi=100)
    return written


if __name__ == "__main__":
    try:
        print("\n".join(map(str, main(tyro.cli(Options, description=__doc__)))))
    except ValueError as error:
        sys.exit(f"error: {error}")
