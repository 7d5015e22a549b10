"""The benchmark of updates runs, in small."""

from __future__ import annotations

import pytest

from scripts.bench import replay


@pytest.mark.parametrize("agent", ["sac", "td3"])
def test_it_names_both_sides_and_their_ratio(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("stable_baselines3")
    text = replay.main(
        replay.Config(agent=agent, hidden=(8,), batch_size=8, updates=2, rounds=1, compile="off", sizes=(100,))
    )
    assert text in capsys.readouterr().out
    assert "ours" in text
    assert "SB3" in text
    assert "memory of 100:" in text
