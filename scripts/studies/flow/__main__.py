"""``python scripts/studies/flow COMMAND``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

from ccrl.experiment.cells import CellsFailed
from scripts.studies.flow.study import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, CellsFailed) as error:
        sys.exit(f"error: {error}")
