"""Speed, as ratios to a baseline measured in the same run.

    python scripts/bench env --help
    python scripts/bench env --tasks HalfCheetah-v5 --num-envs 64 256

Each subcommand is a module ``<name>.py`` beside this file with a dataclass ``Config`` and a function
``main(config)``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # in place of this folder, whose modules have common names

import tyro

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Run the subcommand ``argv[0]`` with the options that follow it."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    usage = f"usage: bench {{{','.join(names)}}} [--help] [options]"
    if argv[:1] in (["--help"], ["-h"]):
        print(f"{usage}\n\n{__doc__}")
        return
    if not argv or argv[0] not in names:
        sys.exit(f"{usage}; received {argv[0] if argv else 'nothing'}")
    # Only the module that runs is imported: the others may need packages this one does not.
    module = importlib.import_module(f"scripts.bench.{argv[0]}")
    module.main(tyro.cli(module.Config, args=argv[1:], prog=f"bench {argv[0]}"))


if __name__ == "__main__":
    main(sys.argv[1:])
