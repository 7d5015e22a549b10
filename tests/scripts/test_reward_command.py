"""Reward models by command, and the paths of models that judge."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.evaluate import EvaluateConfig
from scripts.evaluate import main as evaluate
from scripts.train import main as train
from scripts.training import run_config
from scripts.whole_paths import whole_paths

TRAINER = "agents.llm.reward_model:RewardTrainer"


def test_a_reward_model_is_trained_and_evaluated_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{q}+{q}%100=", "chosen": "1", "rejected": "0"} for q in range(3)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = ("--model-layers", "1", "--model-width", "16", "--model-heads", "2", "--batch-size", "2", "--updates", "1")
    often = ("--total-timesteps", "2", "--eval-every", "2", "--eval-episodes", "4", "--no-tensorboard")
    run = train([TRAINER, "--env", "arithmetic", "--data-file", "pairs.jsonl", "--run-root", "runs", *often, *small])
    folder = run.path.resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the file is found from other folders too
    found = evaluate(EvaluateConfig(run=folder, episodes=4, trust=(TRAINER,)))
    assert 0.0 <= found["deterministic/mean_reward"] <= 1.0, "the share of pairs that are the right way round"
    assert not [name for name in found if name.startswith("pass@")], "it writes nothing"


@pytest.mark.parametrize(("agent", "name"), [("polar", "judge"), ("v0", "value")])
def test_models_that_judge_have_whole_paths(
    agent: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = run_config(agent)().agent
    for folder in ("mine", getattr(settings, name)):
        (tmp_path / folder).mkdir()
    config = run_config(agent)(agent=dataclasses.replace(settings, **{name: "mine"}))
    assert getattr(whole_paths(config).agent, name) == str(tmp_path / "mine")
    assert whole_paths(run_config(agent)()).agent == settings, "overlap and logistic are no folders"
