"""HDPO on one's own demand: it begins as the tuned rule, keeps nothing worse, resumes, scales by product."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.hdpo import HDPO, HDPOConfig
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.inventory.planner import PlannerPolicy
from ccrl.inventory.rules import tune
from envs.inventory import InventoryEnv, Recorded, make_task, retail_sales

SMALL = {"n_train": 4, "n_dev": 4, "batch_size": 4, "dev_every": 1}


def own(sales: Recorded | None = None, **options: Any) -> InventoryEnv:
    given = {"holding": 1.0, "underage": 9.0, "lead_time": 2} | options
    return InventoryEnv(make_task("own_demand", sales=retail_sales(4, 80) if sales is None else sales, **given))


def test_epoch_zero_is_the_tuned_rule_and_nothing_worse_is_kept() -> None:
    env = own()
    agent = HDPO(env, HDPOConfig(policy="planner", **SMALL))
    agent.learn(until=3 * agent.samples_per_iteration)
    rule = tune("promotion_base_stock", env, env.sample(4, torch.Generator()))
    dev = env.split("dev")
    scenarios = dev.sample(4, torch.Generator())
    start = float(average_cost(Unrolled(dev, rule), scenarios).mean())
    assert agent.best_cost <= start
    best = average_cost(Unrolled(dev, agent.ctx.bank.policy("best")), scenarios)
    assert float(best.mean()) == pytest.approx(agent.best_cost)
    assert agent.best_iteration <= 3
    # a rate at which nothing good can happen: the rule stays
    wild = HDPO(env, HDPOConfig(policy="planner", learning_rate=10.0, patience=2, **SMALL))
    wild.learn(until=50 * wild.samples_per_iteration)
    assert wild.best_cost <= start
    assert wild.iteration < 50, "two epochs without a better one"


def test_it_improves_on_seasonal_demand_that_no_level_follows() -> None:
    """Demand of 2 and of 10 in turns of eight weeks: one base-stock level is wrong in both."""
    week = torch.arange(120)
    series = torch.where((week // 8) % 2 == 0, 2.0, 10.0)[None, :, None].repeat(4, 1, 1)
    env = own(Recorded(series, "turns", history=16))
    agent = HDPO(env, HDPOConfig(policy="planner", learning_rate=1e-2, **SMALL))
    agent.learn(until=30 * agent.samples_per_iteration)
    dev = env.split("dev")
    scenarios = dev.sample(4, torch.Generator())
    rule = tune("base_stock", dev, scenarios)
    assert agent.best_cost < 0.8 * float(average_cost(Unrolled(dev, rule), scenarios).mean())


def test_resume_is_exact(tmp_path: Path) -> None:
    options = {"sales": str(tmp_path / "sales.csv"), "holding": 1.0, "underage": 9.0, "lead_time": 2}
    sales = retail_sales(4, 80)
    days = [sales.first_day + datetime.timedelta(weeks=week) for week in range(80)]
    rows = [f"P{i},{day},{int(sales.series[i, t, 0])}" for i in range(4) for t, day in enumerate(days)]
    (tmp_path / "sales.csv").write_text("sku,date,units\n" + "\n".join(rows) + "\n")
    config = HDPOConfig(policy="planner", **SMALL)
    whole = HDPO("ccrl/InventoryOwn-v0", config, env_kwargs=options)
    whole.learn(until=4 * whole.samples_per_iteration)
    half = HDPO("ccrl/InventoryOwn-v0", config, env_kwargs=options)
    half.learn(until=2 * half.samples_per_iteration)
    half.save(tmp_path / "half.pt")
    resumed = HDPO.load(tmp_path / "half.pt", restore_rng=True)
    assert isinstance(resumed.policy, PlannerPolicy)
    assert bool(resumed.policy.fitted)
    resumed.learn(until=4 * whole.samples_per_iteration)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, resumed.policy.state_dict()[name]), name
    assert resumed.best_cost == whole.best_cost


@pytest.mark.parametrize("policy", ["data_driven", "gnn", "base_stock"])
def test_every_policy_works_in_units_of_the_product(policy: Any) -> None:
    """Ten times the sales of a product are ten times its orders."""
    small = retail_sales(4, 80)
    agents = []
    for factor in (1.0, 10.0):
        sales = Recorded(factor * small.series, "x", small.first_day)
        agents.append(HDPO(own(sales), HDPOConfig(policy=policy, **SMALL), seed=3))
    orders = [agent.policy(agent.simulator.observe(agent.simulator.initial(agent.dev))) for agent in agents]
    assert (orders[0] > 0).any()
    torch.testing.assert_close(orders[1], 10 * orders[0])


def test_lead_times_are_an_input() -> None:
    env = own(vary_lead_time=1)
    agent = HDPO(env, HDPOConfig(policy="planner", **SMALL | {"n_train": 12, "n_dev": 12, "batch_size": 12}))
    agent.learn(until=2 * agent.samples_per_iteration)
    obs = env.observe(env.initial(agent.scenarios("train", 12, 0)))
    orders = agent.act(obs).view(3, 4)  # given, one shorter, one longer
    assert (orders[2] >= orders[0]).all()
    assert (orders[0] >= orders[1]).all()
    assert (orders[2] > orders[1]).any()
    # held out there are the 4 products, not 3 lead times of each
    agent.ctx.bank.refresh("best")
    assert agent.cost() == agent.cost(count=4)
    assert len(agent.evaluate(None, 10, 0).returns) == 4


def test_the_planner_needs_products() -> None:
    with pytest.raises(ValueError, match="planner: expected recorded demand with constants by series"):
        HDPO("ccrl/InventoryOneStoreLost-v0", HDPOConfig(policy="planner", **SMALL))


def test_the_rule_is_tuned_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random lead times: those of the rule are no other run's training scenarios (were those of twice the seed)."""
    tuned: list[torch.Tensor] = []
    begin = PlannerPolicy.begin
    monkeypatch.setattr(PlannerPolicy, "begin", lambda *args: (tuned.append(args[2]["arrival"]), begin(*args))[1])
    env = own(lead_time_min=1)
    agent = HDPO(env, HDPOConfig(policy="planner", **SMALL), seed=1)
    agent.learn(until=agent.samples_per_iteration)
    assert len(tuned) == 1
    assert not any(torch.equal(tuned[0], agent.scenarios("train", 4, seed)["arrival"]) for seed in (0, 1, 2))
