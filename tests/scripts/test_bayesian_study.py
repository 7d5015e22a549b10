"""The Bayesian study: equal episodes for all, runs that are not repeated, tables, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gpytorch")

from agents.bac import BACConfig
from agents.ppo import PPOConfig
from ccrl.experiment.cells import CellsFailed
from ccrl.experiment.csv_table import read_rows
from ccrl.policies import GibbsPolicy
from envs.classic.mountain_car import MAX_SPEED
from scripts.studies.bayesian import runs, study

TINY = {"updates": 2, "evaluate_every": 1, "start_speed": 1.0}
SIZES = {"num_envs": 3, "n_steps": 30, "learning_rate": 0.01}


# -- the mountain car -------------------------------------------------------------------------------------------------


def test_every_method_sees_the_same_number_of_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the environment: first ends after a reset, and what the study writes down."""
    ended: list[int] = []
    running: list[Any] = [None]
    reset, step = runs.Car.reset, runs.Car.step

    def counting_reset(self: Any, seed: int | None = None, mask: Any = None) -> Any:
        if self.num_envs == runs.EPISODES:
            running[0] = torch.ones(self.num_envs, dtype=torch.bool)
        return reset(self, seed, mask)

    def counting_step(self: Any, action: Any) -> Any:
        result = step(self, action)
        if self.num_envs == runs.EPISODES:
            first = running[0] & (result.terminated | result.truncated)
            ended[-1] += int(first.sum())
            running[0] = running[0] & ~first
        return result

    monkeypatch.setattr(runs.Car, "reset", counting_reset)
    monkeypatch.setattr(runs.Car, "step", counting_step)
    starts = []
    for method, rates in runs.RATES.items():
        ended.append(0)
        points = runs.play({"env": runs.CAR, "method": method, "seed": 5, "rate": rates[0]} | TINY)
        assert [point["episodes"] for point in points] == [0, 5, 10]
        assert ended[-1] == 10
        assert 0 < points[-1]["steps"] <= 10 * runs.HORIZON
        starts.append({k: v for k, v in points[0].items() if k != "cpu_seconds"})
    assert len(starts) == 4
    # the same policy judged on the same episodes before anything is learnt
    assert all(start == starts[0] for start in starts)
    assert starts[0]["rest_return"] == -200.0  # coin flips do not leave the valley
    assert starts[0]["return"] > -200.0
    assert 0.0 < starts[0]["reached"] < 1.0


def test_the_car_starts_within_the_speed_of_each_copy() -> None:
    env = runs.Car(4000, np.repeat((1.0, 0.25), 2000))
    obs = env.reset(seed=0)
    position, velocity = obs.T
    assert bool(((position >= -0.6) & (position <= -0.4)).all())
    for speed, half in ((1.0, velocity[:2000]), (0.25, velocity[2000:])):
        assert 0.98 * speed * MAX_SPEED < float(half.max()) <= speed * MAX_SPEED + 1e-7
        assert abs(float(half.mean())) < 0.05 * speed * MAX_SPEED
    assert obs.dtype == torch.float32
    assert env.step(torch.zeros(4000, dtype=torch.int64)).obs.dtype == torch.float32
    assert env.episodes == 4000
    env.reset(mask=torch.ones(4000, dtype=torch.bool))
    assert env.episodes == 4000


def test_monte_carlo_steps_along_scores_times_discounted_returns() -> None:
    def agent() -> Any:
        return runs.MonteCarlo(runs.Car(3, 1.0), BACConfig(**SIZES, policy="grid", gamma=0.9), seed=2, baseline=False)

    first, second = agent(), agent()
    first.learn(until=1)
    theta = second.updaters["policy"].flat
    (request,) = second.estimator.plan({"on": theta}, {}, second.ctx)
    data = second.collector.collect(request, second.policy)
    objective, rewards, valid = 0.0, data["reward"].tolist(), data["valid"].tolist()
    log_prob = second.policy.evaluate(data, frozenset({"log_prob"}))["log_prob"]
    for i in range(3):
        to_go = 0.0
        for t in reversed(range(30)):
            to_go = valid[t][i] * (rewards[t][i] + 0.9 * to_go)
            objective = objective + log_prob[t, i] * to_go / 3
    (gradient,) = torch.autograd.grad(objective, [second.policy.theta])
    assert float(gradient.norm()) > 0
    assert torch.allclose(first.policy.theta, 0.01 * gradient, atol=1e-6)


