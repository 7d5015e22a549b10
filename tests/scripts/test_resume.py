"""``train.py --resume``: the curves and the last state of a killed run are those of one that was not."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agents import MDPO
from ccrl.experiment import checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")


def _python(*arguments: object, code: int = 0) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr


FLAGS = (
    "mdpo --env Pendulum-v1 --num-envs 2 --n-steps 128 --total-timesteps 1536 --hidden 8 --checkpoint-every 768 "
    "--eval-every 512 --eval-episodes 2 --no-tensorboard --no-progress --seed 5"
)

DIES_LATER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from ccrl.experiment.callbacks import CheckpointCallback
def on_iteration(self, agent, original=CheckpointCallback.on_iteration):
    original(self, agent)
    if agent.iteration == 5:
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointCallback.on_iteration = on_iteration
from scripts.train import main
main(sys.argv[1:])
"""


def test_the_command_line_resumes(tmp_path: Path) -> None:
    """Killed two iterations and one evaluation after its checkpoint: their rows go and come again."""
    _python(ROOT / "scripts" / "train.py", *FLAGS.split(), "--run-root", tmp_path / "whole")
    _python("-c", DIES_LATER, *FLAGS.split(), "--run-root", tmp_path / "killed", code=-signal.SIGKILL)
    (whole,), (killed,) = ((tmp_path / name).iterdir() for name in ("whole", "killed"))
    steps = {int(row["step"]) for row in _rows(killed / "progress.csv")}
    assert steps == {256 * i for i in range(1, 6)}, "rows past the checkpoint must be there before the resume"
    assert [path.name for path in (killed / "checkpoints").glob("*.pt")] == ["step_000000000768.pt"]
    _python(ROOT / "scripts" / "train.py", "--resume", killed)
    for name in ("progress.csv", "eval.csv"):
        expected, got = _rows(whole / name), _rows(killed / name)
        assert len(expected) == {"progress.csv": 9, "eval.csv": 3}[name]  # evaluations have rows of their own
        assert got == expected
    states = [checkpoint.load(path / "checkpoints" / "step_000000001536.pt")["state"] for path in (whole, killed)]
    for state in states:
        del state["rng"]  # nothing here reads the global generators, which every process seeds differently
    assert _text(states[0]) == _text(states[1])
    assert MDPO.load(killed / "best.pt").num_timesteps == MDPO.load(whole / "best.pt").num_timesteps


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def _text(tree: object) -> str:
    """Everything in it, with tensors as hexadecimal bytes."""
    if isinstance(tree, dict):
        return str({k: _text(v) for k, v in sorted(tree.items())})
    if isinstance(tree, list | tuple):
        return str([_text(v) for v in tree])
    return tree.numpy().tobytes().hex() if hasattr(tree, "numpy") else repr(tree)
