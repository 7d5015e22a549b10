"""Studies: what they refuse, what they leave alone the second time, and folders that the plots read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccrl.experiment import config as configs
from ccrl.experiment.config import ConfigError
from ccrl.experiment.csv_table import read_columns, read_rows
from ccrl.experiment.files import FolderInUseError
from ccrl.experiment.run import RunFolder, find_runs
from scripts import benchmark
from scripts.benchmark_study import Study
from scripts.whole_paths import whole_paths

ROOT = Path(__file__).resolve().parents[2]
TINY = {"num_envs": 4, "n_steps": 32, "batch_size": 64, "n_epochs": 1}


def study(**changes: object) -> Study:
    entry = {"agents": ["ppo"], "envs": ["CartPole-v1"], "total_timesteps": 256}
    entry |= {k: changes.pop(k) for k in list(changes) if k not in ("seeds", "settings", "evals", "purpose")}
    return configs.from_dict(Study, {"entries": [entry], "seeds": [0], "evals": 2} | changes)


def write(folder: Path, **changes: object) -> benchmark.Options:
    """A study file of PPO on CartPole, 256 steps, and the options that run it into ``folder/out``."""
    path = folder / "study.yaml"
    path.write_text(json.dumps(configs.to_dict(study(settings={"ppo": TINY}, **changes))))
    return benchmark.Options(out=folder / "out", study=path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": ["pppo"]}, "did you mean ppo"),
        ({"envs": ["CartPole-v9"]}, "CartPole-v9"),
        ({"settings": {"ppo": {"batchsize": 64}}}, "agent.batchsize: unknown key.*batch_size"),
        ({"settings": {"ppo": {"batch_size": "big"}}}, "agent.batch_size: expected int"),
        ({"settings": {"mdpo": {}}}, "expected agents of the study .ppo., got .'mdpo'"),
        ({"sweep": {"inner_steps": [1]}}, "agent.inner_steps: unknown key"),
        ({"agents": ["ppo", "ppo"]}, "twice in the study"),
        ({"total_timesteps": 0}, "total_timesteps: expected >= 1"),
        ({"purpose": "test"}, "seeds: expected from 100 to 999 where the purpose is 'test', got .0."),
        ({"purpose": "tune", "seeds": [1000, 1000]}, "seeds: expected each once"),
        ({"purpose": "report"}, "purpose: expected .*tune.*test"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_before_anything_runs(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**changes).specs()


def test_unknown_keys_and_missing_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval: unknown key of Study.*evals"):
        configs.from_dict(Study, {"entries": [], "eval": 3})
    with pytest.raises(ConfigError, match="--agents, --envs and --total-timesteps"):
        benchmark.load(benchmark.Options(out=tmp_path, agents=("ppo",)))
    with pytest.raises(ConfigError, match="received --envs too"):
        benchmark.load(benchmark.Options(out=tmp_path, study=tmp_path / "x.yaml", envs=("CartPole-v1",)))
    with pytest.raises(ConfigError, match="received --evals too"):
        benchmark.load(benchmark.Options(out=tmp_path, study=tmp_path / "x.yaml", evals=50))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        benchmark.main(
            benchmark.Options(out=tmp_path / "file", agents=("ppo",), envs=("CartPole-v1",), total_timesteps=64)
        )


def test_seeds_come_before_agents_and_settings_are_laid_over_one_another() -> None:
    specs = study(
        agents=["ppo", "mdpo"],
        seeds=[3, 1],
        settings={"ppo": {"n_epochs": 2, "num_envs": 4}},
        sweep={"n_steps": [8, 16]},
    ).specs()
    assert [(s.agent, s.values["seed"], s.values["agent"]["n_steps"]) for s in specs] == [
        (agent, seed, steps) for seed in (3, 1) for agent in ("ppo", "mdpo") for steps in (8, 16)
    ]
    config = specs[0].config()
    assert (config.agent.n_epochs, config.agent.num_envs, config.agent.n_steps) == (2, 4, 8)
    assert (config.eval_every, config.checkpoint_every) == (128, 128)
    assert specs[2].config().agent.num_envs == 16
    assert len({s.root(Path("x")) for s in specs}) == 4


def test_settings_of_an_entry_win_over_the_studys_and_a_sweep_over_both() -> None:
    entry = {"agents": ["ppo"], "envs": ["CartPole-v1"], "total_timesteps": 256, "sweep": {"gamma": [0.9]}}
    entry["settings"] = {"ppo": {"n_epochs": 3, "gamma": 0.8, "n_steps": 16}}
    values = {"entries": [entry], "seeds": [0], "settings": {"ppo": {"n_epochs": 2, "gamma": 0.7, "num_envs": 4}}}
    (spec,) = configs.from_dict(Study, values).specs()
    agent = spec.config().agent
    assert (agent.n_epochs, agent.gamma, agent.n_steps, agent.num_envs) == (3, 0.9, 16, 4)


def test_a_run_shorter_than_its_number_of_evaluations_is_evaluated() -> None:
    (spec,) = study(evals=500).specs()
    assert spec.config().eval_every == 1
    (spec,) = study(evals=0).specs()
    assert spec.config().eval_every == 0
    for wrong in ({"eval_episodes": 0}, {"evals": -1}, {"total_timesteps": 0}):
        with pytest.raises(ConfigError, match=": expected >= "):
            broken_study(**wrong).specs()


def broken_study(**changes: int) -> Study:
    plain = configs.to_dict(study())
    plain["entries"][0] |= {k: v for k, v in changes.items() if k == "total_timesteps"}
    return configs.from_dict(Study, plain | {k: v for k, v in changes.items() if k != "total_timesteps"})


def test_the_finished_run_is_found_before_a_newer_one_whatever_its_simulator_threads(tmp_path: Path) -> None:
    spec, other = study(seeds=[0, 1], settings={"ppo": TINY}).specs()
    runs = []
    for of, finished, threads in ((spec, False, 1), (spec, True, 7), (spec, False, 1), (other, True, 1)):
        config = of.config(env_kwargs={"nthread": threads})
        runs.append(RunFolder.create(of.root(tmp_path), "CartPole-v1", "ppo", of.values["seed"], config))
        if finished:
            runs[-1].record(finished={"step": 256})
        os.utime(runs[-1].path, (len(runs), len(runs)))
    assert spec.find(tmp_path) == runs[1]
    assert other.find(tmp_path) == runs[3]
    runs[1].info_file.rename(runs[1].path / "abandoned.json")
    assert spec.find(tmp_path) == runs[2], "the newest of those that go on"


@pytest.mark.parametrize("kind", ["", "ogbench:"])
def test_a_study_names_its_files_by_paths_from_where_it_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of runs have the whole path, and run on from anywhere: that is no other setting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.npz").touch()
    settings = {"td3_bc": {"dataset": f"{kind}rows.npz"}}
    (spec,) = study(agents=["td3_bc"], envs=["Pendulum-v1"], settings=settings).specs()
    config = whole_paths(spec.config())
    assert config.agent.dataset == f"{kind}{tmp_path / 'rows.npz'}"
    run = RunFolder.create(spec.root(tmp_path), "Pendulum-v1", "td3_bc", 0, config)
    assert spec.find(tmp_path) == run
    (other,) = study(
        agents=["td3_bc"], envs=["Pendulum-v1"], settings={"td3_bc": {"dataset": "minari:rows.npz"}}
    ).specs()
    assert whole_paths(other.config()).agent.dataset == "minari:rows.npz"


def test_a_run_of_another_process_is_not_called_failed(tmp_path: Path) -> None:
    """The same study twice at once: the second one's runs cannot begin, those of the first go on."""
    run = RunFolder.create(tmp_path, "e", "a", 0)
    benchmark._note(run, FolderInUseError("by process 7"))
    assert "error" not in run.info
    benchmark._note(run, ValueError("x"))
    assert run.info["error"] == "ValueError: x"


