"""The version: of a tag, after it, without one, without git, of an sdist and of a wheel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import ccrl
from ccrl.version import RELEASE, version

ROOT = Path(__file__).resolve().parents[1]
LOCAL = r"\+g[0-9a-f]{7,}"


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True)


def test_of_tags(tmp_path):
    said = []
    git(tmp_path, "init")
    for word in ("", "v0.3.9", "later", "v1.0.0"):
        git(tmp_path, "commit", "--allow-empty", "-m", "x")
        if word:
            git(tmp_path, "tag", word)  # "later" is no version
        version.cache_clear()
        said.append(version(tmp_path))
    assert re.fullmatch(rf"{RELEASE}\.dev1{LOCAL}", said[0])
    assert said[1] == "0.3.9"
    assert re.fullmatch(rf"0\.3\.10\.dev1{LOCAL}", said[2])
    assert said[3] == "1.0.0"


def test_without_git(tmp_path):
    for name, text, expected in (("a", None, f"{RELEASE}.dev0"), ("b", "Name: ccrl\nVersion: 0.4.1\n", "0.4.1")):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "PKG-INFO").write_text(text)
        assert version(tmp_path / name) == expected
    (tmp_path / "b" / "ccrl").mkdir()
    (tmp_path / "b" / "ccrl" / "_version.txt").write_text("0.5\n")
    version.cache_clear()
    assert version(tmp_path / "b") == "0.5"  # a wheel's


def test_of_this_folder():
    assert ccrl.__version__ == version(ROOT)
    assert re.match(r"\d+\.\d+", ccrl.__version__)
    assert f"version: {RELEASE}" in (ROOT / "CITATION.cff").read_text()
