"""The version of the project: that of its newest git tag ``v1.2.3``, also where git is not.

``setup.py`` runs this file, so it imports nothing of the project.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

__all__ = ["RELEASE", "version"]

RELEASE = "0.2.0"
"""The release that is being made ready, where no tag says more."""

HERE = Path(__file__).resolve().parent


@functools.cache
def version(root: Path = HERE.parent) -> str:
    """At a tag ``v1.2.3`` it is 1.2.3, four commits after it 1.2.4.dev4+gHASH, without tags RELEASE.devN+gHASH with N
    commits in all. A wheel and an sdist have the version they were built with, a folder without git RELEASE.dev0.

    :param root: the folder of the project.
    """
    built, sdist = root / "ccrl" / "_version.txt", root / "PKG-INFO"
    if built.is_file():
        return built.read_text(encoding="utf-8").strip()
    if sdist.is_file():
        found = re.search(r"^Version: (.+)$", sdist.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if found:
            return found[1]
    if not (root / ".git").exists():  # above it there may be somebody else's repository
        return f"{RELEASE}.dev0"
    tag = re.fullmatch(
        r"v(\d+(?:\.\d+)*)-(\d+)-(g\w+)", _git(root, "describe", "--tags", "--long", "--match", "v[0-9]*")
    )
    if tag is None:
        count, commit = _git(root, "rev-list", "--count", "HEAD"), _git(root, "rev-parse", "--short", "HEAD")
        return f"{RELEASE}.dev{count}+g{commit}" if count and commit else f"{RELEASE}.dev0"
    if tag[2] == "0":
        return tag[1]
    *front, last = tag[1].split(".")
    return ".".join([*front, f"{int(last) + 1}.dev{tag[2]}+{tag[3]}"])


def _git(root: Path, *words: str) -> str:
    """What git prints; empty where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
