"""Optimal costs against published values, against each other and against simulation.

The tables are of an independent implementation of the same recursions (envs/inventory/oracle.py); the optima of lost
sales agree with Zipkin 2008 to the two decimals printed there.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ccrl.inventory.base_stock import EchelonStockPolicy
from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory import InventoryEnv, make_task, simulate
from envs.inventory.oracle import (
    backlog_optimum,
    best_base_stock,
    lost_sales_optimum,
    lost_sales_policy_cost,
    oracle_cost,
    search_base_stock,
    serial_optimum,
    transshipment_bound,
)


def simulated_cost(env, policy, scenarios):
    """Of a policy that may ask for more than there is."""
    feasible = Unrolled(env, lambda seen: env.feasible(seen, policy(seen)))
    return average_cost(feasible, scenarios).mean().item()


# lead time, underage, optimum, best base stock and level, best capped base stock, level and cap
LOST_SALES = [
    (1, 4, 4.04071, 4.1628, 12, 4.0654, 12, 6),
    (1, 9, 5.43822, 5.5475, 13, 5.4812, 14, 6),
    (1, 19, 6.67574, 6.7278, 15, 6.6878, 15, 8),
    (1, 39, 7.83595, 7.8626, 16, 7.8425, 16, 9),
    (2, 4, 4.39530, 4.6386, 16, 4.4057, 17, 5),
    (2, 9, 6.09364, 6.3163, 19, 6.1191, 19, 6),
    (2, 19, 7.66442, 7.8422, 21, 7.7209, 21, 7),
    (2, 39, 9.10638, 9.1903, 22, 9.1326, 22, 8),
    (3, 4, 4.59872, 4.9750, 20, 4.6307, 21, 5),
    (3, 9, 6.53137, 6.8640, 23, 6.6164, 24, 6),
    (3, 19, 8.36251, 8.6045, 26, 8.4010, 26, 6),
    (3, 39, 10.03848, 10.2176, 28, 10.0853, 28, 7),
    (4, 4, 4.72852, 5.1977, 25, 4.7979, 26, 5),
    (4, 9, 6.83594, 7.2710, 28, 6.9123, 29, 5),
    (4, 19, 8.88718, 9.2320, 31, 8.9544, 31, 6),
    (4, 39, 10.79441, 11.0623, 33, 10.8926, 34, 6),
]
SERIAL = [
    (1, 4, 6.8986, (13.62, 30.68, 54.28, 64.42)),
    (1, 9, 8.3669, (14.66, 32.54, 56.82, 67.36)),
    (2, 4, 7.5984, (19.44, 36.00, 59.44, 69.52)),
    (2, 9, 9.2610, (20.70, 38.06, 62.16, 72.64)),
    (3, 9, 10.0367, (26.58, 43.54, 67.50, 77.92)),
    (4, 4, 8.7525, (30.74, 46.60, 69.80, 79.76)),
    (4, 9, 10.7339, (32.36, 49.00, 72.82, 83.18)),
    (4, 39, 13.9100, (35.02, 52.74, 77.40, 88.28)),
]
BACKLOG = {
    4: (3.1674, 5.0081, 6.3348, 7.4282, 8.9588, 10.2636),
    9: (3.9711, 6.2788, 7.9421, 9.3130, 11.2319, 12.8678),
    19: (4.6674, 7.3798, 9.3348, 10.9460, 13.2014, 15.1241),
    39: (5.2898, 8.3640, 10.5797, 12.4058, 14.9619, 17.1411),
}
TRANSSHIPMENT = [
    (3, 0.0, 2, 5.1514, 6.4585),
    (3, 0.0, 6, 7.2792, 9.1261),
    (3, 0.5, 2, 5.7537, 7.2136),
    (3, 0.5, 6, 7.7172, 9.6753),
    (5, 0.0, 2, 4.5912, 5.7561),
    (5, 0.0, 6, 6.6655, 8.3567),
    (5, 0.5, 2, 5.2964, 6.6402),
    (5, 0.5, 6, 7.1695, 8.9886),
]


@pytest.mark.parametrize("row", LOST_SALES, ids=lambda row: f"L{row[0]}-p{row[1]}")
def test_lost_sales(row):
    lead_time, underage, optimum, base, level, capped, capped_level, cap = row
    assert abs(lost_sales_optimum(lead_time, underage) - optimum) < 1e-5
    found = best_base_stock(lead_time, underage)
    assert (found.level, found.cap) == (level, math.inf)
    assert abs(found.cost - base) < 2e-4
    found = best_base_stock(lead_time, underage, capped=True)
    assert (found.level, found.cap) == (capped_level, cap)
    assert abs(found.cost - capped) < 2e-4


def test_lost_sales_by_hand():
    """Lead time 1, mean demand 1, level 1: a period starts with one unit or none. With one, nothing is ordered, and the
    next starts with one if there is no demand; with none, all demand is missed and one is ordered."""
    nothing, excess = math.exp(-1.0), math.exp(-1.0)  # E max(D - 1, 0) = E D - 1 + P(D = 0)
    cost = lost_sales_policy_cost(1, 3.0, 1, mean=1.0, holding=2.0)
    chance = 1 / (2 - nothing)  # of starting with one
    expected = chance * (2 * nothing + 3 * excess) + (1 - chance) * 3.0
    assert abs(cost - expected) < 1e-4


def test_lost_sales_limits_do_not_bind():
    """More orders and more stock change nothing."""
    assert abs(lost_sales_optimum(2, 9, orders=16, top=50) - lost_sales_optimum(2, 9)) < 2e-6
    assert abs(lost_sales_optimum(3, 39, orders=14, top=45) - lost_sales_optimum(3, 39)) < 2e-6


def test_lost_sales_policies_against_simulation():
    env = InventoryEnv(make_task("one_store_lost", lead_time=2), periods=600, ignore=100)
    scenarios = env.sample(1000, torch.Generator().manual_seed(0))
    for level, cap in ((19, None), (19, 6)):

        def order(seen, level=level, cap=cap):
            return (level - seen["inventory"].sum(2)).clamp(0, cap)

        simulated = simulated_cost(env, order, scenarios)
        assert abs(simulated / lost_sales_policy_cost(2, 9, level, cap) - 1) < 0.005


@pytest.mark.parametrize("underage", BACKLOG)
def test_backlog(underage):
    for lead_time, cost in zip((1, 4, 7, 10, 15, 20), BACKLOG[underage], strict=True):
        assert abs(backlog_optimum(lead_time, underage).cost - cost) < 6e-5


def test_backlog_with_clipping():
    assert abs(backlog_optimum(4, 9, clip=True).cost - 6.2769) < 6e-5
    assert abs(backlog_optimum(20, 39, clip=True).cost - 17.1338) < 6e-5
    far = backlog_optimum(4, 9, mean=50.0, clip=True)  # nothing to clip
    assert abs(far.cost - backlog_optimum(4, 9, mean=50.0).cost) < 1e-5
    assert abs(far.level - backlog_optimum(4, 9, mean=50.0).level) < 6e-3


def test_backlog_against_simulation():
    """The optimum is what its level costs; levels on both sides cost more."""
    env = InventoryEnv(make_task("one_store_backlogged", lead_time=4), periods=400, ignore=100)
    scenarios = env.sample(1000, torch.Generator().manual_seed(0))
    optimum = backlog_optimum(4, 9, clip=True)
    found = search_base_stock(env, scenarios, optimum.level + torch.tensor([-1.5, 0.0, 1.5]))
    assert abs(found.level - optimum.level) < 1e-4
    assert abs(found.cost / optimum.cost - 1) < 0.005


@pytest.mark.parametrize(("lead_time", "underage", "cost", "levels"), SERIAL)
def test_serial(lead_time, underage, cost, levels):
    found = serial_optimum(make_task("serial_system", lead_time=lead_time, underage=float(underage)))
    assert abs(found.cost - cost) < 6e-5
    upwards = levels[::-1]  # the table counts from the store, levels are in the order of the nodes
    assert max(abs(a - b) for a, b in zip(found.levels, upwards, strict=True)) < 0.021  # the grid


def echelon_stock(levels):
    """Order up to the echelon level, from what the next stage has; ``levels`` in the order of the nodes."""

    def policy(seen):
        position = seen["inventory"].sum(2).flip(1).cumsum(1).flip(1)  # of each stage and everything downstream
        wanted = (torch.tensor(levels) - position).clamp_min(0.0)
        return torch.cat((wanted[:, 1:], wanted[:, :1]), 1)  # edges 0>1, 1>2, 2>3, supplier>0

    return policy


@pytest.mark.parametrize(("lead_time", "underage"), [(4, 9.0), (1, 4.0)])
def test_serial_against_simulation(lead_time, underage):
    """Echelon base stock is optimal: its levels cost the optimum, other levels more."""
    task = make_task("serial_system", lead_time=lead_time, underage=underage)
    env, optimum = InventoryEnv(task, periods=400, ignore=150), serial_optimum(task)
    scenarios = env.sample(1000, torch.Generator().manual_seed(0))
    cost = simulated_cost(env, echelon_stock(optimum.levels), scenarios)
    assert abs(cost / optimum.cost - 1) < 0.01
    for stage in range(4):
        moved = [level + 2.5 * (i <= stage) for i, level in enumerate(optimum.levels)]
        assert simulated_cost(env, echelon_stock(moved), scenarios) > cost


def test_levels_of_the_oracle_are_those_of_the_policy():
    """One order of the stages: the optimal levels in the policy are the optimal policy."""
    task = make_task("serial_system")
    env, optimum = InventoryEnv(task, periods=60), serial_optimum(task)
    scenarios = env.sample(3, torch.Generator().manual_seed(0))
    policy = EchelonStockPolicy(env.network, env.observe(env.initial(scenarios)))
    with torch.no_grad():
        increments = torch.tensor(optimum.levels).diff(append=torch.zeros(1)).neg().double()
        policy.u.copy_(increments.expm1().log() - 10.0)  # S_k = sum over j >= k of softplus(u_j + 10)
    assert torch.allclose(policy.levels, torch.tensor(optimum.levels), atol=1e-3)
    ours, theirs = (simulate(env, each, scenarios).action for each in (policy, echelon_stock(optimum.levels)))
    assert torch.allclose(ours, theirs, atol=5e-3)


def test_serial_of_one_stage_is_the_newsvendor():
    task = make_task("one_store_backlogged", lead_time=4)
    assert abs(serial_optimum(task).cost - backlog_optimum(4, 9, clip=True).cost) < 1e-4


@pytest.mark.parametrize(("stores", "correlation", "lead_time", "low", "high"), TRANSSHIPMENT)
def test_transshipment(stores, correlation, lead_time, low, high):
    for underage, bound in ((4.0, low), (9.0, high)):
        options = {"stores": stores, "lead_time": lead_time, "underage": underage, "correlation": correlation}
        assert abs(transshipment_bound(make_task("transshipment_backlogged", **options)) - bound) < 6e-5


def test_transshipment_of_one_store_is_one_store():
    """With the warehouse's three periods more."""
    for lead_time, underage in ((2, 4.0), (6, 9.0)):
        task = make_task("transshipment_backlogged", stores=1, lead_time=lead_time, underage=underage)
        expected = backlog_optimum(3 + lead_time, underage, std=1.765).cost
        assert abs(transshipment_bound(task) - expected) < 1e-9


