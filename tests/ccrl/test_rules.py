"""Rules that planners use: what they order, and that tuning finds what can be computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ccrl.inventory.functional_env import Network, State
from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.inventory.planner import PlannerPolicy
from ccrl.inventory.rules import Rule, node_demand, positions, ration, seasonal_forecast, tune
from envs.inventory import InventoryEnv, Recorded, Task, make_task, retail_sales

STORE = Network(0, 0, 1, ((-1, 0),), (2,))
FAN = Network(0, 1, 2, ((0, 1), (0, 2), (-1, 0)), (2, 3, 4))


def store_task(sales: Recorded, **options: float) -> Task:
    return make_task("own_demand", sales=sales, **({"holding": 1.0, "underage": 9.0, "lead_time": 2} | options))


def network_task(products: int = 3, **options: object) -> Task:
    """A warehouse with two stores, without a file: constants as :func:`own_demand` would find them."""
    sales = retail_sales(products, 120, 2, 1)
    one = store_task(retail_sales(products, 120, 1, 1))
    horizons = one.split_horizons
    each = torch.ones(products, 3)
    by_series = {
        "holding": each * torch.tensor([0.5, 1.0, 1.0]), "underage": 9.0 * each[:, :2], "edge_cost": 0 * each,
        "lead_time": each * torch.tensor([2.0, 3.0, 4.0]), "fixed_cost": 0 * each, "minimum": 0 * each, "lot": each,
        "capacity": each * math.inf, "scale": sales.series[:, :60].mean(1).clamp_min(0.02),
    }  # fmt: skip
    return Task("fan", FAN, sales, (1.0,) * 3, (1.0,) * 2, lost=True, horizons=horizons, by_series=by_series,
                terms=one.terms)  # fmt: skip


def test_orders_by_hand() -> None:
    obs: State = {"series": torch.tensor([0.0, 1.0]), "inventory": torch.tensor([[[3.0, 2.0]], [[1.0, 0.0]]])}
    one = torch.ones(2, 1)
    base = Rule("base_stock", STORE, torch.tensor([[9.0], [4.0]]), 0 * one, one)
    assert base(obs).tolist() == [[4.0], [3.0]]  # positions 5 and 1
    waiting = replace(base, name="s_S", gap=torch.tensor([[5.0], [3.0]]))
    assert waiting(obs).tolist() == [[0.0], [3.0]], "4 short of 9 is above s = 4; 1 is at s = 1"
    lots = replace(base, name="r_Q", level=torch.tensor([[5.0], [4.0]]), lot=torch.tensor([[4.0], [2.0]]))
    assert lots(obs).tolist() == [[4.0], [4.0]], "at r = 5: one lot; 1 is 3 below 4: two lots of 2 reach 5"


def test_echelon_positions_and_rationing() -> None:
    inventory = torch.tensor([[[10.0, 0, 0, 5], [1, 2, 0, 0], [4, 0, 0, 0]]])
    share = torch.ones(1, 3)
    assert positions(inventory, share, FAN).tolist() == [[22.0, 3.0, 4.0]]
    assert positions(inventory, torch.tensor([[1.0, 0.0, 1.0]]), FAN).tolist() == [[18.0, 3.0, 4.0]]
    # 20 asked of 10: half of everything
    assert ration(torch.tensor([[15.0, 5.0, 7.0]]), inventory, FAN)[0].tolist() == pytest.approx([7.5, 2.5, 7.0])


def test_constant_demand_needs_no_more_than_it() -> None:
    """Demand 3, lead time 2: three periods' demand as level, and then nothing is left over or missing."""
    task = store_task(Recorded(torch.full((2, 60, 1), 3.0), "constant", history=4))
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(2, torch.Generator())
    for name in ("base_stock", "s_S"):
        rule = tune(name, env, scenarios)  # type: ignore[arg-type]
        assert rule.level.flatten().tolist() == [9.0, 9.0]
        assert average_cost(Unrolled(env, rule), scenarios).tolist() == [0.0, 0.0]


def test_tuning_is_the_best_of_its_grid() -> None:
    task = store_task(retail_sales(4, 120))
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(4, torch.Generator())
    best = average_cost(Unrolled(env, tune("base_stock", env, scenarios)), scenarios)
    usual, share, span = node_demand(env.observe(env.initial(scenarios)), env.network)
    assert span.tolist() == [[3.0]] * 4
    for factor in (0.8, 1.0, 1.2, 1.5):
        level = (factor * usual * span).round()
        other = Rule("base_stock", env.network, level, 0 * level, share)
        assert (best <= average_cost(Unrolled(env, other), scenarios) * 1.02).all(), "up to the grid's steps"
    gapped = average_cost(Unrolled(env, tune("s_S", env, scenarios)), scenarios)
    assert (gapped <= best).all(), "base stock is (s, S) without a gap"
    lifted = average_cost(Unrolled(env, tune("promotion_base_stock", env, scenarios)), scenarios)
    assert (lifted <= best).all()


def test_a_fixed_cost_makes_rules_wait() -> None:
    task = store_task(retail_sales(3, 120), fixed_cost=50.0)
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(3, torch.Generator())
    base, waiting = (tune(name, env, scenarios, fixed_cost=True) for name in ("base_stock", "s_S"))  # type: ignore[arg-type]
    costs = [float(average_cost(Unrolled(env, rule), scenarios).mean()) for rule in (base, waiting)]
    assert costs[1] < 0.9 * costs[0]
    assert (waiting.gap > 0).any()


