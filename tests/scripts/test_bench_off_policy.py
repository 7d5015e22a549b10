"""The benchmark of whole off-policy loops runs, in small, and its floor counts the products."""

from __future__ import annotations

import pytest

from scripts.bench import off_policy


def test_it_names_the_sides_and_their_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3")
    config = off_policy.Config(
        agent="td3", task="Pendulum-v1", hidden=(8,), batch_size=8, settings=((2, 1),), steps=2, rounds=1, compile="off"
    )
    text = off_policy.main(config)
    assert text in capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| 2 ")]
    assert [[cell.strip() for cell in row] for row in rows][:2] == [["2", "1", "ccrl"], ["2", "1", "SB3"]]


def test_the_floor_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of ``[m, k]`` and ``[k, n]`` taken to last ``m k n``: Pendulum has 3 observations and 1 action."""
    monkeypatch.setattr(off_policy, "_seconds", lambda rows, inner, columns: float(rows * inner * columns))
    config = off_policy.Config(agent="sac", task="Pendulum-v1", hidden=(5,), batch_size=2)
    # actor [3, 5], [5, 2]: forward 2 * (15 + 10) = 50, weights the same, inputs of the second layer 20;
    # critic [4, 5]: forward 40, weights 40, inputs none, of the first layer 40.
    # SAC: actor 50 (targets) + 50 + 50 + 20; each of two critics 40 (targets) + 40 + 40, and 40 + 40 for the actor
    assert off_policy.floor(config, 1) == 170.0 + 2 * (120.0 + 80.0)
    # TD3: the actor's last layer has 1 output: forward 2 * (15 + 5) = 40, inputs 10, half of the steps, one critic
    config.agent = "td3"
    assert off_policy.floor(config, 3) == 3 * (40.0 + 0.5 * (40.0 + 40.0 + 10.0) + 2 * 120.0 + 0.5 * 80.0)
