"""The command of a study: its first word, and errors of its options in one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

from ccrl.experiment.cells import CellsFailed

__all__ = ["choose", "run"]


def choose(argv: list[str], names: Collection[str], doc: str | None) -> str:
    """The first word of a command, one of ``names``; ``--help`` in its place prints ``doc`` and exits.

    :raises ValueError: another word, or none.
    """
    if argv[:1] in (["--help"], ["-h"]):
        print(f"usage: {{{','.join(names)}}} [options]; NAME --help lists the options of one\n\n{doc}")
        sys.exit(0)
    if not argv or argv[0] not in names:
        raise ValueError(f"expected one of {', '.join(names)} and its options, got {argv[0] if argv else 'nothing'}")
    return argv[0]


def run(main: Callable[[list[str]], Any]) -> None:
    """Call ``main`` with the command line's arguments.

    Exits with the text of what it refuses or misses, or with 1 where it returns a number of failures.
    """
    try:
        found = main(sys.argv[1:])
    except (ValueError, ImportError, FileNotFoundError, CellsFailed) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if isinstance(found, int) and found else 0)
