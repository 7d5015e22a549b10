import csv
import math
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import agents
from agents import AGENTS, FLOW_METHODS, METHODS, get_agent
from agents.search import space_of
from ccrl.experiment import config as configs
from ccrl.experiment.config import ConfigError
from ccrl.experiment.files import FolderInUseError
from scripts import training
from scripts.tune import Options, _claim, _study, _work, main, suggest, train_once, write

pytest.importorskip("optuna")

TINY = {"total_timesteps": 512, "evaluations": 2, "eval_episodes": 2, "sampler": "random"}


def fixed(path: Path, **settings: object) -> Path:
    path.write_text(yaml.safe_dump({"agent": settings}))
    return path


def test_a_study_resumes_and_its_best_settings_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = fixed(tmp_path / "small.yaml", num_envs=4, compile="off", hidden=[8])
    options = {**TINY, "config": small, "only": ("learning_rate", "n_epochs")}
    main(Options("ppo", "CartPole-v1", Path("study"), trials=2, **options))
    first = [t.params for t in _study(Options("ppo", "CartPole-v1", Path("study"), **options)).trials]
    best = main(Options("ppo", "CartPole-v1", Path("study"), trials=5, **options))
    rows = list(csv.DictReader(Path("study/trials.csv").read_text().splitlines()))
    assert len(rows) == 5
    assert len({row["learning_rate"] for row in rows}) == 5  # a study that goes on proposes others
    assert [float(row["learning_rate"]) for row in rows[:2]] == [p["learning_rate"] for p in first]
    values = {float(row["learning_rate"]): float(row["value"]) for row in rows if row["state"] == "COMPLETE"}
    found = yaml.safe_load(best.read_text())
    assert values[found["agent"]["learning_rate"]] == max(values.values())
    config = configs.parse(training.run_config("ppo"), [], best)
    assert (config.total_timesteps, config.agent.num_envs, config.agent.hidden) == (512, 4, (8,))
    last = list(csv.DictReader(Path("study/budget.csv").read_text().splitlines()))[-1]
    assert float(last["expected best"]) == max(values.values())


def test_a_language_model_is_tuned(tmp_path):
    small = fixed(tmp_path / "small.yaml", model="tabular", n_prompts=2)
    options = Options("grpo", "arms", tmp_path, total_timesteps=32, evaluations=1, eval_episodes=1, trials=1,
                      config=small, only=("learning_rate",))  # fmt: skip
    assert "learning_rate" in yaml.safe_load(main(options).read_text())["agent"]


def test_a_trial_must_not_train_longer_than_the_others(tmp_path):
    options = Options(
        "a2c", "CartPole-v1", tmp_path, total_timesteps=100, config=fixed(tmp_path / "c.yaml", num_envs=64)
    )
    with pytest.raises(ValueError, match=r"at most 100 samples per iteration.* got 320"):
        train_once(options, {}, 0)


def test_spaces_of_every_agent():
    """What is searched is taken by the agent, one value at a time, and is near its default: a name that means something
    else there (n_steps off policy, tau of a temperature) would be far from it."""
    for name in (*AGENTS, *FLOW_METHODS, *METHODS):
        config = get_agent(name).Config
        for setting, entry in space_of(config).items():
            ((kind, values),) = entry.items()
            default = getattr(config(), setting)
            for value in values:
                replace(config(), **{setting: value})
            assert len(values) > 1
            if kind == "log":
                assert values[0] < default < values[1], (name, setting)
            elif not isinstance(default, bool):
                assert min(values) / 4 <= default <= 4 * max(values), (name, setting, default)
    assert "clip_range" not in space_of(get_agent("a2c").Config)
    assert {"inner_steps", "n_steps"} <= space_of(get_agent("mdpo").Config).keys()
    assert "n_steps" not in space_of(get_agent("sac").Config)
    assert not {"n_steps", "normalise_obs"} & space_of(get_agent("harpg").Config).keys()  # a horizon; refused
    assert "clip_high" not in space_of(get_agent("dpo").Config)
    dbqpg = get_agent("dbqpg").Config  # whose step is TRPO's, without a step size, unless a file fixes another
    assert "learning_rate" not in space_of(dbqpg)
    assert "learning_rate" in space_of(dbqpg, fixed=dbqpg(update="natural"))


def test_words_may_be_searched():
    """Where an agent's own entry has words; elsewhere a word stays, as SAC's ent_coef, whose entry has numbers."""
    words = {"choice": ["group", "batch"]}
    config = type("Chosen", (get_agent("flow_grpo").Config,), {"search": {"advantage_std": words}})
    assert space_of(config)["advantage_std"] == words
    assert "ent_coef" not in space_of(get_agent("sac").Config)


