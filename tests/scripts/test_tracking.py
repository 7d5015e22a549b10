"""Tracking services: what they are given, by stand-ins; and their own local stores where they are installed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ccrl.experiment import tracking
from ccrl.experiment.config import ConfigError
from ccrl.experiment.run import RunFolder
from ccrl.experiment.tracking import Tracker
from scripts.train import prepare

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"env": "A", "agent": {"gamma": 0.9}}


class Fake:
    """Either service."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.Artifact = lambda name, type: SimpleNamespace(name=name, add_file=lambda path: self.note("file", path))

    def note(self, *call: Any) -> None:
        self.calls.append(call)

    def init(self, **options: Any) -> Fake:
        self.note("init", options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.note("metric", name, step_metric)

    def log(self, row: dict[str, float], step: int | None = None) -> None:
        self.note("log", row, step)

    def log_artifact(self, artifact: Any) -> None:
        self.note("artifact", artifact.name)

    def finish(self) -> None:
        self.note("finish")


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_what_a_service_is_given(service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, run = Fake(), SimpleNamespace(path=tmp_path / "A__ppo__0")
    monkeypatch.setattr(tracking, "require", lambda module, extra: fake)
    tracker = Tracker(service, "p", run, CONFIG)  # type: ignore[arg-type]
    tracker.log(64, {"rollout/ep_rew_mean": 2.0})
    tracker.log(32, {"rollout/ep_rew_mean": 1.0})
    tracker.finish(tmp_path / "step.pt")
    options = fake.calls[0][1]
    assert (options["project"], options["name"], options["resume"]) == ("p", "A__ppo__0", "allow")
    assert options["config"] == {"env": "A", "agent.gamma": 0.9}
    logs = [call[1:] for call in fake.calls if call[0] == "log"]
    if service == "wandb":  # which would drop a step that goes back
        assert ("metric", "*", "step") in fake.calls
        assert logs == [({"step": s, "rollout/ep_rew_mean": v}, None) for s, v in ((64, 2.0), (32, 1.0))]
        assert options["id"] == "A__ppo__0"
    else:
        assert logs == [({"rollout/ep_rew_mean": 2.0}, 64), ({"rollout/ep_rew_mean": 1.0}, 32)]
    assert fake.calls[-3:] == [("file", str(tmp_path / "step.pt")), ("artifact", "checkpoint"), ("finish",)]


def test_a_missing_service_is_said_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install -e "\.\[wandb\]"'):
        Tracker("wandb", "p", RunFolder(tmp_path), CONFIG)


def train(service: str, tmp_path: Path) -> Path:
    store = tmp_path / "store"
    command = [sys.executable, "scripts/train.py", "ppo", "--env", "CartPole-v1", "--total-timesteps", "256",
               "--num-envs", "4", "--n-steps", "32", "--eval-every", "0", "--compile", "off", "--no-progress",
               "--track", service, "--run-root", str(tmp_path / "runs")]  # fmt: skip
    env = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(store), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return store


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    train("wandb", tmp_path)
    (file,) = tmp_path.glob("runs/*/wandb/offline-run-*/run-*.wandb")
    stored = file.read_bytes()
    assert b"rollout/ep_rew_mean" in stored
    assert b"agent.gamma" in stored
    assert b"step_000000000256.pt" in stored


def test_trackio_offline(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    store = train("trackio", tmp_path)
    with sqlite3.connect(store / "ccrl.db") as db:
        rows = db.execute("select step, metrics from metrics order by step").fetchall()
        configs = db.execute("select config from configs").fetchall()
        saved = db.execute("select * from artifact_versions").fetchall()
    assert [step for step, _ in rows] == [128, 256]
    assert b"train/approx_kl" in bytes(rows[-1][1])
    assert len(configs) == 1
    assert b"agent.gamma" in bytes(configs[0][0])
    assert "step_000000000256.pt" in str(saved)


def test_a_project_without_a_service_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="track_project: expected a service to use it, got track 'none'"):
        prepare(["ppo", "--env", "CartPole-v1", "--track-project", "mine", "--run-root", str(tmp_path)])
    assert not list(tmp_path.iterdir())
