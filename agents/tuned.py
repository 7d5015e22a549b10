"""Tuned settings: a YAML file per agent and environment in ``agents/settings/AGENT/``, as ``train.py --config`` reads.

    python scripts/train.py ppo --env Hopper-v5 --tuned

Comments at the head of a file say where its settings are from and what return was reached here with them
(``docs/tuned.md``).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path

from ccrl.experiment.config import load_yaml
from ccrl.settings import ConfigError

__all__ = ["FOLDER", "find", "head", "tuned"]

FOLDER = Path(__file__).resolve().parent / "settings"


@functools.cache
def tuned(folder: Path = FOLDER) -> Mapping[str, Mapping[str, Path]]:
    """Agent -> environment id -> file."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, {})[str(load_yaml(path)["env"])] = path
    return found


def find(agent: str, env: str) -> Path:
    """The file of an agent's settings on an environment.

    Raises:
        ConfigError: there is none; the message names those that exist.
    """
    files = tuned()
    if agent not in files:
        raise ConfigError(f"tuned: expected an agent with tuned settings ({', '.join(files)}), got {agent}; leave "
                          "--tuned out, or search some with scripts/tune.py")  # fmt: skip
    name = env.removeprefix("ccrl/")  # the same environment under Gymnasium's name for it
    if name not in files[agent]:
        near = difflib.get_close_matches(name, files[agent], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"tuned: expected an environment for which {agent} has tuned settings "
                          f"({', '.join(files[agent])}), got {env}{hint}; leave --tuned out, or search some with "
                          "scripts/tune.py")  # fmt: skip
    return files[agent][name]


def head(path: Path) -> dict[str, str]:
    """What the comments of a file say: ``Source`` and ``Reached here``, without the full stop."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, colon, value = line.removeprefix("# ").partition(": ")
        if line.startswith("# ") and colon and key in ("Source", "Reached here"):
            found[key] = value.removesuffix(".")
    return found
