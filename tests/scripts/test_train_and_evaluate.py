"""The command lines of train.py and evaluate.py, methods.py, and the sums that bench.py gae compares."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import agents
from ccrl.experiment.config import ConfigError
from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.logger import digits
from ccrl.experiment.run import RunFolder
from ccrl.learn import Learner
from ccrl.returns import gae
from scripts import evaluate, train, training
from scripts.bench import gae as bench_gae

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--num-envs", "4", "--n-steps", "16", "--hidden", "8", "--no-tensorboard", "--eval-episodes", "2"]


def test_flags_win_over_the_file_which_wins_over_the_defaults_and_a_run_goes_on(tmp_path: Path, capsys: Any) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("total_timesteps: 128\neval_every: 64\nagent: {n_epochs: 3, learning_rate: 1e-3}\n")
    argv = ["ppo", "--env", "CartPole-v1", "--config", str(overlay), "--run-root", str(tmp_path), *TINY]
    run = train.main([*argv, "--learning-rate", "2e-3", "--checkpoint-every", "64"])
    assert run.info["resume_note"] is None  # a native environment: exact
    config = run.config()
    assert (config["total_timesteps"], config["agent"]["n_epochs"]) == (128, 3)
    assert (config["agent"]["learning_rate"], config["agent"]["clip_range"]) == (2e-3, 0.2)
    assert {row["train/learning_rate"] for row in read_rows(run.path / "progress.csv") if row["time/fps"]} == {"0.002"}
    finished = run.info["finished"]
    assert (finished["step"], finished["since"]) == (128, 0)

    # as if it had been stopped half-way: the newest checkpoint and the steps after the older one are gone
    (run.checkpoints / "step_000000000128.pt").unlink()
    parameters = torch.load(run.path / "checkpoints/step_000000000064.pt", weights_only=True)["state"]["learner"]
    capsys.readouterr()
    again = train.main(["--resume", str(run.path)])
    assert again.path == run.path
    said = capsys.readouterr().out
    last = read_rows(run.path / "eval.csv")[-1]["eval/mean_reward"]
    assert f"[ccrl] evaluation: {digits(float(last))} at the end, at best " in said
    assert re.search(r"\n\[ccrl\] speed: [\d,]+ steps/s, \d+ s without evaluation\n\[ccrl\] time: \w+ \d+ %, ", said)
    assert "files: config.yaml, run.json, progress.csv, eval.csv, best.pt, checkpoints in " + str(run.path) in said
    assert again.info["resumes"][0]["step"] == 64
    assert (again.info["finished"]["step"], again.info["finished"]["since"]) == (128, 64)
    assert [int(row["step"]) for row in read_rows(run.path / "eval.csv")] == [64, 128]
    # an iteration and an evaluation at each
    assert [int(row["step"]) for row in read_rows(run.path / "progress.csv")] == [64, 64, 128, 128]
    after = torch.load(run.path / "checkpoints/step_000000000128.pt", weights_only=True)["state"]["learner"]
    assert not torch.equal(parameters["updaters/policy"]["flat"], after["updaters/policy"]["flat"])

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
        (["ppo", "--config=nowhere.yaml"], "expected a YAML file, found none at nowhere.yaml"),
        (["--resume", "x", "--seed", "1"], "usage: train.py --resume RUN"),
    ],
)
def test_wrong_command_lines_are_answered_with_the_usage(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main(argv)


def test_the_usage_and_its_errors_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom scripts import train\n"
        "for argv in (['--help'], ['nobody'], ['llm', '--method'], ['ppo', '--config'], ['--resume']):\n"
        "    try:\n        train.main(argv)\n    except SystemExit as end:\n        print(str(end.code)[:5])\n"
        "assert not {'torch', 'numpy', 'gymnasium', 'tyro'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage: train.py {a2c,")
    assert "AGENT --help shows every flag.\n0\nusage\nusage\n--con\nusage\n" in done.stdout


def test_a_run_without_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    config = training.run_config("ppo")(env="CartPole-v1")
    run = RunFolder.create(tmp_path, "CartPole-v1", "ppo", 0, config)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint to resume from"):
        train.main(["--resume", str(run.path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--log-interval", "0"], "log_interval: expected >= 1, got 0"),
        (["--keep-checkpoints", "0"], "keep_checkpoints: expected >= 1, got 0"),
        (["--eval-every", "-1"], "eval_every: expected >= 0, got -1"),
        (["--batch-size", "0"], "batch_size: expected >= 1, got 0"),
    ],
)
def test_flags_out_of_range_are_answered_with_their_name(flags: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        train.main(["ppo", "--env", "CartPole-v1", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "CartPol-v1"], "did you mean CartPole-v1"),
        (["--env", "CartPole-v1", "--device", "gpu"], "device: expected one of PyTorch's"),
        (["--env", "Blackjack-v1"], "expected observations from a Box"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train.main(["ppo", "--run-root", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        train.main(["ppo", "--run-root", str(tmp_path), "--env", "CartPole-v1", "--activation", "rulu"])
    assert not list(tmp_path.iterdir())


def test_from_a_shell_errors_are_one_line(tmp_path: Path) -> None:
    for script, flags, message in (
        ("train.py", ["ppo", "--env", "NoSuchEnv-v0"], "error: no environment 'NoSuchEnv-v0'"),
        ("evaluate.py", [str(tmp_path)], "error: expected a run folder (with run.json)"),
    ):
        command = [sys.executable, str(ROOT / "scripts" / script), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(message)
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def tiny_run(folder: Path, *flags: str) -> RunFolder:
    return train.main(["ppo", "--env", "CartPole-v1", "--run-root", str(folder), *TINY, *flags])


def test_a_finished_run_is_left_as_it_is_until_it_gets_more_steps(tmp_path: Path, capsys: Any) -> None:
    run = tiny_run(tmp_path, "--total-timesteps", "64", "--eval-every", "0")
    before = run.info
    assert train.main([f"--resume={run.path}"]).info == before
    assert "is finished: 64 of 64 steps. To train on, raise total_timesteps in" in capsys.readouterr().out
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("total_timesteps: 64", "total_timesteps: 128"))
    finished = train.main(["--resume", str(run.path)]).info["finished"]
    assert (finished["since"], finished["step"]) == (64, 128)
    run.config_file.write_text(text.replace("clip_range: 0.2", "clip_range: 0.3").replace("seed: 0", "seed: 5"))
    message = r"changed since step_000000000128.pt \(agent.clip_range: expected 0.2, got 0.3, seed: expected 0, got 5\)"
    with pytest.raises(ConfigError, match=message):
        train.main(["--resume", str(run.path)])


def test_every_option_of_a_run_reaches_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = ["--env-kwargs", '{"max_episode_steps": 5}']  # no pole falls within five steps
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run = tiny_run(
        tmp_path, "--total-timesteps", "256", "--eval-every", "128", "--checkpoint-every", "64", "--keep-checkpoints",
        "1", "--log-interval", "2", "--torch-threads", "3", *kwargs,
    )  # fmt: skip
    monkeypatch.undo()
    assert threads == [3]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000000000256.pt"]
    rows = read_rows(run.path / "progress.csv")
    assert [row["step"] for row in rows if row["time/fps"]] == ["128", "256"]
    for row in read_rows(run.path / "eval.csv"):
        assert json.loads(row["eval/lengths"]) == json.loads(row["eval_stochastic/lengths"]) == [5, 5]

    asked: list[Any] = []
    original = evaluate.evaluate_agent

    def spy(agent: Any, env: Any, *rest: Any) -> Any:
        asked.append((agent.num_timesteps, *rest))
        return original(agent, env, *rest)

    monkeypatch.setattr(evaluate, "evaluate_agent", spy)
    for checkpoint, step in (("best", 128), ("latest", 256)):  # all evaluations return 5: the first is the best
        scalars = evaluate.main(evaluate.EvaluateConfig(run.path, checkpoint, episodes=3, seed=77))
        assert asked[-2:] == [(step, 3, 77, True), (step, 3, 77, False)]
        assert scalars["deterministic/mean_ep_length"] == scalars["stochastic/mean_ep_length"] == 5.0

    text = run.config_file.read_text().replace("total_timesteps: 256", "total_timesteps: 512")
    for key, other in (("env_kwargs: {max_episode_steps: 5}", "env_kwargs: {max_episode_steps: 6}"),
                       ("env: CartPole-v1", "env: Acrobot-v1")):  # fmt: skip
        assert key in text
        run.config_file.write_text(text.replace(key, other))
        with pytest.raises(ConfigError, match=f"{key.split(':')[0]}.*: expected .*; a run keeps these settings"):
            train.main(["--resume", str(run.path)])


def test_speed_leaves_out_evaluations_and_what_was_before_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(
        training, "time", SimpleNamespace(perf_counter=lambda: 100 + now[0], process_time=lambda: 7 + 2 * now[0])
    )
    run = RunFolder.create(tmp_path, "E-v0", "ppo", 0)
    learner = SimpleNamespace(num_timesteps=1000, ep_rew_mean=2.5)
    evaluation: Any = SimpleNamespace(seconds=0.0, cpu_seconds=0.0)
    with training.timed(run, learner, evaluation):
        now[0], learner.num_timesteps = 10.0, 1300
        evaluation.seconds, evaluation.cpu_seconds = 4.0, 5.0
    assert run.info["finished"] == {
        "step": 1300, "ep_rew_mean": 2.5, "since": 1000, "seconds": 6.0, "cpu_seconds": 15.0, "steps_per_second": 50.0,
    }  # fmt: skip

    def broken_off() -> None:
        with training.timed(run, learner, None):
            learner.num_timesteps = 9999
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert run.info["finished"]["step"] == 1300, "training that was broken off is not finished"


def test_a_signal_in_the_last_iteration_does_not_unfinish_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Learner.iterate
    monkeypatch.setattr(Learner, "iterate", lambda learner: (iterate(learner), signal.raise_signal(signal.SIGTERM)))
    assert tiny_run(tmp_path, "--total-timesteps", "64", "--eval-every", "0").info["finished"]["step"] == 64


def test_a_signal_saves_the_iteration_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Learner.iterate

    def interrupted(learner: Learner) -> None:
        if learner.iteration == 1:
            signal.raise_signal(signal.SIGTERM)
        iterate(learner)

    monkeypatch.setattr(Learner, "iterate", interrupted)
    with pytest.raises(SystemExit, match=r"stopped at 128 of 640 steps; it goes on from step_0+128.pt with --resume"):
        tiny_run(tmp_path, "--total-timesteps", "640", "--eval-every", "0")
    monkeypatch.undo()
    (path,) = tmp_path.iterdir()
    assert "finished" not in RunFolder.open(path).info
    assert train.main(["--resume", str(path)]).info["finished"]["since"] == 128


def test_settings_of_the_agent_at_the_top_of_a_file_are_told_their_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match=r"learning_rate: unknown key.*below a line `agent:`"):
        train.main(["ppo", f"--config={file}"])


def test_evaluations_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="episodes: expected >= 1, got 0"):
        evaluate.EvaluateConfig(tmp_path, episodes=0)
    run = RunFolder.create(tmp_path, "CartPole-v1", "ppo", 0, training.run_config("ppo")(env="CartPole-v1"))
    with pytest.raises(FileNotFoundError, match="expected a checkpoint 'latest', found none; a run writes its first"):
        evaluate.main(evaluate.EvaluateConfig(run.path))


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


def test_the_run_folder_says_why_a_run_cannot_be_resumed_exactly(tmp_path: Path) -> None:
    argv = ["ppo", "--env", "CartPole-v1", "--env-kwargs", '{"backend": "gymnasium"}', "--run-root", str(tmp_path)]
    with pytest.warns(UserWarning, match="a resumed run starts fresh episodes"):
        run = train.main([*argv, *TINY, "--total-timesteps", "64", "--eval-every", "0"])
    assert "the state of CartPoleVectorEnv" in run.info["resume_note"]


@pytest.mark.parametrize("name", sorted(agents.AGENTS))
def test_the_defaults_in_the_help_are_ones_the_agent_accepts(name: str) -> None:
    config = training.run_config(name)()
    cls = agents.get_agent(name)
    missing = [flag for flag in ("dataset", "base") if getattr(config.agent, flag, 0) in (None, "")]
    if missing:  # what has no default is asked for by its flag
        with pytest.raises(ValueError, match=rf"expected a .*, got none; set ({'|'.join(missing)})"):
            cls(config.env, config.agent, env_kwargs=config.env_kwargs)
        return
    agent = cls(config.env, config.agent, env_kwargs=config.env_kwargs)
    assert agent.num_timesteps == 0
    agent.close()
