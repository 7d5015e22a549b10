"""The simulator: steps by hand, gradients, conservation, feasibility."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ccrl.inventory.functional_env import FunctionalEnv, Network
from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory import TASKS, InventoryEnv, Normal, Task, make_task, retail_sales, simulate

F64 = torch.float64


def store(lead_time, lost, underage=9.0, slots=3, **options):
    """One store whose network has ``slots`` slots; the lead time comes with the scenario, as in recorded demand."""
    demand = Normal((5.0,), (1.6,))
    net = Network(0, 0, 1, ((-1, 0),), (slots,))
    env = InventoryEnv(Task("store", net, demand, (1.0,), (underage,), lost=lost, **options), periods=3, ignore=0)
    return env, {"lead_time": torch.tensor([[float(lead_time)]], dtype=F64)}


@pytest.mark.parametrize(
    ("lost", "lead_time", "expected"),
    [
        (False, 1, (8.0, 1.0, 0.0)),
        (False, 2, (1.0, 8.0, 0.0)),
        (False, 3, (1.0, 1.0, 7.0)),
        (True, 1, (9.0, 1.0, 0.0)),
        (True, 2, (2.0, 8.0, 0.0)),
        (True, 3, (2.0, 1.0, 7.0)),
    ],
)
def test_one_step(lost, lead_time, expected):
    env, constants = store(lead_time, lost)
    state = env.initial({"inventory": torch.tensor([[[4.0, 2.0, 1.0]]], dtype=F64), "demand": torch.zeros(1, 3, 1)})
    following, cost = env.step(state | constants, torch.tensor([[7.0]], dtype=F64), torch.tensor([[5.0]], dtype=F64))
    assert following["inventory"].tolist() == [[list(expected)]]
    assert cost.tolist() == [9.0]


def test_profit_step():
    env, constants = store(1, lost=True, profit=True)
    state = env.initial({"inventory": torch.tensor([[[4.0, 0, 0]]] * 2, dtype=F64), "demand": torch.zeros(2, 3, 1)})
    demand = torch.tensor([[5.0], [1.0]], dtype=F64)
    _, cost = env.step(state | constants, torch.zeros(2, 1, dtype=F64), demand)
    assert cost.tolist() == [-36.0, -9.0 + 3.0]
    owed, constants = store(1, lost=False, profit=True)  # sold is min(on hand, demand), also where 2 are owed
    _, cost = owed.step(
        state | constants | {"inventory": state["inventory"] - 6.0}, torch.zeros(2, 1, dtype=F64), demand
    )
    assert cost.tolist() == [9.0 * 2] * 2


@pytest.mark.parametrize("profit", [False, True])
def test_costs_are_those_of_their_node_and_edge(profit):
    """A warehouse and two stores; store 0 has 2 units left, store 1 misses 2 of 3 demanded."""
    net = Network(0, 1, 2, ((0, 1), (0, 2), (-1, 0)), (1, 2, 1))
    demand, edge_cost = Normal((5.0, 2.0), (1.0, 0.5)), (0.01, 0.02, 0.04)
    task = Task("fan", net, demand, (0.3, 0.7, 1.1), (6.0, 11.0), lost=True, profit=profit, edge_cost=edge_cost)
    state = {"inventory": torch.zeros(1, 3, 2, dtype=F64)}
    state["inventory"][0, :, 0] = torch.tensor([9.0, 4.0, 1.0])
    action = torch.tensor([[2.0, 3.0, 5.0]], dtype=F64)
    following, cost = InventoryEnv(task).step(state, action, torch.tensor([[2.0, 3.0]], dtype=F64))
    moved = 0.3 * (9 - 2 - 3) + 0.01 * 2 + 0.02 * 3 + 0.04 * 5
    served = 0.7 * 2 + (-6.0 * 2 - 11.0 * 1 if profit else 11.0 * 2)
    torch.testing.assert_close(cost, torch.tensor([moved + served], dtype=F64), rtol=1e-14, atol=0)
    assert following["inventory"].tolist() == [[[9, 0], [4, 0], [0, 3]]]


def test_initial_stock():
    """Every slot of a store up to its own lead time is uniform from 0 to its mean demand; warehouses start empty."""
    env = InventoryEnv(make_task("one_warehouse_lost_demand", stores=6))
    stock = env.sample(4000, torch.Generator().manual_seed(0))["inventory"]
    assert (stock[:, 0] == 0).all()
    leads = env.network.node_slots[1:]
    assert set(leads) == {2, 3}
    for stocks, lead, mean in zip(stock[:, 1:].unbind(1), leads, env.task.demand.mean, strict=True):
        assert (stocks[:, lead:] == 0).all()
        filled = stocks[:, :lead] / mean
        assert filled.min() >= 0
        assert 0.99 < filled.max() <= 1
        assert abs(filled.mean() - 0.5) < 0.02
        assert abs(filled.var() - 1 / 12) < 0.005


def test_constants_of_a_series_go_with_its_demand():
    task = make_task("one_store_real_data", count=9)
    scenarios = InventoryEnv(task).sample(5, torch.Generator())
    assert torch.equal(scenarios["demand"], task.demand.series[:5, :111])
    assert scenarios["lead_time"].flatten().tolist() == list(task.lead_time_by_series[:5])
    assert torch.equal(scenarios["underage"].flatten(), torch.tensor(task.underage_by_series[:5]))


def test_lead_times_by_scenario_agree_with_those_of_the_network():
    action, demand = torch.rand(4, 1, dtype=F64), torch.rand(4, 1, dtype=F64)
    for lead_time in (1, 2, 4):
        fixed = InventoryEnv(make_task("one_store_lost", lead_time=lead_time))
        stock = torch.rand(4, 1, 4, dtype=F64)
        stock[:, :, lead_time:] = 0.0
        own, constants = store(lead_time, lost=True, slots=4)
        left = fixed.step({"inventory": stock[:, :, :lead_time]}, action, demand)
        right = own.step({"inventory": stock} | constants, action, demand)
        assert torch.equal(left[0]["inventory"], right[0]["inventory"][:, :, :lead_time])
        assert torch.equal(left[1], right[1])


def test_serial_step_by_hand():
    """Echelons, warehouse, store: costs .1, .2, .5, 1, lead times 2, 4, 3, 2; p = 4."""
    env = InventoryEnv(make_task("serial_system", lead_time=2, underage=4.0))
    stock = torch.zeros(1, 4, 4, dtype=F64)
    stock[0, :, 0] = torch.tensor([10.0, 8.0, 6.0, 4.0])
    stock[0, 1, 1] = 3.0
    state = {"inventory": stock}
    desired = torch.tensor([[12.0, 5.0, 2.0, 7.0]], dtype=F64)  # 0>1, 1>2, 2>3, supplier>0
    action = env.feasible(state, desired)
    assert torch.allclose(action, torch.tensor([[10.0, 5.0, 2.0, 7.0]], dtype=F64))
    following, cost = env.step(state, action, torch.tensor([[6.0]], dtype=F64))
    expected = [[0, 7, 0, 0], [3 + 3, 0, 0, 10], [4, 0, 5, 0], [-2, 2, 0, 0]]
    assert torch.allclose(following["inventory"][0], torch.tensor(expected, dtype=F64))
    # to float64: constants that were float32 on the way would be 1e-8 away
    torch.testing.assert_close(cost, torch.tensor([0.2 * 3 + 0.5 * 4 + 4 * 2], dtype=F64), rtol=1e-11, atol=0)


def test_edge_costs_and_warehouse_holding():
    env = InventoryEnv(make_task("many_warehouses_lost_demand"))
    net, state = env.network, {"inventory": torch.zeros(1, 12, 6, dtype=F64)}
    state["inventory"][0, :2, 0] = 5.0
    action = torch.zeros(1, 17, dtype=F64)
    action[0, -2:] = torch.tensor([2.0, 4.0])
    action[0, net.edges.index((1, 2))] = 3.0  # warehouse 1 to store 0, lead time 2
    following, cost = env.step(state, action, torch.zeros(1, 10, dtype=F64))
    assert torch.allclose(cost, torch.tensor([2 * 0.5 + 4 * 1.5 + 5 * 0.3 + 2 * 0.4], dtype=F64))
    assert following["inventory"][0, 2].tolist() == [0, 3, 0, 0, 0, 0]
    assert following["inventory"][0, :2].tolist() == [[5, 0, 2, 0, 0, 0], [2, 0, 4, 0, 0, 0]]


def test_allocation():
    """Wants (3, 1): of 2 units (1.5, .5), of 8 (3, 1); what cannot be kept goes out whole (6, 2)."""
    for keeps, on_hand, expected in ((True, 2.0, (1.5, 0.5)), (True, 8.0, (3.0, 1.0)), (False, 8.0, (6.0, 2.0))):
        net = Network(0, 1, 2, ((0, 1), (0, 2), (-1, 0)), (1, 1, 1), keeps_stock=keeps)
        env = InventoryEnv(Task("fan", net, Normal((5.0,) * 2, (1.0,) * 2), (1.0,) * 3, (4.0,) * 2, lost=True))
        state = {"inventory": torch.zeros(1, 3, 1, dtype=F64)}
        state["inventory"][0, 0, 0] = on_hand
        action = env.feasible(state, torch.tensor([[3.0, 1.0, 50.0]], dtype=F64))
        assert torch.allclose(action, torch.tensor([[*expected, 50.0]], dtype=F64))
        nothing = env.feasible(state, torch.zeros(1, 3, dtype=F64))
        assert nothing.tolist() == [[0, 0, 0]]


def unroll(lost, level):
    """Three periods of a base-stock policy from 2 units; demand 3, 5, .5; lead time 1, p = 9."""
    env = InventoryEnv(make_task("one_store_lost" if lost else "one_store_backlogged", lead_time=1), periods=3)
    state, total = {"inventory": torch.full((1, 1, 1), 2.0, dtype=F64)}, torch.zeros((), dtype=F64)
    for demand in (3.0, 5.0, 0.5):
        order = (level - state["inventory"].sum(2)).clamp_min(0.0)
        state, cost = env.step(state, order, torch.tensor([[demand]], dtype=F64))
        total = total + cost.sum()
    return total


@pytest.mark.parametrize(("lost", "total", "slope"), [(False, 27.5, -8.0), (True, 19.5, -9.0)])
def test_gradient_by_hand(lost, total, slope):
    level = torch.tensor(6.0, dtype=F64, requires_grad=True)
    cost = unroll(lost, level)
    cost.backward()
    assert cost.item() == total
    assert level.grad.item() == slope
    step = 1e-3
    assert abs((unroll(lost, 6 + step) - unroll(lost, 6 - step)).item() / (2 * step) - slope) < 1e-9


@pytest.mark.parametrize("name", TASKS)
def test_gradcheck(name):
    """Through five periods of every task, with respect to what is asked for and to the initial stock."""
    env = small(name, periods=5)
    generator = torch.Generator().manual_seed(1)
    scenarios = env.sample(2, generator, dtype=F64)
    demand = env.noise(scenarios)
    start = env.initial(scenarios)
    edges = len(env.network.edges)
    wanted = (torch.rand(5, 2, edges, generator=generator, dtype=F64) * 4 + 1).requires_grad_()
    stock = (torch.rand(start["inventory"].shape, generator=generator, dtype=F64) * 4 + 1).requires_grad_()

    def cost(wanted, stock):
        state, total = start | {"inventory": stock}, 0.0
        for period in range(5):
            state, cost = env.step(state, env.feasible(state, wanted[period]), demand[period])
            total = total + cost
        return total

    assert torch.autograd.gradcheck(cost, (wanted, stock), fast_mode=True)


@pytest.mark.parametrize("name", TASKS)
def test_stock_is_conserved(name):
    """What enters is sold, on hand or in transit, over 500 periods, and no node that ships goes below zero."""
    env = small(name, periods=95 if "real" in name or name == "own_demand" else 500)
    scenarios = env.sample(3, torch.Generator().manual_seed(0), dtype=F64)
    mean = torch.tensor(env.task.demand.mean).mean()
    edges, generator = len(env.network.edges), torch.Generator().manual_seed(2)
    trace = simulate(env, lambda _: torch.rand(3, edges, generator=generator, dtype=F64) * 3 * mean, scenarios)
    first, inner = env.network.first_store, env.network.internal
    on_hand = trace.inventory[:-1, :, first:, 0]
    sold = torch.minimum(on_hand.clamp_min(0.0), trace.demand) if env.task.lost else trace.demand
    arriving, leaving = torch.zeros(2, *trace.inventory.shape[1:3], dtype=F64)
    for edge, (source, target) in enumerate(env.network.edges):
        arriving[:, target] += trace.action[:, :, edge].sum(0)
        if edge < inner:
            leaving[:, source] += trace.action[:, :, edge].sum(0)
    leaving[:, first:] += sold.sum(0)
    change = (trace.inventory[-1] - trace.inventory[0]).sum(2)
    assert (arriving - leaving - change).abs().max() < 1e-4
    if first:
        assert trace.inventory[:, :, :first].min() >= -1e-4
    if env.task.lost:
        assert trace.inventory.min() >= -1e-4
    if not env.network.keeps_stock:
        kept = trace.inventory[1:, :, 0, 0] - trace.inventory[:-1, :, 0, 1]
        assert kept.abs().max() < 1e-4


def test_just_in_time_costs_nothing():
    """An order of the demand a lead time ahead: from period L on nothing is missed and nothing is left."""
    lead_time = 3
    env = InventoryEnv(make_task("one_store_lost", lead_time=lead_time), periods=40)
    scenarios = env.sample(16, torch.Generator().manual_seed(0))
    scenarios["inventory"] = torch.zeros_like(scenarios["inventory"])
    demand, clock = env.noise(scenarios), iter(range(40))

    def order(_):
        period = next(clock)
        return demand[min(period + lead_time, 39)]

    cost = simulate(env, order, scenarios).cost
    assert (cost[lead_time:] == 0).all()
    assert torch.equal(cost[:lead_time], 9.0 * demand[:lead_time, :, 0])


def test_nothing_is_written_in_place():
    for name in TASKS:
        env = small(name, periods=4)
        scenarios = env.sample(2, torch.Generator().manual_seed(0))
        before = {key: value.clone() for key, value in scenarios.items()}
        state = env.initial(scenarios)
        copies = {key: value.clone() for key, value in state.items()}
        env.step(state, env.feasible(state, torch.ones(2, len(env.network.edges))), env.noise(scenarios)[0])
        assert all(torch.equal(value, copies[key]) for key, value in state.items())
        assert all(torch.equal(value, before[key]) for key, value in scenarios.items())


def test_average_cost_is_the_mean_after_the_warm_up():
    env = InventoryEnv(make_task("one_warehouse_lost_demand", stores=3), periods=12, ignore=5)
    scenarios = env.sample(4, torch.Generator().manual_seed(0))

    def policy(seen):
        return torch.full((4, 4), 5.0) + seen["mean"].sum()

    trace = simulate(env, policy, scenarios)
    feasible = Unrolled(env, lambda seen: env.feasible(seen, policy(seen)))
    torch.testing.assert_close(average_cost(feasible, scenarios), trace.cost[5:].double().mean(0) / 3)


@pytest.mark.parametrize("name", TASKS)
def test_protocol(name):
    env = small(name)
    assert isinstance(env, FunctionalEnv)
    net, scenarios = env.network, env.sample(4, torch.Generator().manual_seed(0), dtype=F64)
    state = env.initial(scenarios)
    seen = env.observe(state)
    shapes = {"inventory": (4, net.nodes, net.slots), "holding": (4, net.nodes), "underage": (4, net.stores)}
    shapes |= {"lead_time": (4, len(net.edges)), "edge_cost": (4, len(net.edges))}
    recorded = "real" in name or name == "own_demand"
    if recorded:
        shapes |= {"past_demand": (4, net.stores, 16), "days_from_christmas": (4, 1)}
    if name == "own_demand":
        shapes |= dict.fromkeys(("fixed_cost", "minimum", "lot", "capacity", "scale"), (4, 1))
        shapes |= {"series": (4,), "season": (4, 4), "planned": (4, 1, net.slots + 1)}
        assert seen.pop("week").tolist() == [16] * 4
    if not recorded:
        shapes |= {"mean": (4, net.stores), "std": (4, net.stores)}
    assert {key: tuple(value.shape) for key, value in seen.items()} == shapes
    assert {value.dtype for value in seen.values()} == {F64}
    assert env.noise(scenarios).shape == (env.periods, 4, net.stores)
    assert env.noise(scenarios).is_contiguous()
    other = env.sample(4, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, scenarios[key].float()) for key, value in other.items())
    if not recorded:
        assert not torch.equal(env.sample(4, torch.Generator().manual_seed(1))["demand"], other["demand"])


def test_splits():
    env = InventoryEnv(make_task("one_store_lost"))
    assert [(e.periods, e.ignore) for e in (env, env.split("dev"), env.split("test"))] == [
        (50, 30),
        (100, 60),
        (5000, 3000),
    ]


def test_other_splits_keep_a_horizon_that_was_given():
    env = InventoryEnv(make_task("one_store_lost"), periods=12, ignore=5)
    assert [(e.periods, e.ignore) for e in (env.split("test"), env.split("dev").split("train"))] == [(12, 5)] * 2
    shorter = InventoryEnv(make_task("one_store_lost"), "test", periods=70).split("train")
    assert (shorter.periods, shorter.ignore) == (70, 30)
    with pytest.raises(ValueError, match="37 weeks after the history, got 95"):
        InventoryEnv(make_task("one_store_real_data", count=2), periods=95).split("test")


def test_a_period_compiles():
    """No graph break: a cell that agents can compile."""
    env = small("many_warehouses_real_data")
    scenarios = env.sample(2, torch.Generator())
    state, demand = env.initial(scenarios), env.noise(scenarios)

    def period(state, wanted, noise):
        env.observe(state)
        return env.step(state, env.feasible(state, wanted), noise)

    wanted = torch.rand(2, len(env.network.edges))
    compiled = torch.compile(period, fullgraph=True, backend="aot_eager")
    for expected, got in zip(period(state, wanted, demand[0]), compiled(state, wanted, demand[0])):
        same = expected if isinstance(expected, dict) else {"": expected}
        also = got if isinstance(got, dict) else {"": got}
        assert all(torch.allclose(value, also[key]) for key, value in same.items())


def test_bad_input():
    with pytest.raises(ValueError, match="no inventory task 'serial'; expected one of one_store_lost"):
        make_task("serial")
    with pytest.raises(ValueError, match="lead_time: expected >= 1, got 0"):
        make_task("one_store_lost", lead_time=0)
    with pytest.raises(TypeError, match="one_store_lost: expected options among lead_time, underage, mean, got lead"):
        make_task("one_store_lost", lead=2)
    for underage in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="underage: expected >= 0"):
            make_task("one_store_lost", underage=underage)
    with pytest.raises(ValueError, match=r"lead_time: expected int, got 2.5"):
        make_task("one_store_lost", lead_time=2.5)
    with pytest.raises(ValueError, match="stores: expected >= 1"):
        make_task("transshipment_backlogged", stores=0)
    with pytest.raises(ValueError, match="correlation: expected a number in"):
        make_task("one_warehouse_lost_demand", correlation=2.0)
    task = make_task("one_store_lost")
    with pytest.raises(ValueError, match="expected one of train, dev, test, got 'valid'"):
        InventoryEnv(task, "valid")
    with pytest.raises(ValueError, match="more than the warm-up of 5, got 5"):
        InventoryEnv(task, periods=5, ignore=5)
    with pytest.raises(ValueError, match="scenarios, got 0"):
        InventoryEnv(task).sample(0, torch.Generator())
    with pytest.raises(ValueError, match=r"expected 1 to 4 scenarios, got 5 \(there are 4 series; of hdpo set n_train"):
        small("one_store_real_data").sample(5, torch.Generator())
    with pytest.raises(ValueError, match="weeks after the history"):
        small("one_store_real_data", periods=156)
    with pytest.raises(ValueError, match="1 holding costs"):
        dataclasses.replace(task, holding=(1.0, 2.0))
    with pytest.raises(ValueError, match="recorded demand, one value per series"):
        dataclasses.replace(task, lead_time_by_series=(2,))
    with pytest.raises(ValueError, match="whole lead times from 1 to 6"):
        dataclasses.replace(make_task("one_store_real_data", count=2), lead_time_by_series=(0, 4))


@pytest.mark.parametrize(
    ("edges", "leads", "match"),
    [
        (((-1, 0), (0, 1)), (1, 1), "sorted by"),
        (((0, 1), (0, 1), (-1, 0)), (1, 1, 1), "each once"),
        (((0, 2), (-1, 0)), (1, 1), "two different nodes below 2"),
        (((0, 1),), (1,), "none for nodes \\[0\\]"),
        (((1, 0), (-1, 1)), (1, 1), "stores \\(nodes 1 and up\\)"),
        (((0, 1), (-1, 0)), (1,), "expected 2 integers"),
    ],
)
def test_bad_networks(edges, leads, match):
    with pytest.raises(ValueError, match=match):
        Network(0, 1, 1, edges, leads)


def small(name, **options):
    own = {"sales": retail_sales(4), "holding": 1.0, "underage": 9.0, "lead_time": 3, "unit_cost": 0.5}
    given = own if name == "own_demand" else {"count": 4} if "real" in name else {}
    # whole units have derivatives of their own: test_terms.py
    task = dataclasses.replace(make_task(name, **given), terms=None)
    return InventoryEnv(task, **{"ignore": 0} | options)
