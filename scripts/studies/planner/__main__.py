"""``python scripts/studies/planner COMMAND``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

from scripts.studies.planner.study import main

if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if status else 0)
