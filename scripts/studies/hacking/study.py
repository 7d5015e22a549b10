"""ORPO beside its rivals where a proxy can be hacked (docs/orpo.md).

    python scripts/studies/hacking exact --out results/hacking     # tomato world, exact gradients, no sampling
    python scripts/studies/hacking tomato --out results/hacking    # the same world: PPO and a learnt discriminator
    python scripts/studies/hacking point --out results/hacking     # a reward model of 30 labels, continuous actions

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/hacking_NAME.md``, ``.csv`` and ``.png`` are written.
"""

from __future__ import annotations

import shlex
from typing import Any

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from scripts.studies import tables
from scripts.studies.command import choose
from scripts.studies.hacking.exact import Exact
from scripts.studies.hacking.sampled import SAMPLED, Sampled
from scripts.studies.tables import Rows

__all__ = ["main"]


def main(argv: list[str]) -> list[Rows]:
    """Run one of the studies and write its files; its tables."""
    torch.set_num_threads(1)
    name = choose(argv, ("exact", *SAMPLED), __doc__)
    study: Any
    if name == "exact":
        study = tyro.cli(Exact, args=argv[1:], description=__doc__, prog="hacking exact")
    else:
        start = Sampled(tyro.MISSING, task=name, iterations={"point": 40}.get(name, 30))
        study = tyro.cli(Sampled, args=argv[1:], default=start, description=__doc__, prog=f"hacking {name}")
    rows = study.run()
    found: list[Rows] = study.tables(rows)
    stem = study.figures / f"hacking_{name}"
    command = "python scripts/studies/hacking " + shlex.join(argv)
    tables.write(stem, command, found[0], rows, *found[1:])
    study.figure(rows).savefig(stem.with_suffix(".png"), dpi=100)
    return found
