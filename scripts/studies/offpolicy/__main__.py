"""``python scripts/studies/offpolicy``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import tyro

from scripts.studies.command import run
from scripts.studies.offpolicy import study

if __name__ == "__main__":
    run(lambda argv: study.main(tyro.cli(study.Options, args=argv, description=study.__doc__)))
