"""Whether an extra of pyproject.toml is installed here: its packages, imported, and one thing done with them.

python scripts/setup/extra_check.py tune
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

__all__ = ["CHECKS", "MODULES", "main", "requirements"]

ROOT = Path(__file__).resolve().parents[2]

MODULES = {"stable-baselines3": "stable_baselines3", "sb3-contrib": "sb3_contrib", "reasoning-gym": "reasoning_gym",
           "ray[default]": "ray", "mujoco-warp": "mujoco_warp", "warp-lang": "warp",
           "myst-parser": "myst_parser"}  # fmt: skip
"""Where a package is imported under another name than its own."""

TINY = ["--total-timesteps", "256", "--eval-every", "0", "--no-progress"]
CHECKS = {
    "tune": ["tune", "a2c", "--env", "CartPole-v1", "--total-timesteps", "160", "--trials", "1", "--evaluations", "1",
             "--only", "learning_rate", "--out", "study"],
    "gp": ["train", "bac", "--env", "ccrl/RandomWalk-v0", *TINY],
    "mujoco": ["train", "a2c", "--env", "Hopper-v5", *TINY],
    "sb3": ["benchmark", "--agents", "sb3:ppo", "--envs", "CartPole-v1", "--seeds", "0", "--total-timesteps", "2048",
            "--evals", "1", "--out", "study"],
    "llm": ["train", "llm", "--method", "grpo", "--task", "arms", "--model", "tabular", "--total-timesteps", "64",
            "--eval-every", "0"],
}  # fmt: skip
"""Commands of the suite that need the extra and nothing else, each of a few seconds."""


def requirements(extra: str) -> list[str]:
    """The packages of an extra, by name.

    Raises:
        ValueError: there is no such extra.
    """
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if extra not in extras:
        raise ValueError(f"extra: expected one of {', '.join(extras)}, got {extra}")
    names = [re.split(r"[<>=~!; ]", text)[0] for text in extras[extra]]
    return [name for name in names if not name.startswith(("ccrl[", "types-"))]


def main(extra: str) -> None:
    """Import and try; prints the versions.

    Raises:
        ImportError: a package is missing or does not import.
        CalledProcessError: the suite's command fails.
    """
    for name in requirements(extra):
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
        print(f"{name} {importlib.metadata.version(name.split('[')[0])}", flush=True)
    if extra in CHECKS:
        command = [sys.executable, str(ROOT / "scripts" / "cli.py"), *CHECKS[extra]]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/setup/extra_check.py EXTRA")
    try:
        main(sys.argv[1])
    except (ValueError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