def test_networks_are_tuned_node_by_node() -> None:
    task = network_task()
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(3, torch.Generator())
    rule = tune("base_stock", env, scenarios)
    usual, share, span = node_demand(env.observe(env.initial(scenarios)), env.network)
    assert share.tolist() == [[1.0, 1.0, 1.0]] * 3
    torch.testing.assert_close(usual[:, 0], usual[:, 1:].sum(1))
    assert span[0].tolist() == [5.0 + 2.5, 3.0, 4.0], "the warehouse's goods last until the stores' are replaced"
    start = torch.ceil(1.2 * usual * span)
    plain = Rule("base_stock", env.network, start, 0 * start, share)
    costs = [average_cost(Unrolled(env, each), scenarios) for each in (rule, plain)]
    assert (costs[0] <= costs[1]).all()
    assert costs[0].mean() < costs[1].mean()


def test_seasonal_forecast() -> None:
    """Two years of a sawtooth that doubles: last year's same periods, times two."""
    year = torch.arange(52.0) % 4 + 1
    series = torch.cat((year, 2 * year, 4 * year))[None]
    found = seasonal_forecast(series, torch.tensor([1.0]), 104)
    assert found.shape == (1, 157, 1, 2)
    now = 120
    assert found[0, now, 0, 0].item() == series[0, now : now + 2].sum().item()
    # no year to look at: the mean of the last 16 periods, 2.5, over two periods
    assert found[0, 40, 0, 0].item() == 5.0


def test_what_does_not_fit() -> None:
    task = store_task(Recorded(torch.full((2, 60, 1), 3.0), "constant", history=4))
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(2, torch.Generator())
    with pytest.raises(ValueError, match="rule: expected one of base_stock"):
        tune("magic", env, scenarios)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a forecast, got none"):
        tune("seasonal_newsvendor", env, scenarios)
    with pytest.raises(ValueError, match="expected sales with planned promotions, got none"):
        tune("promotion_base_stock", env, scenarios)
    fan = InventoryEnv(network_task())
    with pytest.raises(ValueError, match="expected one store, got a network of 3 nodes"):
        tune("seasonal_newsvendor", fan, fan.sample(3, torch.Generator()))
    other = InventoryEnv(make_task("one_store_lost"))
    seen = other.observe(other.initial(other.sample(1, torch.Generator())))
    with pytest.raises(ValueError, match="planner: expected recorded demand with constants by series"):
        PlannerPolicy.for_env(other, seen)


@pytest.mark.parametrize("kind", ["store", "fixed", "network"])
def test_the_planner_begins_as_the_tuned_rule(kind: str) -> None:
    task = network_task() if kind == "network" else store_task(
        retail_sales(3, 120), fixed_cost=20.0 if kind == "fixed" else 0.0
    )  # fmt: skip
    env = InventoryEnv(task)
    scenarios = env.sample(3, torch.Generator())
    policy = PlannerPolicy.for_env(env, env.observe(env.initial(scenarios)))
    assert policy.gated == (kind == "fixed")
    rule = policy.begin(env, scenarios)
    state = env.initial(scenarios)
    for demand in env.noise(scenarios)[:12]:
        obs = env.observe(state)
        torch.testing.assert_close(policy(obs), rule(obs))
        state, _ = env.step(state, rule(obs), demand)
    cost = torch.zeros(())
    state = env.initial(scenarios)
    for demand in env.noise(scenarios)[:25]:
        state, now = env.step(state, policy(env.observe(state)), demand)
        cost = cost + now.sum()
    cost.backward()
    grad = policy.out.weight.grad
    assert grad is not None
    assert grad[0].abs().sum() > 0, "the level's gradient reaches the network"
    assert (grad[1].abs().sum() > 0) == (kind == "fixed"), "only a policy that waits has a gap"


def test_the_planner_scales_with_its_products_and_lead_times() -> None:
    """Ten times the demand, stock and level of a product are ten times the order; a longer lead time raises levels in
    proportion to the periods that an order lasts."""
    task = store_task(retail_sales(1, 120))
    env = InventoryEnv(task)
    scenarios = env.sample(1, torch.Generator())
    policy = PlannerPolicy.for_env(env, env.observe(env.initial(scenarios)))
    policy.begin(env, scenarios)
    torch.nn.init.normal_(policy.out.weight, std=0.1)
    obs = env.observe(env.initial(scenarios))
    small = policy(obs)
    assert small.item() > 0
    large = dict(obs)
    for name in ("inventory", "past_demand"):
        large[name] = 10 * obs[name]
    for buffer in (policy.level, policy.lift, policy.usual):
        buffer.mul_(10)
    torch.testing.assert_close(policy(large), 10 * small)
    torch.nn.init.zeros_(policy.out.weight)
    policy.lift.zero_()
    two, three = (policy(large | {"lead_time": torch.full((1, 1), lead)}) for lead in (2.0, 3.0))
    torch.testing.assert_close(three / two, torch.full((1, 1), 4 / 3))


def test_three_stages() -> None:
    """Supplier -> 0 (lead time 4) -> 1 (2) -> store 2 (3): all of its demand passes every stage, and the first one's
    position is that of the whole chain."""
    network = Network(1, 1, 1, ((0, 1), (1, 2), (-1, 0)), (2, 3, 4))
    seen = {
        "scale": torch.tensor([[5.0]]),
        "lead_time": torch.tensor([[2.0, 3.0, 4.0]]),
        "edge_cost": torch.zeros(1, 3),
    }
    usual, share, span = node_demand(seen, network)
    assert usual.tolist() == [[5.0, 5.0, 5.0]]
    assert span.tolist() == [[10.0, 6.0, 4.0]]  # 4 + 2 + 3 + 1, 2 + 3 + 1, 3 + 1
    inventory = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    assert positions(inventory, share, network).tolist() == [[111.0, 110.0, 100.0]]
