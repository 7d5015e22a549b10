"""train.py and evaluate.py with an agent that differentiates through its simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents import HDPO
from scripts import evaluate, train


def test_train_resume_and_evaluate_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "lead.yaml"
    settings.write_text("env_kwargs: {lead_time: 1}\n")
    argv = ["hdpo", "--env", "ccrl/InventoryOneStoreLost-v0", "--config", str(settings), "--total-timesteps", "1200"]
    argv += [
        "--n-train",
        "12",
        "--n-dev",
        "4",
        "--batch-size",
        "6",
        "--run-root",
        str(tmp_path / "runs"),
        "--no-progress",
    ]
    argv += ["--eval-every", "600", "--eval-episodes", "3", "--policy", "base_stock", "--checkpoint-every", "600"]
    run = train.main(argv)
    agent = HDPO.load(run.path / "best.pt")
    assert agent.simulator.network.lead_times == (1,)
    assert agent.config.policy == "base_stock"
    train.main(["--resume", str(run.path)])
    found = evaluate.main(evaluate.EvaluateConfig(run.path, episodes=4))
    assert found["steps"] >= 1200
    assert -1000 < found["deterministic/mean_reward"] < 0
    assert "mean return" in capsys.readouterr().out