def test_transshipment_bound_is_one():
    """Pooled order up to the optimal level, allocated towards equal cover: above the bound, not by much."""
    task = make_task("transshipment_backlogged")
    env = InventoryEnv(task, periods=300, ignore=100)
    scenarios = env.sample(1000, torch.Generator().manual_seed(0))
    mean, std = torch.tensor(task.demand.mean), torch.tensor(task.demand.std)
    spread = math.sqrt(3 * float(0.5 * std.sum() ** 2 + 0.5 * (std**2).sum()) + 3 * float(std.sum() ** 2))
    level = float(mean.sum()) * 6 + 0.8416 * spread

    def policy(seen):
        stores = seen["inventory"][:, 1:].sum(2)
        order = (level - seen["inventory"].sum((1, 2))).clamp_min(0.0)[:, None]
        cover = (mean * 3 + std * 1.46 - stores).clamp_min(0.0) + 1e-3 * mean
        return torch.cat((cover, order), 1)

    cost = simulated_cost(env, policy, scenarios)
    assert 1.0 < cost / transshipment_bound(task) < 1.05


def test_oracle_cost():
    expected = {
        "one_store_lost": 6.83594,
        "one_store_backlogged": 6.2769,
        "serial_system": 10.7339,
        "transshipment_backlogged": 5.7537,
    }
    for name, cost in expected.items():
        assert abs(oracle_cost(make_task(name)) - cost) < 6e-5
        task = make_task(name)
        twice = {key: tuple(2 * x for x in getattr(task, key)) for key in ("holding", "underage")}
        assert oracle_cost(dataclasses.replace(task, **twice)) == pytest.approx(2 * oracle_cost(task), rel=1e-5)
    assert oracle_cost(make_task("one_warehouse_lost_demand")) is None
    assert oracle_cost(make_task("one_store_real_data", count=2)) is None
    assert oracle_cost(make_task("one_store_lost", lead_time=8)) is None, "1.4 billion states"
    for name, change in (
        ("one_store_lost", {"profit": True}),
        ("one_store_lost", {"edge_cost": (0.5,)}),
        ("serial_system", {"lost": True}),
        ("transshipment_backlogged", {"underage": (4.0, 4.0, 9.0)}),
    ):
        assert oracle_cost(dataclasses.replace(make_task(name), **change)) is None