def test_ppo_learns_from_the_steps_of_its_episodes_alone_and_with_the_same_policy() -> None:
    env = runs.Car(20, 1.0)
    agent = runs.EpisodicPPO(env, PPOConfig(num_envs=20, n_steps=200, n_epochs=1, compile="off"), seed=1)
    assert isinstance(agent.policy.actor, GibbsPolicy)
    assert agent.policy.actor.theta.shape == (2, 16)
    (request,) = agent.estimator.plan({}, {}, agent.ctx)
    data = agent.collector.collect(request, agent.policy)
    steps = int(data["valid"].sum())
    assert steps < 20 * 200  # the fastest reach the goal early
    prepared = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
    assert prepared.shape == (1, steps)
    assert bool((prepared["valid"] == 1).all())
    assert float(prepared["return"].max()) <= 0.0  # the critic is 0: returns of steps that cost 1
    before = agent.updaters["policy"].flat.clone()
    agent.learn(until=agent.num_timesteps + 1)
    moved = (agent.updaters["policy"].flat - before).abs()
    assert bool((moved > 0).any())
    assert env.episodes == 40


# -- runs that a file lacks -------------------------------------------------------------------------------------------


def point(x: int, value: float) -> dict[str, Any]:
    return {"episodes": x, "steps": 10 * x, "return": value, "reached": 0.5, "rest_return": value - 1, "cpu_seconds": 0}


