"""Settings that the package brings: they fit their agents, are found by name, and flags win over them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from agents import tuned
from ccrl.experiment import config as configs
from ccrl.settings import ConfigError
from scripts import train, training
from scripts.benchmark_study import Study
from scripts.studies.tuned import pairs, study

FILES = [(agent, env, path) for agent, files in tuned.tuned().items() for env, path in files.items()]


@pytest.mark.parametrize(("agent", "env", "path"), FILES, ids=[f"{agent}-{env}" for agent, env, _ in FILES])
def test_a_file_fits_its_agent_and_says_where_it_is_from(agent, env, path):
    config = configs.from_dict(training.run_config(agent), configs.load_yaml(path))
    assert config.env == env
    assert path.stem == env.rpartition(":")[2].lower()
    assert tuned.head(path).keys() == {"Source", "Reached here"}


def test_flags_win_over_the_file(monkeypatch, capsys):
    monkeypatch.setattr(training, "build", lambda name, config: (name, config))
    name, config = train.prepare(["ppo", "--env=Hopper-v5", "--tuned", "--gamma", "0.9", "--seed", "3"])
    file = configs.from_dict(training.run_config("ppo"), configs.load_yaml(tuned.find("ppo", "Hopper-v5")))
    expected = replace(file, seed=3, agent=replace(file.agent, gamma=0.9))
    assert (name, configs.to_dict(config)) == ("ppo", configs.to_dict(expected))
    assert file.agent.learning_rate == 9.80828e-05  # the zoo's, for Hopper-v3
    assert "tuned settings" in capsys.readouterr().out
    _, config = train.prepare(["ppo", "--env", "CartPole-v1", "--tuned", "--env=Hopper-v5"])
    assert (config.env, config.agent.learning_rate) == ("Hopper-v5", 9.80828e-05), "the last one, as of all flags"
    _, config = train.prepare(["ppo", "--tuned"])
    assert config.env == "HalfCheetah-v5"
    assert tuned.find("ppo", "ccrl/Hopper-v5") == tuned.find("ppo", "Hopper-v5")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["a2c", "--env", "CartPole-v1", "--tuned"], ConfigError, r"agent with tuned settings \(bpo, .*ppo.*got a2c"),
        (["ppo", "--env", "Hoper-v5", "--tuned"], ConfigError, r"Acrobot-v1, .*got Hoper-v5; did you mean Hopper-v5\?"),
        (["ppo", "--env", "ccrl/LQR-v0", "--tuned"], ConfigError, "or search some with scripts/tune.py"),
        (["ppo", "--config", __file__, "--tuned"], SystemExit, "expected no --config beside it"),
    ],
)
def test_what_there_is_is_named(words, error, message):
    with pytest.raises(error, match=message):
        train.prepare(words)


def test_what_was_reached_by_hand():
    pair = pairs.Pair("ppo", "Hopper-v5")
    rows = [
        {"env": "Hopper-v5", "agent": "ppo", "seed": str(seed), "settings": mark, "step": str(step), "return": str(r),
         "stochastic": "1", "commit": "0123", "torch": "2", "threads": "1", "cpu_seconds": cpu}
        for seed, mark, curve, cpu in ((100, pair.mark, (0, 10, 20), "1800"), (101, pair.mark, (5, 20, 30), ""),
                                       (102, "old", (9, 9, 9), "9"))
        for step, r in zip((1, 2, 3), curve)
    ]  # fmt: skip
    found = pairs.reached(pair, rows)
    # the last two evaluations of each run: (10 + 20) / 2 and (20 + 30) / 2; settings of old are others; one run was
    # broken off and has no time
    assert (found.seeds, found.step, found.returns, found.cpu_minutes) == ([100, 101], 3, [15, 25], 30)
    # Student with one degree of freedom: 20 -+ 12.706 * sqrt(50) / sqrt(2)
    assert found.text(found.returns) == "20 [-43.5, 83.5]"
    table = study.page(rows)
    assert "| ppo | Hopper-v5 | 3 | 2: 100 to 101 | 20 [-43.5, 83.5] | 1 [1, 1] | 30.0 | rl-baselines3-zoo" in table
    assert table.count("| not yet run here |") == len(FILES) - 1
    assert "**1 of the study's 24 pairs are run.** Not yet: sac on HalfCheetah-v5, " in table
    assert "their intervals say little: ppo on Hopper-v5 (2)" in table


def test_sb3_gets_the_same_settings_and_stands_beside_ours():
    pair = pairs.Pair("sb3:ppo", "Ant-v5", seeds=3)
    (spec, *others) = configs.from_dict(Study, pair.study(5)).specs()
    assert len(others) == 2  # its own number of seeds
    config, ours = spec.config(), pair.config()
    assert config.agent["learning_rate"] == 3e-4  # in the file a text to YAML
    assert all(getattr(ours, name) == value for name, value in config.agent.items())
    assert config.agent.keys() == configs.load_yaml(pair.file)["agent"].keys()
    rows = [
        {"env": "Ant-v5", "agent": agent, "seed": str(seed), "settings": mark, "step": "1", "return": str(value),
         "stochastic": "1", "commit": "0123", "torch": "2", "threads": "1", "cpu_seconds": "60"}
        for agent, mark, values in (("ppo", pairs.Pair("ppo", "Ant-v5").mark, (10, 20)), ("sb3:ppo", pair.mark, (1, 3)))
        for seed, value in zip((100, 101), values)
    ]  # fmt: skip
    table = study.page(rows)
    # variances 25 and 1 of the means: 13 -+ t(26^2 / (25^2 + 1) = 1.0799) * sqrt(26), t = 10.687
    assert "| Ant-v5 | 2: 100 to 101 | 2 [-10.7, 14.7] | 2: 100 to 101 | 15 [-48.5, 78.5] | 13 [-41.5, 67.5] |" in table
    assert table.count("sb3:ppo") == 1  # the command; no row of the table of settings
    assert "Stable-Baselines3\n" not in study.page(rows[:2])


def test_the_study_has_what_the_page_says():
    count = {agent: sum(p.agent == agent for p in pairs.PAIRS) for agent in ("ppo", "mdpo", "bpo", "sac")}
    assert count == {"ppo": 12, "mdpo": 4, "bpo": 4, "sac": 4}
    rows = pairs.all_rows()
    assert (pairs.ROOT / "docs" / "tuned.md").read_text("utf-8") == study.page(rows)
    for pair in pairs.PAIRS:
        assert tuned.head(pair.file)["Reached here"] == pairs.heading(pairs.reached(pair, rows))


def test_runs_of_the_off_policy_study_count_where_settings_are_equal():
    with pytest.raises(ValueError, match=r"starts: 100 here, 10000 there; learning_rate: 0.001 here"):
        pairs.same_settings(pairs.Pair("sac", "Pendulum-v1", 20_000, elsewhere=True))
    with pytest.raises(ValueError, match=r"steps: 50000 here, \[100000\] there"):
        pairs.same_settings(pairs.Pair("sac", "Hopper-v5", 50_000, elsewhere=True))


def run_folder(out, pair, seed, finished=True):
    """A run as the benchmark leaves it."""
    (spec,) = (s for s in configs.from_dict(Study, pair.study(5)).specs() if s.values["seed"] == seed)
    path = out / f"{pair.agent}__{pair.env}__{pair.mark}" / pair.agent / f"{pair.env}__{seed}"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(configs.to_dict(spec.config())))
    info = {"env": pair.env, "agent": pair.agent, "seed": seed, "versions": {"torch": "2"}, "threads": {"torch": 1}}
    done = {"finished": {"since": 0, "cpu_seconds": 60.0}} if finished else {}
    (path / "run.json").write_text(json.dumps(info | done))
    (path / "eval.csv").write_text(f"step,eval/mean_reward,eval_stochastic/mean_reward\n5000,{seed},2\n")


def test_rows_of_finished_runs_join_the_others(tmp_path):
    pair = pairs.Pair("ppo", "CartPole-v1")
    for seed, finished in ((101, True), (100, True), (102, False)):
        run_folder(tmp_path / "runs", pair, seed, finished)
    options = study.Options(tmp_path / "runs", tmp_path / "tuned.csv", page_only=True)
    old = dict.fromkeys(study.COLUMNS, "1") | {"agent": "ppo", "env": "CartPole-v1"}
    lines = [old | {"seed": "100", "settings": "old"}, old | {"seed": "103", "settings": pair.mark}]
    text = [",".join(study.COLUMNS), *(",".join(row.values()) for row in lines)]
    options.rows.write_text("\n".join(text) + "\n")
    study.main(options)
    # of the settings of before nothing is left, a run whose folder is elsewhere keeps its row
    kept = [(row["seed"], row["step"], row["return"], row["stochastic"]) for row in pairs.rows_in(options.rows)]
    assert kept == [("100", "5000", "100", "2"), ("101", "5000", "101", "2"), ("103", "1", "1", "1")]
    page = (tmp_path / "tuned.md").read_text("utf-8")
    assert "| ppo | CartPole-v1 | 5,000 | 3: 100, 101, 103 |" in page
    study.main(options)
    assert (tmp_path / "tuned.md").read_text("utf-8") == page