def test_search_on_recorded_demand():
    task = make_task("one_store_real_data", count=30)
    env = InventoryEnv(task)
    scenarios = env.sample(30, torch.Generator())
    found = search_base_stock(env, scenarios, torch.tensor([5.0, 40.0, 4000.0]), torch.tensor([3.0, math.inf]))
    assert (found.level, found.cap) == (40.0, math.inf)
    capped = search_base_stock(env, scenarios, torch.tensor([40.0]), torch.tensor([3.0]))
    assert capped.cost > found.cost, "of most series more than 3 are sold a week"
    assert found.cost < 0  # profit


def test_bad_input():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lost_sales_optimum(0, 9)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        backlog_optimum(0, 9)
    with pytest.raises(ValueError, match="level and a cap of at least 1"):
        lost_sales_policy_cost(2, 9, 10, 0)
    with pytest.raises(ValueError, match="nodes in a row"):
        serial_optimum(make_task("one_warehouse_lost_demand"))
    for name in ("one_warehouse_lost_demand", "serial_system"):
        with pytest.raises(ValueError, match="warehouse without stock"):
            transshipment_bound(make_task(name))
    for bad, message in (({"mean": 0.0}, "mean: expected a positive"), ({"underage": 0.0}, "underage: expected")):
        for oracle in (lost_sales_optimum, best_base_stock):
            with pytest.raises(ValueError, match=message):
                oracle(**({"lead_time": 1, "underage": 9.0} | bad))
    with pytest.raises(ValueError, match="std: expected a positive number, got 0"):
        backlog_optimum(2, 9, std=0.0)
    unequal = dataclasses.replace(make_task("transshipment_backlogged"), underage=(4.0, 4.0, 9.0))
    with pytest.raises(ValueError, match="equal lead times and costs"):
        transshipment_bound(unequal)
    with pytest.raises(ValueError, match="network of one store"):
        search_base_stock(InventoryEnv(make_task("serial_system")), {}, torch.ones(1))
