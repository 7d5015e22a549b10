"""Flow policies through the command line: train, resume, evaluate, and what does not fit."""

from __future__ import annotations

import json

import pytest

from scripts import evaluate, export, train

SMALL = ["--n-prompts", "2", "--group-size", "4", "--steps", "3", "--hidden", "8", "--no-tensorboard", "--no-progress",
         "--eval-every", "16", "--eval-episodes", "8", "--compile", "off"]  # fmt: skip


def test_train_and_evaluate(tmp_path):
    argv = ["grpo_guard", "--env", "mixture16", "--base", "exact", *SMALL, "--run-root", str(tmp_path)]
    run = train.main([*argv, "--total-timesteps", "32", "--env-kwargs", '{"modes": 4}'])
    assert run.info["finished"]["step"] == 32
    assert len((run.path / "eval.csv").read_text().splitlines()) >= 3
    found = evaluate.main(evaluate.EvaluateConfig(run=run.path, episodes=16))
    assert found["steps"] == 32.0
    assert json.loads((run.path / "evaluation.json").read_text())
    with pytest.raises(ValueError, match="film"):
        evaluate.main(evaluate.EvaluateConfig(run=run.path, video=True))
    with pytest.raises(ValueError, match="generates samples"):
        export.main(export.ExportConfig(run=run.path))
    config = run.config_file.read_text().replace("total_timesteps: 32", "total_timesteps: 48")
    run.config_file.write_text(config)
    assert train.main(["--resume", str(run.path)]).info["finished"]["step"] == 48


def test_a_sampler_that_does_not_fit_fails_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="log-probabilities"):
        train.main(
            ["flow_grpo", *SMALL, "--sampler", "ode", "--noise-level", "0", "--run-root", str(tmp_path / "runs")]
        )
    assert not (tmp_path / "runs").exists()
