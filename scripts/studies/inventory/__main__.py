"""``python scripts/studies/inventory COMMAND``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

from scripts.studies.command import run
from scripts.studies.inventory.study import main

if __name__ == "__main__":
    run(main)
