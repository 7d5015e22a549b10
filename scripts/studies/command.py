"""The command of a study: errors of its options are one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ccrl.experiment.cells import CellsFailed

__all__ = ["run"]


def run(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command line's arguments; exits with the text of what it refuses or misses."""
    try:
        main(sys.argv[1:])
    except (ValueError, ImportError, FileNotFoundError, CellsFailed) as error:
        sys.exit(f"error: {error}")