def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs that cost nothing; a rate of 0.001 is the best of all."""
    played: list[dict[str, Any]] = []

    def play(run: dict[str, Any]) -> list[dict[str, Any]]:
        played.append(run)
        last = -100.0 - 1000 * abs(run["rate"] - 0.001) - run["seed"] % 10
        return [point(0, -200.0), point(5, last), point(10, last)]

    monkeypatch.setattr(runs, "play", play)
    return played


def test_step_sizes_come_from_other_seeds_and_nothing_runs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = fake(monkeypatch)
    command = ["mountaincar", "--out", str(tmp_path), "--seeds", "0", "1", "--methods", "bac", "mc", "--updates", "2"]
    rows = study.main(command)
    search, final = played[: 2 * len(runs.RATES["mc"])], played[2 * len(runs.RATES["mc"]) :]
    assert {run["seed"] for run in search} == {1000, 1001}
    assert {run["method"] for run in search} == {f"mc rate={rate:g}" for rate in runs.RATES["mc"]}
    assert [(run["method"], run["seed"], run["rate"]) for run in final] == [
        ("bac", 0, 0.025), ("mc", 0, 0.001), ("bac", 1, 0.025), ("mc", 1, 0.001)
    ]  # fmt: skip
    assert len(rows) == 4 * 3
    assert len(read_rows(tmp_path / "mountaincar_search.csv")) == len(search) * 3
    played.clear()
    assert study.main(command) == rows
    assert not played
    study.main([*command[:5], "2", *command[5:]])  # one more seed: 0, 1 and 2
    assert [(run["method"], run["seed"]) for run in played] == [("bac", 2), ("mc", 2)]


def test_a_run_that_fails_leaves_the_finished_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = fake(monkeypatch)
    whole = runs.play
    options = study.MountainCar(tmp_path, seeds=(0, 1), methods=("bac",))

    def broken(run: dict[str, Any]) -> Any:
        if run["seed"] == 1:
            raise FloatingPointError("not finite")
        return whole(run)

    monkeypatch.setattr(runs, "play", broken)
    with pytest.raises(CellsFailed, match="FloatingPointError: not finite"):
        options.run()
    assert {row["seed"] for row in read_rows(tmp_path / "mountaincar.csv")} == {"0"}
    monkeypatch.setattr(runs, "play", whole)
    played.clear()
    assert {row["seed"] for row in options.run()} == {"0", "1"}
    assert [run["seed"] for run in played] == [1]


def test_other_settings_do_not_mix_with_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    study.MountainCar(tmp_path, seeds=(0,), methods=("bac",), updates=2).run()
    with pytest.raises(ValueError, match="bac 0 was run with updates=2, expected updates=3; choose another file"):
        study.MountainCar(tmp_path, seeds=(0,), methods=("bac",), updates=3).run()


def test_processes_give_the_rows_of_one_process(tmp_path: Path) -> None:
    options = {"seeds": (0, 1), "methods": ("bac",), "updates": 1}
    rows = [study.MountainCar(tmp_path / str(n), **options, jobs=n).run() for n in (1, 2)]
    timeless = [sorted(str(row | {"cpu_seconds": "", "seconds": ""}) for row in one) for one in rows]
    assert len(rows[0]) == 4
    assert timeless[0] == timeless[1]


# -- DBQPG and the report ---------------------------------------------------------------------------------------------


def test_dbqpg_runs_and_their_costs(tmp_path: Path) -> None:
    command = ["dbqpg", "--out", str(tmp_path), "--envs", "InvertedPendulum-v5", "--timesteps", "120"]
    rows = study.main([*command, "--batch", "60", "--seeds", "0"])
    assert [(row["method"], row["steps"]) for row in rows] == [
        (method, steps) for method in ("mc", "dbqpg", "uapg") for steps in ("60", "120")
    ]
    for row in rows:
        kernel, solve, gp, step, everything = (
            float(row[f"{name}_seconds"]) for name in ("kernel", "solve", "gp", "step", "all")
        )
        assert gp == pytest.approx(kernel + solve)
        assert min(kernel, solve, step) > 0
        assert kernel + solve + step < everything
    assert rows[0]["return"] == rows[2]["return"] == rows[4]["return"]  # one seed, one first policy
    study.main(["report", "--out", str(tmp_path), "--figures", str(tmp_path / "figures")])
    text = (tmp_path / "figures" / "bayesian_dbqpg.md").read_text()
    assert "| InvertedPendulum-v5 | uapg | " in text
    assert text.startswith("`python scripts/studies/bayesian dbqpg ")


def test_costs_are_means_over_runs_of_medians_over_iterations() -> None:
    def row(seed: int, seconds: float) -> dict[str, str]:
        names = ("kernel_seconds", "solve_seconds", "gp_seconds", "step_seconds", "all_seconds")
        return {"env": "E", "method": "m", "seed": str(seed)} | {name: str(seconds) for name in names}

    rows = [row(0, 1.0), row(0, 2.0), row(0, 30.0), row(1, 4.0)]  # medians 2 and 4
    assert study.costs(rows).splitlines()[-1] == "| E | m | 3.000 | 3.000 | 3.000 | 3.000 | 3.000 |"


def test_report_of_the_mountain_car(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    study.main(["mountaincar", "--out", str(tmp_path), "--seeds", "0", "1", "2", "--methods", "bac", "mc"])
    study.main(["report", "--out", str(tmp_path), "--figures", str(tmp_path / "f")])
    names = {path.name for path in (tmp_path / "f").iterdir()}
    assert {f"bayesian_{n}.{s}" for n in ("mountaincar", "mountaincar_search") for s in ("md", "csv", "png")} <= names
    text = (tmp_path / "f" / "bayesian_mountaincar.md").read_text()
    assert text.startswith(f"`python scripts/studies/bayesian mountaincar --out {tmp_path}")
    assert "**starts as in training**, to 10 episodes" in text
    assert "| mc | 3 | -101 [" in text  # the mean of -100, -101, -102
    assert "**starts near rest**" in text
    assert "| mc | 3 | -102 [" in text
    assert "* mc on ccrl/MountainCarTwoActions-v0: rate=0.001 updates=200" in text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda out: study.MountainCar(out, methods=("bac", "trpo")), "methods: expected some of bac, .* got trpo"),
        (lambda out: study.MountainCar(out, seeds=(0, 7), search_seeds=(7,)), r"search_seeds: .* \[7\] in both"),
        (lambda out: study.MountainCar(out, seeds=()), "at least one seed"),
        (lambda out: study.MountainCar(out, jobs=0), "jobs >= 1"),
        (lambda out: study.MountainCar(out, updates=0), "updates, evaluate_every >= 1"),
        (lambda out: study.MountainCar(out, start_speed=1.5), r"start_speed in \[0, 1\]"),
        (lambda out: study.DBQPG(out, methods=("gp",)), "methods: expected some of mc, dbqpg, uapg, got gp"),
        (lambda out: study.DBQPG(out, envs=("Swimmer-v5",)), r"one entry each per environment, got \(1, 2, 2\)"),
        (lambda out: study.DBQPG(out, batch=(5, 3000)), r"batch: expected at least 6.* \[5\]"),
        (lambda out: study.Report(out).run(), "expected a folder with mountaincar.csv"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_a_dbqpg_run_without_a_finished_episode_says_so() -> None:
    run = {"env": "Swimmer-v5", "method": "mc", "seed": 0, "timesteps": 60, "batch": 60}
    with pytest.raises(ValueError, match="Swimmer-v5: no episode ended within 60 steps"):
        runs.play(run | {"update": "trpo", "targets": "returns"})
