"""SB3 in a study: folders that the plots read, our names of its settings, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ccrl.experiment import config as configs
from ccrl.experiment.config import ConfigError
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.curves import load_study
from scripts import benchmark, benchmark_study
from scripts.benchmark_study import Study


def study(agent: str, **settings: object) -> Study:
    entry = {"agents": [agent], "envs": ["CartPole-v1"], "total_timesteps": 256}
    return configs.from_dict(Study, {"entries": [entry], "seeds": [0], "settings": {agent: settings}})


def test_sb3_writes_folders_that_the_plots_read(tmp_path: Path) -> None:
    pytest.importorskip("stable_baselines3")
    options = benchmark.Options(
        out=tmp_path, agents=("ppo", "sb3:ppo"), envs=("CartPole-v1",), seeds=(0,), total_timesteps=2048, evals=1
    )
    ours, theirs = benchmark.load(options).specs()
    theirs = benchmark_study.Spec(theirs.agent, theirs.label, theirs.values | {"agent": {"n_steps": 1024}})
    run = benchmark.sb3.run("sb3:ppo", theirs.config(), theirs.root(tmp_path), benchmark.training.timed)
    assert run.info["finished"]["step"] == 2048
    assert "as_vec_env" in run.info["environment"]
    assert theirs.find(tmp_path) is not None
    assert ours.find(tmp_path) is None
    curves = load_study([tmp_path]).curves
    assert [(c.agent, c.seed, list(c.steps)) for c in curves] == [("sb3:ppo", 0, [1024, 2048])]
    columns = read_columns(run.path / "progress.csv")
    assert {"rollout/ep_len_mean", "time/fps", "train/approx_kl", "train/explained_variance"} <= columns.keys()
    evaluation = read_columns(run.path / "eval.csv")
    assert list(evaluation["step"]) == [2048]
    assert {"eval/mean_reward", "eval_stochastic/mean_reward"} <= evaluation.keys()


def test_our_names_of_sb3s_settings() -> None:
    arguments, num_envs = benchmark.sb3.model_arguments(
        {"num_envs": 3, "hidden": [8, 4], "activation": "relu", "adam_eps": 1e-6, "orthogonal": False,
         "log_std_init": -0.5, "gamma": 0.9,
         "policy_kwargs": {"squash_output": True, "optimizer_kwargs": {"weight_decay": 0.1}}}
    )  # fmt: skip
    assert num_envs == 3
    assert arguments == {"gamma": 0.9, "policy_kwargs": {
        "squash_output": True, "net_arch": [8, 4], "activation_fn": torch.nn.ReLU,
        "optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-6},
        "ortho_init": False, "log_std_init": -0.5,
    }}  # fmt: skip
    assert benchmark.sb3.model_arguments({}) == ({}, 1)


def test_sb3s_td3_explores_with_the_noise_it_is_given(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    config = benchmark.sb3.SB3Config("Pendulum-v1", 8, agent={"exploration_noise": 0.3, "learning_starts": 4})
    benchmark.sb3.check("sb3:td3", config)
    run = benchmark.sb3.run("sb3:td3", config, tmp_path, benchmark.training.timed)
    noise = sb3.TD3.load(run.path / "final.zip").action_noise
    assert (noise._mu.tolist(), noise._sigma.tolist()) == ([0.0], [0.3])


def test_sb3_normalises_with_our_names_in_training_and_in_evaluation(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    settings = {"n_steps": 64, "batch_size": 32, "gamma": 0.9, "normalise_obs": True, "normalise_reward": True}
    config = benchmark.sb3.SB3Config("Pendulum-v1", 64, agent=settings | {"clip_norm": 5.0})
    benchmark.sb3.check("sb3:ppo", config)
    run = benchmark.sb3.run("sb3:ppo", config, tmp_path, benchmark.training.timed)
    venv = benchmark.sb3.as_vec_env(benchmark.envs.make("Pendulum-v1", 1))
    norm = sb3.common.vec_env.VecNormalize.load(str(run.path / "final.normalise.pkl"), venv)
    assert (norm.gamma, norm.clip_obs, norm.clip_reward) == (0.9, 5.0, 5.0)
    assert norm.obs_rms.count == pytest.approx(65, abs=0.01)  # 64 steps and the reset
    model, obs = sb3.PPO.load(run.path / "final.zip", env=norm), torch.tensor([[0.6, -0.8, 4.0]])
    raw, normed = (model.predict(x, deterministic=True)[0] for x in (obs.numpy(), norm.normalize_obs(obs.numpy())))
    assert raw != normed
    assert benchmark.sb3._Learner(model).act(obs, True).numpy() == normed
    with pytest.raises(ConfigError, match="clip_norm: it clips what is normalised"):
        benchmark.sb3.check("sb3:ppo", benchmark.sb3.SB3Config("Pendulum-v1", 64, agent={"clip_norm": 5.0}))


def test_our_callbacks_read_an_sb3_model() -> None:
    asked: list[bool] = []

    class Model:
        num_timesteps = 12
        ep_info_buffer = ({"r": 1.0, "l": 3}, {"r": 4.0, "l": 5})

        def get_vec_normalize_env(self) -> None:
            return None

        def predict(self, obs: Any, deterministic: bool) -> Any:
            asked.append(deterministic)
            return (obs["x"] if isinstance(obs, dict) else obs) + 1, None

    learner = benchmark.sb3._Learner(Model())
    assert (learner.num_timesteps, learner.ep_rew_mean) == (12, 2.5)
    for deterministic in (True, False):
        assert learner.act({"x": torch.zeros(2)}, deterministic).tolist() == [1.0, 1.0]
        assert learner.act(torch.zeros(2), deterministic).tolist() == [1.0, 1.0]
    assert asked == [True, True, False, False]
    Model.ep_info_buffer = ()
    assert learner.ep_rew_mean is None


def test_an_sb3_argument_that_does_not_exist_is_refused() -> None:
    pytest.importorskip("stable_baselines3")
    with pytest.raises(ConfigError, match=r"sb3:ppo: unknown setting 'clip_rnge'.*clip_range"):
        study("sb3:ppo", clip_rnge=0.1).specs()
    with pytest.raises(ValueError, match=r"expected sb3: and one of .*ppo.*got 'sb3:pppo'"):
        study("sb3:pppo").specs()


def test_without_sb3_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match="pip install"):
        study("sb3:ppo").specs()
