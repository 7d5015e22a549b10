"""``python scripts/studies/separate [SETTING ...]``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import tyro

from ccrl.experiment.cells import CellsFailed
from scripts.studies.separate.study import Options, main

if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description="Compare methods for language models where they can differ."))
    except (ValueError, CellsFailed) as error:
        sys.exit(f"error: {error}")
