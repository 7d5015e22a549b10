"""A task of one's own numbers: where they come from, what is refused, what is announced; stock and networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from envs.inventory import InventoryEnv, Recorded, make_task, retail_sales
from envs.inventory.own import own_demand, read_stock
from envs.inventory.task import horizons_of

NUMBERS: dict[str, Any] = {"holding": 1.0, "underage": 9.0, "lead_time": 2}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_horizons_score_every_held_out_week() -> None:
    # 156 weeks: fifths of 31; training 156 - 62 - 16 = 78, from week 16 on
    assert horizons_of(156, 16, 16) == {"train": (0, 78, 16), "dev": (62, 47, 16), "test": (93, 47, 16)}
    found = horizons_of(156, 16, 16)
    for split, (start, periods, warm) in found.items():
        if split != "train":
            assert periods - warm == 31
            assert start + 16 + warm == {"dev": 94, "test": 125}[split]
    assert found["test"][0] + 16 + found["test"][1] == 156
    with pytest.raises(ValueError, match="expected at least 52 periods"):
        horizons_of(51, 16, 16)
    assert horizons_of(52, 16, 16)["train"][1] == 16


@pytest.mark.parametrize("name", NUMBERS)
def test_what_nobody_gave_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}: expected a number for every product and location, got none for P01"
    ):
        own_demand(retail_sales(2), **{k: v for k, v in NUMBERS.items() if k != name})


def test_costs_by_product_and_location(tmp_path: Path) -> None:
    table = write(tmp_path, "costs.csv", "sku,location,holding,lot,lead_time\n,,2,,3\nP02,,,6,\nP02,S2,5,,4\n,S1,3,,\n")
    task = own_demand(retail_sales(3, stores=2), costs=table, holding=1.0, underage=9.0)
    assert task.by_series["holding"].tolist() == [[3, 2], [3, 5], [3, 2]]
    assert task.by_series["lot"].tolist() == [[1, 1], [6, 6], [1, 1]]
    assert task.by_series["lead_time"].tolist() == [[3, 3], [3, 4], [3, 3]]
    assert task.network.lead_times == (3, 4)
    assert task.nodes == ("S1", "S2")
    assert make_task("own_demand", sales=retail_sales(2), **NUMBERS).by_series["capacity"].isinf().all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sku,holding\nX,1\n", "row 2: X  is not among the sales"),
        ("sku,holding\nP01,x\n", "row 2: holding 'x' is no number"),
        ("sku,holding\nP01,-1\n", "row 2: holding '-1' is no number of at least 0"),
        ("sku,price\nP01,1\n", "got also price"),
        ("sku,lot\nP01,0\n", "lot: expected whole numbers of at least 1, got 0 for P01"),
        ("sku,lead_time\nP01,1.5\n", "lead_time: expected whole numbers"),
        ("sku,lead_time_min\nP01,3\n", "lead_time_min: expected at most lead_time"),
        ("sku,capacity,lot\nP02,3,4\n", "capacity: expected at least the minimum in whole lots, got 3 for P02 at S1"),
        # the smallest order is two lots of 5, since one is below the minimum
        ("sku,capacity,lot,minimum\nP02,8,5,6\n", "got 8 for P02 at S1 with a minimum of 6 and lots of 5"),
    ],
)
def test_bad_costs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_demand(retail_sales(2), costs=write(tmp_path, "costs.csv", text), **NUMBERS)


def test_what_nothing_would_read_is_refused() -> None:
    with pytest.raises(ValueError, match="price, history: expected with a file of sales"):
        own_demand(retail_sales(2), price="eur", history=8, **NUMBERS)
    with pytest.raises(ValueError, match="count: expected none with series of your own"):
        make_task("one_store_real_data", series=retail_sales(2, 171), count=1)


def test_waste_and_shelf_life_belong_together() -> None:
    with pytest.raises(ValueError, match="waste_cost: expected the cost of a unit that expires"):
        own_demand(retail_sales(2), shelf_life=3, **NUMBERS)
    with pytest.raises(ValueError, match="shelf_life: expected periods with waste_cost 2"):
        own_demand(retail_sales(2), waste_cost=2.0, **NUMBERS)
    with pytest.raises(ValueError, match="expected lost sales"):
        own_demand(retail_sales(2), waste_cost=2.0, shelf_life=3, lost=False, **NUMBERS)


NETWORK = "source,target,lead_time,unit_cost\nsupplier,W,3,\nW,S1,2,0.5\nW,S2,1,\nsupplier,S2,4,2\n"


def test_network_from_a_file(tmp_path: Path) -> None:
    options = {"holding": 1.0, "underage": 9.0, "network": write(tmp_path, "network.csv", NETWORK)}
    task = own_demand(retail_sales(2, stores=2), vary_lead_time=1, **options)
    assert task.network.edges == ((0, 1), (0, 2), (-1, 0), (-1, 2))
    assert task.network.lead_times == (3, 2, 4, 5), "the longest that training varies to"
    assert task.by_series["lead_time"][0].tolist() == [2, 1, 3, 4]
    assert task.by_series["edge_cost"][1].tolist() == [0.5, 0, 0, 2]
    assert task.nodes == ("W", "S1", "S2")
    train = InventoryEnv(task)
    assert (train.available, train.split("test").available) == (6, 2)
    drawn = train.sample(6, torch.Generator())
    assert drawn["lead_time"].tolist() == [[2, 1, 3, 4]] * 2 + [[1, 1, 2, 3]] * 2 + [[3, 2, 4, 5]] * 2
    assert torch.equal(drawn["demand"][:2], drawn["demand"][4:])
    with pytest.raises(ValueError, match="lead_time is a column of the network file"):
        own_demand(retail_sales(2, stores=2), costs=write(tmp_path, "c.csv", "sku,lead_time\nP01,2\n"), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("supplier,X,3\nsupplier,S1,1\nsupplier,S2,1\n", "row 2: supplier ships to X"),
        ("S1,S2,3\nsupplier,S1,1\n", "row 2: S1 ships to S2"),
        ("W,S1,x\nW,S2,1\nsupplier,W,1\n", "row 2: lead_time 'x' is no number"),
        ("W,S1,1\nW,S2,1\nV,W,1\n", "row 4: V ships to W"),
        ("W,S1,1\nW,S2,1\n", "every node to have a supplier"),
        ("W,S1,1\nW,S1,1\nW,S2,1\nsupplier,W,1\n", "every link once"),
    ],
)
def test_bad_networks(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "network.csv", "source,target,lead_time\n" + text)
    with pytest.raises(ValueError, match=message):
        own_demand(retail_sales(2, stores=2), holding=1.0, underage=9.0, network=path)


def test_stock_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "stock.csv", "sku,on_hand,arriving_1\nP02,7,2\nP01,3,0\n")
    task = own_demand(retail_sales(2), stock=path, **NUMBERS)
    assert task.by_series["stock"].tolist() == [[[3, 0]], [[7, 2]]]
    scenarios = InventoryEnv(task, "test").sample(2, torch.Generator())
    assert scenarios["inventory"].tolist() == [[[3, 0]], [[7, 2]]]
    with pytest.raises(ValueError, match="stock_periods: expected none with a stock table"):
        own_demand(retail_sales(2), stock=path, stock_periods=1.0, **NUMBERS)
    filled = own_demand(retail_sales(2), stock_periods=2.0, **NUMBERS)
    assert torch.equal(filled.by_series["stock"][:, 0, 0], (2 * filled.by_series["scale"][:, 0]).round())
    assert filled.by_series["stock"][:, :, 1:].sum() == 0
    bare = write(tmp_path, "bare.csv", "sku,on_hand\nP02,7\nP01,3\n")
    with pytest.warns(UserWarning, match="nothing is taken to be on its way"):
        own_demand(retail_sales(2), stock=bare, **NUMBERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sku,on_hand,arriving_1\nP01,3,0\n", "got none of P02"),
        ("sku,on_hand,arriving_1\nP01,3,0\nP02,1.5,0\n", "row 3: on_hand '1.5' of P02 is no whole number"),
        ("sku,on_hand,arriving_1\nP01,3,0\nP01,1,0\n", "row 3: P01  is given twice"),
        ("sku,on_hand,arriving_1\nP09,3,0\n", "row 2: P09  is not among the sales"),
        ("sku,on_hand,arriving_2\nP01,3,0\n", "got also arriving_2"),
        ("sku,units\nP01,3\n", "without on_hand"),
    ],
)
def test_bad_stock(tmp_path: Path, text: str, message: str) -> None:
    task = own_demand(retail_sales(2), **NUMBERS)
    assert isinstance(task.demand, Recorded)
    with pytest.raises(ValueError, match=message):
        read_stock(write(tmp_path, "s.csv", text), task.demand, task.network, task.nodes, "sku", "location")


def test_random_lead_times_arrive_between_the_two() -> None:
    task = own_demand(retail_sales(3), **(NUMBERS | {"lead_time": 4, "lead_time_min": 2}))
    env = InventoryEnv(task)
    scenarios = env.sample(3, torch.Generator().manual_seed(0))
    assert set(scenarios["arrival"].flatten().tolist()) == {2.0, 3.0, 4.0}
    state = env.initial(scenarios)
    assert env.observe(state)["lead_time"].tolist() == [[3.0]] * 3, "a policy knows the mean"
    lead = scenarios["arrival"][:, 0, 0].long()
    state, _ = env.step(state, torch.full((3, 1), 5.0), torch.zeros(3, 1))
    # ordered in period 0 with lead time l: after this step it is l - 1 periods away
    assert [state["inventory"][i, 0, int(lead[i]) - 1].item() for i in range(3)] == [5.0, 5.0, 5.0]
    again = env.sample(3, torch.Generator().manual_seed(0))
    assert torch.equal(again["arrival"], scenarios["arrival"])


def test_too_many_scenarios_and_foreign_constants() -> None:
    task = own_demand(retail_sales(2), **NUMBERS)
    with pytest.raises(ValueError, match="expected 1 to 2 scenarios, got 3"):
        InventoryEnv(task).sample(3, torch.Generator())
    with pytest.raises(ValueError, match=r"stock: expected \[series, nodes, slots\] \(2, 1, 2\)"):
        InventoryEnv(task).today(torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="expected recorded demand"):
        InventoryEnv(make_task("one_store_lost")).today(torch.zeros(1, 1, 4))


def test_products_that_begin_after_training_are_said() -> None:
    sales = retail_sales(2)
    late = sales.series.clone()
    late[1, :120] = 0.0
    with pytest.warns(UserWarning, match="nothing sold in the training periods, in some location: P02"):
        task = own_demand(Recorded(late, "late", products=("P01", "P02")), **NUMBERS)
    assert task.by_series["scale"][1].item() == pytest.approx(1 / 94)
