"""Lots, minimum, capacity, fixed cost and shelf life: exact forward, the stated derivatives."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from ccrl.inventory.functional_env import State
from envs.inventory import InventoryEnv, Recorded, retail_sales, simulate
from envs.inventory.own import own_demand
from envs.inventory.scores import changed, score
from envs.inventory.task import Task
from envs.inventory.terms import Terms, expire, fixed_charge, place


def edge_terms(lot: float = 1.0, minimum: float = 0.0, capacity: float = math.inf, fixed: float = 0.0) -> State:
    names = {"lot": lot, "minimum": minimum, "capacity": capacity, "fixed_cost": fixed}
    return {name: torch.tensor([[value]], dtype=torch.float64) for name, value in names.items()}


@pytest.mark.parametrize(
    ("wanted", "terms", "outside", "inside"),
    [
        (2.4, {}, 2, 2),
        (2.5, {}, 3, 2),
        (4.9999, {}, 5, 5),  # a float32 share of a whole stock
        (8.0, {"lot": 6}, 6, 6),
        (9.0, {"lot": 6}, 12, 6),
        (2.9, {"lot": 6}, 0, 0),
        (3.0, {"minimum": 5}, 5, 0),  # nearer to 5 than to 0
        (2.0, {"minimum": 5}, 0, 0),
        (5.0, {"minimum": 5, "lot": 4}, 8, 0),  # the least order is two lots
        (30.0, {"capacity": 10}, 10, 10),
        (30.0, {"capacity": 10, "lot": 4}, 8, 8),
        (0.0, {"minimum": 5, "lot": 4, "capacity": 100}, 0, 0),
    ],
)
def test_what_is_ordered(wanted: float, terms: dict[str, float], outside: float, inside: float) -> None:
    action = torch.tensor([[wanted]], dtype=torch.float64)
    assert place(action, edge_terms(**terms), 0).item() == outside
    assert place(action, edge_terms(**terms), 1).item() == inside


def test_derivatives_of_orders() -> None:
    for wanted, slope in ((7.3, 1.0), (12.0, 0.0)):
        action = torch.tensor([[wanted]], dtype=torch.float64, requires_grad=True)
        place(action, edge_terms(lot=2, capacity=10), 0).sum().backward()
        assert action.grad is not None
        assert action.grad.item() == slope


def test_fixed_cost() -> None:
    terms = edge_terms(fixed=8.0)
    ordered = torch.tensor([[0.0], [3.0]], dtype=torch.float64, requires_grad=True)
    width = torch.tensor([[2.0]], dtype=torch.float64)
    cost = fixed_charge(ordered, terms, width)
    assert cost.tolist() == [0.0, 8.0]
    cost.sum().backward()
    # 8 / 2 exp(-q / 2)
    assert ordered.grad is not None
    assert ordered.grad.flatten().tolist() == pytest.approx([4.0, 4.0 * math.exp(-1.5)])


def test_the_oldest_is_sold_first_and_expires() -> None:
    ages = torch.tensor([[[2.0, 3.0, 4.0]]], dtype=torch.float64)
    left, waste = expire(ages, torch.tensor([[4.0]], dtype=torch.float64))
    assert left.tolist() == [[[1.0, 4.0, 0.0]]]  # 2 old ones and 2 of the next are sold
    assert waste.tolist() == [[0.0]]
    left, waste = expire(ages, torch.tensor([[0.5]], dtype=torch.float64))
    assert left.tolist() == [[[3.0, 4.0, 0.0]]]
    assert waste.tolist() == [[1.5]]
    left, waste = expire(ages, torch.tensor([[20.0]], dtype=torch.float64))
    assert left.sum() == waste.sum() == 0
    point = (torch.rand(2, 1, 3, dtype=torch.float64, requires_grad=True),
             torch.rand(2, 1, dtype=torch.float64, requires_grad=True))  # fmt: skip
    assert torch.autograd.gradcheck(expire, point)


def constant(sales: float, periods: int = 60) -> Recorded:
    return Recorded(torch.full((1, periods, 1), sales), "constant", history=4)


def task_of(sales: float = 2.0, **options: float) -> Task:
    return own_demand(constant(sales), holding=1.0, underage=9.0, lead_time=1, **options)  # type: ignore[arg-type]


def test_costs_by_hand() -> None:
    """Demand 2 a period, orders of 6 every third period, arriving one later; after the start stock is 6, 4, 2 before
    demand and 4, 2, 0 after it: 2 a period of holding. A fixed cost of 3 and a unit cost of 0.5 add 3 / 3 + 0.5 x 2."""
    task = task_of(lot=6, fixed_cost=3.0, unit_cost=0.5)
    env = InventoryEnv(task, "test")

    def order(seen: State) -> torch.Tensor:
        return (4.0 - seen["inventory"].sum(2)).clamp_min(0.0) * 1.5  # 2 on hand: 3, half a lot, so one lot

    found, trace = score(env, order, env.sample(1, torch.Generator()))
    ordered = trace.action[env.ignore :, 0, 0]
    assert set(ordered.tolist()) == {0.0, 6.0}
    assert found.cost.item() == pytest.approx(2.0 + 1.0 + 1.0)
    assert found.fill_rate.item() == 1.0
    assert found.stock.item() == pytest.approx(2.0)
    assert found.orders.item() == pytest.approx(1 / 3)
    assert found.units.item() == pytest.approx(2.0)


def test_shelf_life_by_hand() -> None:
    """Goods of two periods: 6 arrive, 2 and 2 are sold, 2 expire; orders of 6 every second period. After demand 4 and
    2 lie there (holding 3 a period), and 2 in two periods are waste, at 4 each: 4 a period."""
    task = task_of(shelf_life=2, waste_cost=4.0)
    env = InventoryEnv(task, "test")

    def order(seen: State) -> torch.Tensor:
        return torch.where(seen["ages"][:, :, 1] > 0, 0.0, 6.0)  # nothing fresh: order

    found, trace = score(env, order, env.sample(1, torch.Generator()))
    assert found.cost.item() == pytest.approx(3.0 + 4.0)
    assert found.fill_rate.item() == 1.0
    on_hand = trace.inventory[env.ignore : -1, 0, 0, 0]
    assert sorted(set(on_hand.tolist())) == [4.0, 6.0]


def test_ages_and_stock_agree_while_policies_train() -> None:
    task = own_demand(retail_sales(5), holding=1.0, underage=9.0, lead_time=3, shelf_life=3, waste_cost=1.0)
    env = InventoryEnv(task)
    state, factor = env.initial(env.sample(5, torch.Generator())), torch.tensor(1.5, requires_grad=True)
    total = torch.zeros(())
    for demand in env.noise(env.sample(5, torch.Generator())):
        wanted = (factor * 4.0 * state["scale"] - state["inventory"].sum(2)).clamp_min(0.0)
        state, cost = env.step(state, wanted, demand)
        total = total + cost.sum()
        torch.testing.assert_close(state["ages"].sum(2), state["inventory"][:, :, 0])
        assert (state["ages"] >= 0).all()
    total.backward()
    assert factor.grad is not None
    assert factor.grad.isfinite()
    assert factor.grad != 0


def test_whole_units_in_a_network(tmp_path: Path) -> None:
    path = tmp_path / "network.csv"
    lines = [f"W{w},S{k},{lead}" for w, lead in ((1, 4), (2, 1)) for k in range(1, 6)] + [
        "supplier,W1,3",
        "supplier,W2,3",
    ]
    path.write_text("source,target,lead_time\n" + "\n".join(lines) + "\n")
    task = own_demand(retail_sales(3, stores=5), holding=1.0, underage=9.0, network=path)
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(3, torch.Generator())

    def order(seen: State) -> torch.Tensor:
        usual = seen["scale"].repeat(1, 2) * 0.7
        return torch.cat((usual, usual.sum(1, keepdim=True).expand(-1, 2) * 0.6), 1)

    trace = simulate(env, order, scenarios)
    assert torch.equal(trace.action, trace.action.round())
    assert torch.equal(trace.inventory, trace.inventory.round())
    assert (trace.inventory >= 0).all()
    assert (trace.action[:, :, :10].sum() > 0).item()


@pytest.mark.parametrize(
    ("question", "name", "expected"),
    [("lead_time=-1", "lead_time", 1.0), ("underage=*2", "underage", 18.0), ("lot=6", "lot", 6.0),
     ("unit_cost=+0.5", "edge_cost", 0.5), ("holding = 3", "holding", 3.0)],
)  # fmt: skip
def test_what_if(question: str, name: str, expected: float) -> None:
    task = own_demand(constant(3.0), holding=1.0, underage=9.0, lead_time=2)
    assert changed(task, question).by_series[name].flatten().tolist() == [expected]
    assert task.by_series["lead_time"].item() == 2, "the task asked of stays as it is"


def test_what_if_of_demand_and_bad_questions() -> None:
    task = own_demand(constant(3.0), holding=1.0, underage=9.0, lead_time=2)
    twice = changed(task, "demand=*2").demand
    assert isinstance(twice, Recorded)
    assert twice.series.unique().tolist() == [6.0]
    for question in ("lead_time", "price=+1", "lead_time=+x", "demand=+1"):
        with pytest.raises(ValueError, match="what_if: expected"):
            changed(task, question)
    with pytest.raises(ValueError, match="train with --vary-lead-time 1"):
        changed(task, "lead_time=+1")
    varied = own_demand(constant(3.0), holding=1.0, underage=9.0, lead_time=2, vary_lead_time=1)
    assert changed(varied, "lead_time=+1").by_series["lead_time"].item() == 3
    with pytest.raises(ValueError, match="from 1 to 3"):
        changed(varied, "lead_time=+2")


def test_what_if_of_random_lead_times_keeps_whole_periods() -> None:
    """1 to 2 periods times 1.5 are 1 to 3: orders of a lead time of 1.5 would arrive in no period."""
    task = own_demand(constant(3.0), holding=1.0, underage=9.0, lead_time=2, lead_time_min=1, vary_lead_time=1)
    env = InventoryEnv(changed(task, "lead_time=*1.5"))
    scenarios = env.sample(1, torch.Generator().manual_seed(0))
    assert scenarios["arrival"].unique().tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="earliest: expected whole periods"):
        dataclasses.replace(task, earliest=torch.tensor([[1.5]]))


def test_what_if_nothing_could_be_ordered() -> None:
    task = own_demand(constant(3.0), holding=1.0, underage=9.0, lead_time=2, capacity=8.0)
    with pytest.raises(ValueError, match="capacity: expected at least the minimum in whole lots, got 8"):
        changed(task, "lot=9")
    with pytest.raises(ValueError, match="lot: expected positive numbers"):
        dataclasses.replace(task, by_series=task.by_series | {"lot": torch.zeros(1, 1)})


def test_bad_terms() -> None:
    with pytest.raises(ValueError, match="none negative, got -1"):
        Terms(shelf_life=-1)
    with pytest.raises(ValueError, match="expected 0 without a shelf life"):
        Terms(waste_cost=1.0)
