"""``python scripts/studies/tuned``: see ``study.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[3])  # in place of this folder, whose modules have common names

import tyro

from scripts.studies.tuned.study import Options, main

if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description="Run the tuned settings of the package, and write docs/tuned.md."))
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