def test_cores_are_shared_by_the_jobs_and_go_to_the_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(benchmark, "_launch", lambda spec, out, cores: got.append(cores) or 0)
    specs = study(seeds=[0, 1, 2]).specs()
    assert [code for _, code in benchmark._here(specs, tmp_path, 3)] == [0, 0, 0]
    assert got == [2, 2, 2]
    monkeypatch.setattr(benchmark.training, "train", lambda agent, config: got.append(config.env_kwargs))
    for env, kwargs in (("HalfCheetah-v5", {}), ("HalfCheetah-v5", {"nthread": 1}), ("CartPole-v1", {})):
        (spec,) = study(envs=[env], env_kwargs=kwargs).specs()
        benchmark._train(spec, tmp_path, 4)
    assert got[3:] == [{"nthread": 4}, {"nthread": 1}, {}]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "scripts/studies").glob("*/study.yaml")), ids=lambda path: path.parent.name
)
def test_committed_studies_are_valid(file: Path) -> None:
    text = file.read_text()
    if "sb3:" in text:
        pytest.importorskip("stable_baselines3")
    specs = benchmark.load(benchmark.Options(out=Path("x"), study=file)).specs()
    assert {s.values["seed"] for s in specs[: len(specs) // len({s.values["seed"] for s in specs})]} == {0}


def test_our_ppo_and_sb3s_have_the_same_settings_in_the_foundation_study() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    specs = benchmark.load(
        benchmark.Options(out=Path("x"), study=ROOT / "scripts/studies/foundation/study.yaml")
    ).specs()
    ours = next(s for s in specs if s.agent == "ppo").config().agent
    theirs = next(s for s in specs if s.agent == "sb3:ppo").config()
    arguments, num_envs = benchmark.sb3.model_arguments(theirs.agent)
    env = benchmark.sb3.as_vec_env(benchmark.envs.make("CartPole-v1", num_envs))
    model = sb3.PPO("MlpPolicy", env, device="cpu", **arguments)
    same = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")
    assert {k: getattr(model, k) for k in same} == {k: getattr(ours, k) for k in same}
    assert (model.n_envs, model.clip_range(1.0), model.lr_schedule(1.0)) == (16, ours.clip_range, ours.learning_rate)
    assert model.policy.optimizer.defaults["eps"] == ours.adam_eps
    assert [tuple(p.shape) for p in model.policy.mlp_extractor.policy_net.parameters()] == [
        (64, 4), (64,), (64, 64), (64,)
    ]  # fmt: skip
    assert not ours.normalise_obs
    assert not ours.normalise_reward


def test_a_finished_study_runs_nothing_again_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = write(tmp_path)
    assert benchmark.main(options) == 0
    (run,) = find_runs([options.out])
    info = run.info
    assert (info["env"], info["agent"], info["seed"], info["finished"]["step"]) == ("CartPole-v1", "ppo", 0, 256)
    assert info["finished"]["steps_per_second"] > 0
    assert "CartPole-v1 ppo seed 0: training return" in capsys.readouterr().out
    assert "run folder" in (run.path / "log.txt").read_text()
    assert [int(row["step"]) for row in read_rows(run.path / "eval.csv")] == [128, 256]
    monkeypatch.setattr(benchmark, "_launch", lambda *_: pytest.fail("ran again"))
    assert benchmark.main(options) == 0
    with pytest.raises(ConfigError, match="total_timesteps: 512 here, 256 there"):
        benchmark.main(write(tmp_path, total_timesteps=512))


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = write(tmp_path, total_timesteps=20_480)
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--study", str(options.study)]
    process = subprocess.Popen([*command, "--out", str(options.out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (found := list(options.out.glob("ppo/*/checkpoints/step_*.pt"))):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "finished" not in RunFolder(found[0].parents[1]).info
    (spec,) = benchmark.load(options).specs()
    time.sleep(0.5)  # the run ends with its study: it must not write any more
    before = len(read_rows(found[0].parents[1] / "progress.csv"))
    time.sleep(0.5)
    assert len(read_rows(found[0].parents[1] / "progress.csv")) == before
    assert benchmark._launch(asdict(spec), str(options.out.resolve()), 1) == 0
    (run,) = find_runs([options.out])
    assert run.info["resumes"][0]["step"] == run.info["finished"]["since"] >= 10_240
    assert run.info["finished"]["step"] == 20_480
    rows = [row for row in read_rows(run.path / "progress.csv") if row["time/iterations"]]  # others: evaluations
    assert [int(row["step"]) for row in rows] == [128 * k for k in range(1, 161)]


def test_a_failed_run_is_reported_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = write(tmp_path, seeds=[0, 1])
    launch = benchmark._launch

    def break_the_first(spec: dict[str, Any], out: str, cores: int) -> int:
        return launch(spec, out, cores if spec["values"]["seed"] else "no number")  # type: ignore[arg-type]

    monkeypatch.setattr(benchmark, "_launch", break_the_first)
    assert benchmark.main(options) == 1
    printed = capsys.readouterr().out
    assert "CartPole-v1 ppo seed 0: FAILED (exit status 1)" in printed
    assert "1 of 2 runs failed" in printed
    (good,) = find_runs([options.out])
    assert (good.info["seed"], good.info["finished"]["step"]) == (1, 256)


def test_an_error_inside_a_run_is_in_its_folder(tmp_path: Path) -> None:
    weights = {"ctrl_cost_weight": 3e38}  # more than one squared action is past what float32 holds
    (broken,) = study(settings={"ppo": TINY}, envs=["HalfCheetah-v5"], env_kwargs=weights).specs()
    assert benchmark._launch(asdict(broken), str(tmp_path), 1) == 1
    (run,) = find_runs([tmp_path])
    assert "reward is not finite" in run.info["error"]
    assert "Traceback" in (run.path / "log.txt").read_text()
    assert benchmark._summary(broken, tmp_path, 1).startswith("FAILED (FloatingPointError")
    assert benchmark._launch(asdict(broken), str(tmp_path), 1) == 1
    assert len(find_runs([tmp_path])) == 1, "the run without a checkpoint was not put aside"


def test_a_run_that_cannot_begin_leaves_its_log(tmp_path: Path) -> None:
    (spec,) = study(settings={"ppo": TINY}, env_kwargs={"max_episode_steps": 50}).specs()
    broken = benchmark.Spec(**asdict(spec) | {"values": spec.values | {"env_kwargs": {"no_such_option": 1}}})
    assert benchmark._launch(asdict(broken), str(tmp_path), 1) == 1
    assert not find_runs([tmp_path])
    summary = benchmark._summary(broken, tmp_path, 1)
    assert summary.startswith("FAILED (TypeError")
    assert "no_such_option" in summary
    assert "Traceback" in (tmp_path / "ppo" / "CartPole-v1__ppo__seed__0.log").read_text()


def test_ray_gives_the_results_of_local_processes_and_survives_a_lost_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    options = write(tmp_path, seeds=[0, 1])
    local = replace(options, out=tmp_path / "local")
    assert benchmark.main(replace(options, ray=True)) == 0
    assert benchmark.main(local) == 0
    specs = benchmark.load(options).specs()
    runs = [[spec.find(out.resolve()) for out in (options.out, local.out)] for spec in specs]
    for pair in runs:
        one, two = (read_columns(run.path / "progress.csv") for run in pair)
        for name in ("step", "rollout/ep_rew_mean", "train/loss"):
            np.testing.assert_array_equal(one[name], two[name])

    def dies(spec: dict[str, Any], out: str, cores: int) -> int:
        return os._exit(1) if spec["values"]["seed"] == 0 else 0

    monkeypatch.setattr(benchmark, "_launch", dies)
    assert {spec.values["seed"]: code for spec, code in benchmark._on_ray(specs, tmp_path)} == {0: 1, 1: 0}


def test_exit_status_and_environment(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "--out", str(tmp_path), "--agents", "nobody"]
    command += ["--envs", "CartPole-v1", "--total-timesteps", "10"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    assert "error: no agent 'nobody'" in done.stderr
