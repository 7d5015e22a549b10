"""``python scripts/studies/control``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import tyro

from scripts.studies.command import run
from scripts.studies.control.study import Options, main

if __name__ == "__main__":
    run(
        lambda argv: main(
            tyro.cli(
                Options, args=argv, description="Run the matched comparison for control, and write docs/control.md."
            )
        )
    )
