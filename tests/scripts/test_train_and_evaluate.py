"""The command lines of train.py and evaluate.py, methods.py, and the sums that bench.py gae compares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.run import RunFolder
from ccrl.returns import gae
from scripts import bench_gae, evaluate, train

TINY = ["--num-envs", "4", "--n-steps", "16", "--hidden", "8", "--no-tensorboard", "--eval-episodes", "2"]


def test_flags_win_over_the_file_which_wins_over_the_defaults_and_a_run_goes_on(tmp_path: Path) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("total_timesteps: 128\neval_every: 64\nagent: {n_epochs: 3, learning_rate: 1e-3}\n")
    argv = ["ppo", "--env", "CartPole-v1", "--config", str(overlay), "--run-root", str(tmp_path), *TINY]
    run = train.main([*argv, "--learning-rate", "2e-3", "--checkpoint-every", "64"])
    config = run.config()
    assert (config["total_timesteps"], config["agent"]["n_epochs"]) == (128, 3)
    assert (config["agent"]["learning_rate"], config["agent"]["clip_range"]) == (2e-3, 0.2)
    assert {row["train/learning_rate"] for row in read_rows(run.path / "progress.csv") if row["time/fps"]} == {"0.002"}
    finished = run.info["finished"]
    assert (finished["step"], finished["since"]) == (128, 0)

    # as if it had been stopped half-way: the newest checkpoint and the steps after the older one are gone
    (run.checkpoints / "step_000000000128.pt").unlink()
    parameters = torch.load(run.path / "checkpoints/step_000000000064.pt", weights_only=True)["state"]["updaters"]
    again = train.main(["--resume", str(run.path)])
    assert again.path == run.path
    assert again.info["resumes"][0]["step"] == 64
    assert (again.info["finished"]["step"], again.info["finished"]["since"]) == (128, 64)
    assert [int(row["step"]) for row in read_rows(run.path / "eval.csv")] == [64, 128]
    after = torch.load(run.path / "checkpoints/step_000000000128.pt", weights_only=True)["state"]["updaters"]
    assert not torch.equal(parameters["policy"]["flat"], after["policy"]["flat"])

    for checkpoint, step in (("latest", 128.0), (str(run.checkpoints / "step_000000000064.pt"), 64.0)):
        scalars = evaluate.main(evaluate.EvaluateConfig(run.path, checkpoint, episodes=3))
        assert scalars["steps"] == step
        assert 1.0 <= scalars["deterministic/min_reward"] <= scalars["deterministic/mean_reward"] <= 500.0
        assert "stochastic/mean_reward" in scalars
    assert json.loads((run.path / "evaluation.json").read_text())["steps"] == 64.0
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        evaluate.main(evaluate.EvaluateConfig(run.path, str(tmp_path / "nowhere.pt")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nobody"], r"usage: train.py .*ppo.*received \['nobody'\]"),
        ([], "received nothing"),
        (["ppo", "--config"], "expected a YAML file after it"),
        (["--resume", "x", "--seed", "1"], "usage: train.py --resume RUN"),
    ],
)
def test_wrong_command_lines_are_answered_with_the_usage(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main(argv)


def test_a_run_without_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    config = train.run_config("ppo")(env="CartPole-v1")
    run = RunFolder.create(tmp_path, "CartPole-v1", "ppo", 0, config)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint to resume from"):
        train.main(["--resume", str(run.path)])


@pytest.mark.parametrize("shape", [(5, 3), (400, 2), (20, 700)])
def test_what_bench_gae_compares_is_the_same_sum(shape: tuple[int, int]) -> None:
    pytest.importorskip("stable_baselines3")
    rollout = bench_gae._rollout(*shape)
    assert shape[0] == 5 or bool((rollout[4] == 0).any()), "no episode ends in the rollout"
    ours = gae(*rollout, bench_gae.LAM)
    torch.testing.assert_close(ours, bench_gae.reference(*rollout), rtol=1e-4, atol=1e-4)
    run, theirs = bench_gae.sb3_loop(*rollout[:3], rollout[4])
    run()
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)
