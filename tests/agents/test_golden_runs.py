"""Three iterations of every agent against stored numbers: a change of results is seen and meant, never an accident.

After a change that is meant to change results: ``python -m pytest tests/agents/test_golden_runs.py --update-golden``.
The tolerance leaves room for the rounding of other CPUs, none for a changed step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agents import get_agent

FILE = Path(__file__).parents[1] / "golden" / "short_runs.json"
RUNS = [
    f"{agent}:{env}"
    for agent in ("ppo", "mdpo", "bpo")
    for env in ("CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5")
]


def _run(name: str) -> dict[str, Any]:
    agent_name, env = name.split(":")
    cls = get_agent(agent_name)
    agent = cls(env, cls.Config(num_envs=4, n_steps=32, hidden=(16,), compile="off"), seed=0)
    agent.learn(until=3 * agent.samples_per_iteration)
    weights = {k: v.detach() for k, v in agent.policy.named_parameters() if v.dim() == 2}
    return {
        "sum": float(sum(w.double().sum() for w in weights.values())),
        "sum_of_squares": float(sum(w.double().square().sum() for w in weights.values())),
        "first": {k: [round(x, 8) for x in w.flatten()[:3].tolist()] for k, w in weights.items()},
        "episodes": len(agent.episodes),
        "ep_rew_mean": agent.ep_rew_mean,
        "value_loss": float(agent.scalars["train/value_loss"]),
    }


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.config.getoption("--update-golden", default=False):
        FILE.write_text(json.dumps({name: _run(name) for name in RUNS}, indent=1) + "\n", encoding="utf-8")
    stored: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return stored


@pytest.mark.parametrize("name", RUNS)
def test_run(name: str, golden: dict[str, Any]) -> None:
    expected, got = golden[name], _run(name)
    assert got["episodes"] == expected["episodes"]
    if expected["ep_rew_mean"] is None:  # Pendulum's episodes are longer than the run
        assert got["ep_rew_mean"] is None
    else:
        assert got["ep_rew_mean"] == pytest.approx(expected["ep_rew_mean"], rel=1e-4)
    for key in ("sum", "sum_of_squares", "value_loss"):
        assert got[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4), key
    assert got["first"].keys() == expected["first"].keys()
    for key, values in expected["first"].items():
        assert got["first"][key] == pytest.approx(values, rel=1e-4, abs=2e-6), key
