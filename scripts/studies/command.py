"""The command of a study: errors of its options are one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ccrl.experiment.cells import CellsFailed

__all__ = ["run"]


def run(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command line's arguments.

    Exits with the text of what it refuses or misses, or with 1 where it returns a number of failures.
    """
    try:
        found = main(sys.argv[1:])
    except (ValueError, ImportError, FileNotFoundError, CellsFailed) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if isinstance(found, int) and found else 0)
