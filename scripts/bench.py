"""Speed, as ratios to a baseline measured in the same run.

    python scripts/bench.py env --help
    python scripts/bench.py env --tasks HalfCheetah-v5 --num-envs 64 256

Each subcommand is a module ``bench_<name>.py`` beside this file with a dataclass ``Config`` and a function
``main(config)``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Run the subcommand ``argv[0]`` with the options that follow it."""
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if not argv or argv[0] not in names:
        sys.exit(f"usage: bench.py {{{','.join(names)}}} [--help] [options]; received {argv[:1] or 'nothing'}")
    # Only the module that runs is imported: the others may need packages this one does not.
    module = importlib.import_module(f"{__package__}.bench_{argv[0]}" if __package__ else f"bench_{argv[0]}")
    module.main(tyro.cli(module.Config, args=argv[1:], prog=f"bench.py {argv[0]}"))


if __name__ == "__main__":
    main(sys.argv[1:])
