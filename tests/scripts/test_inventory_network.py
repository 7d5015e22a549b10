"""The planner's picture from the command line: it plays the policy that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents.hdpo import HDPO, HDPOConfig
from ccrl.inventory.pathwise import Unrolled, average_cost
from scripts import inventory_network
from scripts.inventory_network import NetworkConfig

SMALL = {"n_train": 8, "n_dev": 4, "batch_size": 4, "dev_every": 1}


@pytest.mark.parametrize("policy", ["base_stock", "just_in_time"])
def test_what_is_drawn_costs_what_the_agent_scores(policy: str) -> None:
    agent = HDPO("ccrl/InventoryOneStoreLost-v0", HDPOConfig(policy=policy, whole_units=True, **SMALL))
    agent.learn(until=2 * agent.samples_per_iteration)
    env, scenarios = agent.simulator.split("dev"), agent.scenarios("dev", 5, 7)
    trace = inventory_network.play(agent, env, scenarios)
    assert torch.equal(trace.action, trace.action.round())
    expected = average_cost(Unrolled(env, agent.ctx.bank.policy("best")), scenarios, whole_units=True)
    torch.testing.assert_close(trace.cost[env.ignore :].double().mean(0), expected)


def test_a_checkpoint_becomes_a_picture(tmp_path: Path) -> None:
    config = HDPOConfig(policy="echelon_stock", **SMALL)
    agent = HDPO("ccrl/InventorySerial-v0", config, env_kwargs={"lead_time": 1}).learn(until=1)
    agent.save(tmp_path / "run/checkpoints/step_400.pt")
    files = inventory_network.main(NetworkConfig(tmp_path / "run", tmp_path / "plan", split="dev", count=2))
    assert [path.name for path in files] == ["plan.png", "plan.svg"]
    text = files[1].read_text()
    assert "serial system: echelon_stock, best of 1 epochs" in text
    assert "mean of 2 scenarios and the last 40 of 100 periods" in text
    one = NetworkConfig(tmp_path / "run/checkpoints/step_400.pt", tmp_path / "b", "dev", 2, 1, title="A")
    assert "A" in inventory_network.main(one)[1].read_text()


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a run folder of hdpo with a checkpoint"):
        inventory_network.main(NetworkConfig(tmp_path, tmp_path / "x"))
    with pytest.raises(ValueError, match="expected one of 0 to count - 1 = 1, got 2"):
        NetworkConfig(tmp_path, tmp_path / "x", count=2, scenario=2)
