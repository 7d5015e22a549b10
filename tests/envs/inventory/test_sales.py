"""A planner's own sales: layouts, names, gaps, plans, and rows that are wrong."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from envs.inventory import InventoryEnv, read_sales
from envs.inventory.own import own_demand
from envs.inventory.sales import measured_as

LONG = "item,day,sold,shop,promo,eur\n"


def write(folder: Path, text: str, name: str = "sales.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_long_table(tmp_path: Path) -> None:
    path = write(tmp_path, LONG + "B,2024-01-08,3,X,1,2.0\nA,2024-01-01,5,X,0,4.0\nA,2024-01-08,1,Y,0,4.0\n"
                                  "B,2024-01-01,2,Y,,2.0\nA,2024-01-15,2,X,0,\nB,2024-01-15,7,X,0,1.0\n"
                                  "A,2024-01-22,,X,1,4.0\n")  # fmt: skip
    with pytest.warns(UserWarning, match="6 of 12 product-weeks have no row and count as zero demand"):
        found = read_sales(path, product="item", date="day", units="sold", location="shop", promotion=("promo",))
    assert (found.products, found.locations) == (("B", "A"), ("X", "Y"))
    assert found.first_day == datetime.date(2024, 1, 1)
    assert found.series.tolist() == [[[0, 2], [3, 0], [7, 0]], [[5, 0], [0, 1], [2, 0]]]
    assert found.feature_names == ("promotion:promo",)
    assert found.features is not None
    assert found.features[1, :, 0, 0].tolist() == [0, 0, 0, 1], "the blank row plans a promotion"
    assert found.features[0, :, 0, 0].tolist() == [0, 1, 0, 0]
    assert found.beyond[1].flatten().tolist() == [0, 0], "nothing is planned after the plan"
    with pytest.warns(UserWarning, match="no row"):
        priced = read_sales(path, product="item", date="day", units="sold", location="shop", price="eur")
    assert priced.features is not None
    # A at X: 4, (carried on) 4, 4, 4; the median of the first half is 4. B at Y: 2 throughout
    assert priced.features[1, :, 0, 0].tolist() == [0, 0, 0, 0]
    assert priced.features[0, :, 1, 0].tolist() == [0, 0, 0, 0]
    # B at X: 2 (carried back), 2, 1, 1
    assert priced.features[0, :, 0, 0].tolist() == [0, 0, -0.5, -0.5]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("sku,2024-01-01,2024-01-08\nA,1,2\nB,3,\n", {}),
        ("date,A,B\n2024-01-01,1,3\n2024-01-08,2,0\n", {}),
        ("sku;date;units\nA;2024-01-01;1\nA;2024-01-08;2\nB;2024-01-01;3\nB;2024-01-08;0\n", {}),
    ],
)
def test_layouts_agree(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    found = read_sales(write(tmp_path, text), **options)
    assert found.products == ("A", "B")
    assert found.series.squeeze(2).tolist() == [[1, 2], [3, 0]]
    assert found.step_days == 7


def test_days_add_up_to_whole_weeks(tmp_path: Path) -> None:
    # 2024-01-03 is a Wednesday: its week is not complete, nor is the one of the 22nd
    days = [datetime.date(2024, 1, 3) + datetime.timedelta(days=i) for i in range(20)]
    path = write(tmp_path, "sku,date,units,promo\n" + "".join(f"A,{day},1,{int(day.day == 9)}\n" for day in days))
    with pytest.warns(UserWarning, match="week is not complete"):
        found = read_sales(path, period="week", promotion=["promo"])
    assert found.first_day == datetime.date(2024, 1, 8)
    assert found.series.flatten().tolist() == [7, 7]
    assert found.features is not None
    assert found.features[0, :2, 0, 0].tolist() == [1, 0], "the only week with a promotion, relative to the largest"
    daily = read_sales(path)
    assert (daily.step_days, daily.history, daily.series.shape[1]) == (1, 28, 20)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = [datetime.date(2024, 1, 1), datetime.date(2024, 1, 8)]
    table = arrow.table({"sku": ["A", "A"], "date": days, "units": [1.0, 4.0]})
    parquet.write_table(table, tmp_path / "sales.parquet")
    assert read_sales(tmp_path / "sales.parquet").series.flatten().tolist() == [1, 4]
    write(tmp_path, "no parquet", "bad.parquet")
    with pytest.raises(ValueError, match="expected a Parquet file"):
        read_sales(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sku,date,units\nA,2024-01-01,x\nA,2024-01-08,1\n", {}, "row 2: units 'x' is no number"),
        ("sku,date,units\nA,2024-01-01,1\nA,8.1.2024,1\n", {}, "row 3: date '8.1.2024' is no day"),
        ("sku,date,units\nA,2024-01-01,-1\n", {}, "row 2: units -1 is negative"),
        ("sku,date,units\n,2024-01-01,1\n", {}, "row 2: no sku"),
        ("sku,date,units\nA,2024-01-01,1\nA,2024-01-01,2\n", {}, "row 3: repeats row 2"),
        ("sku,date,units\nA,2024-01-01,\nA,2024-01-08,2\n", {}, "row 2: units is blank"),
        ("sku,date,units\nA,2024-01-01,0\n", {}, "expected some demand of every product, got none of A"),
        ("sku,date,units\nA,2024-01-01,1,7\n", {}, "expected 3 values in row 2, got 4"),
        ("sku,date\nA,2024-01-01\n", {}, "row 2: sku is 'A'"),
        ("a,b\n1,2\n", {}, "expected the columns sku, date, units, or sku and one column per day"),
        ("sku,date,units\n", {}, "expected at least one row"),
        ("", {}, "got an empty file"),
        ("sku,date,units\nA,2024-01-01,1\n", {"location": "shop"}, "without shop"),
        ("sku,date,units,p\nA,2024-01-01,1,z\n", {"promotion": ["p"]}, "row 2: promotion:p is no number"),
        ("sku,date,units,p\nA,2024-01-01,1,0\n", {"price": "p"}, "expected positive prices"),
        ("sku,2024-01-01\nA,1\n", {"price": "p"}, "columns of long tables"),
        ("sku,2024-01-01,x\nA,1,2\n", {}, "got also x"),
        ("sku,sku,units\nA,2024-01-01,1\n", {}, "a name for every column, each once"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sales(write(tmp_path, text), **options)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sales: expected a file"):
        read_sales(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"expected a .csv or .parquet file"):
        read_sales(write(tmp_path, "x", "sales.xls"))


def test_plans_and_seasons_reach_the_policy(tmp_path: Path) -> None:
    rows = [(week, 1 + week % 3, int(week in (30, 60))) for week in range(60)] + [(60, "", 1)]
    first = datetime.date(2024, 1, 1)
    text = "".join(f"A,{first + datetime.timedelta(weeks=w)},{units},{promo}\n" for w, units, promo in rows)
    sales = read_sales(write(tmp_path, "sku,date,units,promo\n" + text), promotion=["promo"], history=4)
    env = InventoryEnv(own_demand(sales, holding=1.0, underage=2.0, lead_time=2))
    seen = env.observe(env.initial(env.sample(1, torch.Generator())))
    assert seen["planned"].shape == (1, 1, 3), "this period and those until its order is followed by the next"
    state = env.initial(env.sample(1, torch.Generator()))
    for _ in range(24):  # periods begin in week 4
        state, _ = env.step(state, torch.zeros(1, 1), torch.ones(1, 1))
    assert env.observe(state)["planned"].tolist() == [[[0.0, 0.0, 1.0]]], "week 28 sees the promotion of week 30"
    here, today = env.today(torch.zeros(1, 1, 2))
    assert here.observe(today)["planned"].tolist() == [[[1.0, 0.0, 0.0]]], "the plan after the last week of sales"
    assert here.observe(today)["past_demand"].tolist() == [[[3.0, 1.0, 2.0, 3.0]]]


def test_blank_lines_count_as_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "sku,date,units\nA,2024-01-01,3\n\n,,\nA,2024-01-08,x\n")
    with pytest.raises(ValueError, match="row 5: units 'x' is no number"):
        read_sales(path)


def test_newer_sales_are_measured_as_the_older_were(tmp_path: Path) -> None:
    """A discount of 20 was the largest, 1, and one of 50 is 2.5 of it; a price of 6 is over the usual price of 4, not
    over the one of 5 that newer sales have."""
    head = "sku,date,units,off,idle,eur\n"
    options: dict[str, Any] = {"promotion": ("off", "idle"), "price": "eur"}
    rows = "A,2024-01-01,1,20,0,4\nA,2024-01-08,2,0,0,4\nA,2024-01-15,1,0,0,5\nA,2024-01-22,1,0,0,6\n"
    old = read_sales(write(tmp_path, head + rows), **options)
    later = "A,2024-01-29,1,0,3,6\nA,2024-02-05,3,50,0,6\nA,2024-02-12,3,0,0,6\n"
    new = read_sales(write(tmp_path, head + rows.replace(",4\n", ",5\n", 2) + later, "new.csv"), **options)
    assert old.features is not None
    assert new.features is not None
    assert new.features[0, 0, 0].tolist() == pytest.approx([0.4, 0.0, 0.0])
    found = measured_as(new, old).features
    assert found is not None
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0, 0.0, 2.5, 0.0])
    assert found[0, :, 0, 1].tolist() == [0, 0, 0, 0, 1, 0, 0], "there was none of it before"
    assert found[0, :, 0, 2].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5])
