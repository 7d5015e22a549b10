"""Train 2k = train k, SIGKILL, new process, resume, train k: every number equal, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ccrl.updaters import can_compile

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def _python(*arguments: object, code: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def _check(folder: Path, cases: Iterable[str]) -> None:
    worker = ROOT / "tests" / "guarantees" / "resume_cases.py"
    _python(worker, "kill", folder, *cases)
    found = json.loads(_python(worker, "compare", folder, *cases).splitlines()[-1])
    assert found == {case: [] for case in cases}


def test_eager(tmp_path: Path) -> None:
    tasks = ("CartPole-v1", "InvertedPendulum-v5")
    _check(tmp_path, [f"{agent}:{env}:off" for agent in ("ppo", "mdpo", "bpo") for env in tasks])


def test_replay(tmp_path: Path) -> None:
    continuous = [f"{agent}:InvertedPendulum-v5:off" for agent in ("sac", "td3", "crossq", "mdpo_off_policy")]
    _check(tmp_path, [*continuous, *(f"{agent}:CartPole-v1:off" for agent in ("dqn", "qr_dqn", "detan"))])


def test_offline(tmp_path: Path) -> None:
    _check(tmp_path, [f"{agent}:InvertedPendulum-v5:off" for agent in ("iql", "td3_bc", "cdsa", "pgd")])


@pytest.mark.skipif(not can_compile()[0], reason="no C++ compiler")
def test_compiled(tmp_path: Path) -> None:
    control = ["ppo:InvertedPendulum-v5:on", "mdpo:CartPole-v1:on", "bpo:InvertedPendulum-v5:on"]
    _check(tmp_path, [*control, "td3:InvertedPendulum-v5:on"])