def test_processes_share_a_study_and_bad_trials_are_broken_off(tmp_path, monkeypatch):
    """Trainings that are worth 100 times their gamma: no better ones than the first, which are whole."""
    begun = []

    def trained(options, settings, seed, report):
        begun.append(settings["gamma"])
        for step in (1, 2):
            report(-float(len(begun)) if len(begun) > 6 else 100.0 * settings["gamma"], step)
        return 100.0 * settings["gamma"]

    monkeypatch.setattr("scripts.tune.train_once", trained)
    options = Options("ppo", "CartPole-v1", tmp_path, trials=9, sampler="random", only=("gamma", "clip_range"))
    _study(options)
    both = [threading.Thread(target=_work, args=(options, worker)) for worker in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    write(options)
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert len(rows) in (9, 10)  # one may be under way when the ninth ends
    states = [row["state"] for row in rows]
    assert states.count("COMPLETE") >= 5  # the median is of five at least
    assert states.count("PRUNED") >= 2
    assert (tmp_path / "importance.png").stat().st_size > 1_000


def trained_by(monkeypatch, train):
    monkeypatch.setattr("scripts.tune.train_once", lambda options, settings, seed, report: train(seed))
    return {"sampler": "random", "only": ("learning_rate",)}


def test_a_training_that_diverges_is_a_failed_trial_with_its_reason(tmp_path, monkeypatch, capsys):
    """torch's error is a RuntimeError, that of a number too large for Python an OverflowError, and a return may be
    infinite: none ends the search."""
    raised = iter([RuntimeError("the matrix\nis singular"), OverflowError("too large"), None, None])
    values = iter([math.inf, 5.0])

    def train(seed):
        if (error := next(raised)) is not None:
            raise error
        return next(values)

    options = Options("ppo", "CartPole-v1", tmp_path, trials=4, **trained_by(monkeypatch, train))
    main(options)
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert [row["reason"] for row in rows] == [
        "RuntimeError: the matrix is singular", "OverflowError: too large",
        "FloatingPointError: expected finite returns, got [inf]", "",
    ]  # fmt: skip
    assert "trial 0: fail RuntimeError: the matrix is singular {" in capsys.readouterr().out


def test_where_no_trial_ends_the_reason_is_said(tmp_path, monkeypatch):
    def train(seed):
        raise RuntimeError("the matrix is singular")

    options = Options("ppo", "CartPole-v1", tmp_path, trials=1, **trained_by(monkeypatch, train))
    with pytest.raises(ValueError, match=r"got 1 that failed .*\(the last: RuntimeError: the matrix is singular\)"):
        main(options)


def test_trials_of_other_seeds_or_fixed_settings_are_another_study(tmp_path, monkeypatch):
    """Their values do not compare: the best of the one would be written as the other's."""
    same = trained_by(monkeypatch, float)
    options = Options("ppo", "CartPole-v1", tmp_path, trials=1, **same)
    main(options)
    main(replace(options, trials=2))
    with pytest.raises(ValueError, match=r"seeds: \[1000\] there, \[7\] here\); choose another --out"):
        main(replace(options, trials=3, seeds=(7,)))
    with pytest.raises(ValueError, match=r"config: .*'gamma': 0.5"):
        write(replace(options, config=fixed(tmp_path / "c.yaml", gamma=0.5)))


def test_the_file_of_fixed_settings_is_read_as_train_reads_it(tmp_path, monkeypatch):
    """Its device was left out, and a key that is none was taken without a word."""
    seen = {}

    class Noted(get_agent("ppo")):
        def __init__(self, env, config, **options):
            seen.update(options, env=env, settings=(config.hidden, config.gamma))
            raise KeyError

    monkeypatch.setattr(agents, "get_agent", lambda *_: Noted)
    path = tmp_path / "c.yaml"
    path.write_text("device: cuda:1\nenv: Hopper-v5\nenv_kwargs: {sutton_barto_reward: true}\nagent: {hidden: [4]}\n")
    options = Options("ppo", "CartPole-v1", tmp_path, config=path)
    with pytest.raises(KeyError):
        train_once(options, {"gamma": 0.9}, 3)
    assert seen == {"env": "CartPole-v1", "seed": 3, "device": "cuda:1", "env_kwargs": {"sutton_barto_reward": True},
                    "settings": ((4,), 0.9)}  # fmt: skip
    path.write_text("agnet: {hidden: [4]}\n")
    with pytest.raises(ConfigError, match=r"agnet: unknown key.*Did you mean agent"):
        main(options)


def test_two_processes_propose_different_trials(tmp_path, monkeypatch):
    options = Options("ppo", "CartPole-v1", tmp_path, only=("learning_rate",))
    space = {"learning_rate": {"log": [1e-5, 1e-1]}}
    studies = [_study(options, 0, process) for process in (0, 1)]  # both before the first trial
    with warnings.catch_warnings(action="ignore"):  # of a heart that beats in optimize() alone
        first, second = (suggest(study.ask(), space) for study in studies)
    assert first != second

    def held(folder):
        if folder.name == "0":
            raise FolderInUseError("by another process")

    monkeypatch.setattr("scripts.tune.Owner", held)
    assert _claim(options)[0] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: space_of(get_agent("ppo").Config, ("learning_rat",)), "only: expected some of .*got learning_rat"),
        (lambda: Options("ppo", "CartPole-v1", Path("x"), trials=0), "trials"),
        (lambda: Options("ppo", "CartPole-v1", Path("x"), seeds=()), "at least one"),
        (lambda: Options("ppo", "CartPole-v1", Path("x"), sampler="grid"), "sampler"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()
