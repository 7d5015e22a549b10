"""Settings that the package brings: they fit their agents, are found by name, and flags win over them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agents import tuned
from ccrl.experiment import config as configs
from ccrl.settings import ConfigError
from scripts import train, training
from scripts.studies.tuned import study

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
    pair = study.Pair("ppo", "Hopper-v5")
    rows = [
        {"env": "Hopper-v5", "agent": "ppo", "seed": str(seed), "settings": mark, "step": str(step), "return": str(r),
         "stochastic": "1", "cpu_seconds": "1800"}
        for seed, mark, curve in ((100, pair.mark, (0, 10, 20)), (101, pair.mark, (5, 20, 30)), (102, "old", (9, 9, 9)))
        for step, r in zip((1, 2, 3), curve)
    ]  # fmt: skip
    found = study.reached(pair, rows)
    # the last two evaluations of each run: (10 + 20) / 2 and (20 + 30) / 2; settings of old are others
    assert (found.runs, found.step, found.returns, found.cpu_hours) == (2, 3, [15, 25], 1)
    # Student with one degree of freedom: 20 -+ 12.706 * sqrt(50) / sqrt(2)
    assert found.text(found.returns) == "20 [-43.5, 83.5]"
    table = study.page(rows)
    assert "| ppo | Hopper-v5 | 3 | 2 | 20 [-43.5, 83.5] | 1 [1, 1] | 1.00 | rl-baselines3-zoo" in table
    assert table.count("not yet run here") == len(FILES) - 1


def test_the_study_has_what_the_page_says():
    count = {agent: sum(p.agent == agent for p in study.PAIRS) for agent in ("ppo", "mdpo", "bpo", "sac")}
    assert count == {"ppo": 12, "mdpo": 4, "bpo": 4, "sac": 4}
    rows = study._rows(study.ROWS)
    assert (study.ROOT / "docs" / "tuned.md").read_text("utf-8") == study.page(rows)
    for pair in study.PAIRS:
        found, says = study.reached(pair, rows), tuned.head(pair.file)["Reached here"]
        assert says.startswith("not yet run here" if found is None else found.text(found.returns))
