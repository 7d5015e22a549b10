"""The check that set-up scripts end with."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts.setup import check

ROOT = Path(__file__).resolve().parents[2]


def test_the_check_makes_and_steps_a_task(capsys):
    assert check.main(check.CheckConfig("Pendulum-v1", num_envs=2, steps=250)) > 0.0
    out = capsys.readouterr().out
    assert "250 steps of 2 copies" in out
    assert "2 episodes ended" in out  # after 200 steps each; the first step is not counted among the 250


def test_the_check_says_what_is_missing():
    with pytest.raises(ValueError, match="NoSuchTask"):
        check.main(check.CheckConfig("NoSuchTask-v0"))


SCRIPTS = sorted((ROOT / "scripts/setup").glob("*.sh"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


@pytest.mark.parametrize("name", ["isaac", "mjlab", "verl", "warp"])
def test_scripts_install_an_extra_that_exists(name):
    path = ROOT / "scripts/setup" / f"{name}.sh"
    named = re.search(r"-e \"\$root(?:\[([\w,]+)\])?\"", path.read_text())
    assert named is not None
    extras = named[1].split(",") if named[1] else []
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras)
