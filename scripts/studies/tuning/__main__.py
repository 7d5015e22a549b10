"""``python scripts/studies/tuning [TASK ...]``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import tyro

from ccrl.experiment.cells import CellsFailed
from scripts.studies.tuning.study import Options, main

if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description="Search PPO's settings, and compare the best with the default."))
    except (ValueError, ImportError, CellsFailed) as error:
        sys.exit(f"error: {error}")
