"""The momentum study: errors against exact gradients, equal samples, summaries by hand, files that are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ccrl.experiment.csv_table import read_rows
from scripts.studies.momentum import study


def test_errors_are_those_of_the_direction_at_the_parameters_it_belongs_to(tmp_path: Path) -> None:
    options = {"methods": ("normalised",), "seeds": 2, "at": (1,)}
    (row,) = study.Errors(tmp_path, **options).run()
    expected: dict[str, list[float]] = {"error at 1": [], "gap": []}
    for seed in range(2):
        agent = study.tabular("normalised", seed, num_envs=1, learning_rate=0.5)
        agent.learn(until=1)
        truth = agent.env.exact_gradient(agent.policy, agent.updaters["policy"].flat.clone())
        agent.learn(until=agent.num_timesteps + 1)
        expected["error at 1"].append(float((agent.learner.direction.d - truth).norm() / truth.norm()))
        expected["gap"].append(float(agent.env.optimal_return() - agent.env.exact_return(agent.policy)))
    for name, values in expected.items():
        assert row[name] == pytest.approx(sum(values) / 2, rel=1e-6), name
        assert min(values) > 0


def test_all_methods_get_equal_trajectories(tmp_path: Path) -> None:
    rows = study.main([
        "samples", "--out", str(tmp_path), "--figures", str(tmp_path / "f"), "--methods", "nmpg", "nharpg", "--seeds",
        "2", "--learning-rates", "1.0", "--trajectories", "40", "--batch", "5",
    ])  # fmt: skip
    assert [row["method"] for row in rows] == ["nmpg", "nharpg"]
    gaps = [float(row["gap"]) for row in read_rows(tmp_path / "samples.csv") if row["method"] == "nmpg"]
    assert rows[0]["gap"] == pytest.approx(sum(gaps) / 2)
    assert rows[0]["gap sd"] == pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2))  # of a sample: one less
    text = (tmp_path / "f" / "momentum_samples.md").read_text()
    assert text.startswith("`python scripts/studies/momentum samples --out")
    assert f"| nmpg | 1 | {rows[0]['gap']:.4g} | {rows[0]['gap sd']:.4g} |" in text
    for method in ("nmpg", "nharpg"):
        agent = study.tabular(method, 0, num_envs=5, learning_rate=1.0)
        agent.learn(until=40 * agent.config.n_steps)
        # second rollouts count too; the last iteration may be one too many
        assert 40 * 15 <= agent.num_timesteps < (40 + 2 * 5) * 15


def curve(method: str, seed: int, *points: tuple[int, float], rate: float = 0.3) -> list[dict[str, Any]]:
    return [
        {"method": method, "gamma_0": rate, "seed": seed, "iteration": k, "steps": 1000 * k + seed, "return": value}
        for k, value in points
    ]


def test_summary_of_cartpole_by_hand(tmp_path: Path) -> None:
    options = study.CartPole(tmp_path, methods=("nmpg", "pg"), seeds=3, target=180.0)
    rows = [
        *curve("nmpg", 0, (2, 100.0), (4, 180.0), (6, 150.0)),  # reaches it, and falls again
        *curve("nmpg", 1, (2, 190.0), (4, 170.0), (6, 200.0)),
        *curve("nmpg", 2, (2, 10.0), (4, 20.0), (6, 30.0)),
        *(row for seed in range(3) for row in curve("pg", seed, (2, 9.0), (4, 179.9))),
    ]
    first, second = options.summary(rows)
    assert first == {
        "method": "nmpg", "gamma_0": 0.3, "reached": "2 of 3", "median iteration": 4, "median steps": 4000,
        "last return": pytest.approx(380 / 3),
    }  # fmt: skip
    assert (second["reached"], second["median iteration"]) == ("0 of 3", math.inf)
    assert second["last return"] == pytest.approx(179.9)
    figure = study.figure(rows, options.target)
    mean = [line for line in figure.axes[0].lines if line.get_label().startswith("nmpg")]
    assert [list(line.get_ydata()) for line in mean] == [[100.0, 370 / 3, 380 / 3]]


def test_step_sizes_of_cartpole_are_chosen_on_the_first_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[tuple[Any, ...]] = []

    def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
        played.append((cell["method"], cell["gamma_0"], cell["seed"]))
        good = cell["gamma_0"] in (0.3, 1e-3)
        return [{"iteration": 2, "steps": 7, "return": 50.0 + 100.0 * good * (cell["seed"] == 0)}]

    monkeypatch.setattr(study, "play_cartpole", play)
    rows = study.CartPole(tmp_path, methods=("pg", "nmpg"), seeds=2).run()
    assert played[:6] == [("pg", r, 0) for r in (3e-4, 1e-3, 3e-3)] + [("nmpg", r, 0) for r in (0.1, 0.3, 1.0)]
    assert played[6:] == [("pg", 1e-3, 1), ("nmpg", 0.3, 1)]
    assert [(row["method"], row["seed"]) for row in rows] == [("pg", 0), ("pg", 1), ("nmpg", 0), ("nmpg", 1)]


def test_bad_input(tmp_path: Path) -> None:
    for options, message in (({"methods": ("adam",)}, "methods: expected some of"), ({"seeds": 0}, "seeds >= 1"),
                             ({"jobs": 0}, "jobs >= 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            study.Errors(tmp_path, **options)  # type: ignore[arg-type]
