"""Demand: published parameters, moments, recorded series and the stand-in for them."""

from __future__ import annotations

import ast
import datetime
import math
import re

import numpy as np
import pytest
import torch

from envs.inventory import InventoryEnv, Normal, Poisson, Recorded, load_series, make_task, synthetic_series
from envs.inventory.demand import days_from_christmas


def test_published_stores():
    demand = make_task("transshipment_backlogged", stores=10).demand
    assert demand.mean == (3.743, 4.750, 4.555, 3.801, 6.852, 3.425, 2.598, 7.266, 5.902, 4.933)
    assert demand.std == (1.765, 2.124, 1.622, 1.405, 1.714, 1.590, 0.879, 2.701, 2.127, 2.391)
    assert make_task("one_warehouse_lost_demand", stores=3).demand.mean == demand.mean[:3]
    net = make_task("many_warehouses_lost_demand").network
    rows = ["".join(str(int((w, 2 + k) in net.edges)) for k in range(10)) for w in range(2)]
    assert rows == ["0011101110", "1111110111"]
    wide = make_task("many_warehouses_real_data", count=2).network
    assert (wide.stores, wide.warehouses, wide.slots) == (21, 3, 6)


def test_published_costs_and_lead_times():
    """Those of the published code: seeds and ranges of NumPy's legacy generator."""
    holding, underage = (
        tuple(np.random.RandomState(seed).uniform(low, high, 21).tolist())
        for seed, low, high in ((73, 0.7, 1.3), (28, 6.3, 11.7))
    )
    task = make_task("one_warehouse_lost_demand", stores=5)
    assert task.holding == (0.3, *holding[:5])
    assert task.underage == underage[:5]
    assert task.network.lead_times == (*np.random.RandomState(41).randint(2, 4, 5), 3)
    assert task.lost
    assert task.demand.clip
    task = make_task("many_warehouses_lost_demand")
    assert task.holding == (0.3, 0.4, *holding[:10])
    assert task.underage == underage[:10]
    assert task.edge_cost == (0.0,) * 15 + (0.5, 1.5)
    assert task.demand.clip
    leads = dict(zip(task.network.edges, task.network.lead_times, strict=True))
    assert {lead for (source, _), lead in leads.items() if source == 0} == {5, 6}
    assert {lead for (source, _), lead in leads.items() if source == 1} == {1, 2}
    assert task.network.lead_times[-2:] == (3, 3)
    task = make_task("many_warehouses_real_data", count=2)
    assert task.holding == (0.3, 0.4, 0.2, *holding)
    assert task.underage == underage
    assert task.edge_cost == (0.0,) * task.network.internal + (0.5, 1.5, 0.7)
    assert task.network.lead_times[-3:] == (3, 3, 3)
    assert set(task.network.lead_times) == set(range(1, 7))
    assert len(task.demand.series) == 2
    assert (task.lost, task.profit) == (True, True)
    task = make_task("one_store_real_data", count=21)
    assert task.holding == (1.0,)
    assert task.underage_by_series == underage
    assert task.lead_time_by_series == tuple(np.random.RandomState(41).randint(4, 7, 21).tolist())
    assert (task.lost, task.profit) == (True, True)
    task = make_task("transshipment_backlogged")
    assert task.network.lead_times == (2, 2, 2, 3)
    assert (task.lost, task.demand.clip, task.network.keeps_stock) == (False, False, False)


def test_policies_see_mean_and_deviation():
    """A Poisson variable has the square root of its mean as deviation; recorded means are those of each store."""
    env = InventoryEnv(make_task("one_store_lost", mean=9.0))
    seen = env.observe(env.initial(env.sample(2, torch.Generator())))
    assert (seen["mean"].tolist(), seen["std"].tolist()) == ([[9.0]] * 2, [[3.0]] * 2)
    series = torch.tensor([[[1.0, 0.0], [2.0, 8.0]], [[3.0, 0.0], [6.0, 0.0]]])
    assert Recorded(series, "two stores").mean == (3.0, 2.0)


def test_moments():
    generator = torch.Generator().manual_seed(0)
    poisson = Poisson((5.0, 2.0)).draw(2000, 50, generator)
    assert torch.allclose(poisson.mean((0, 1)), torch.tensor([5.0, 2.0]), atol=0.04)
    assert torch.allclose(poisson.var((0, 1)), torch.tensor([5.0, 2.0]), atol=0.1)
    normal = Normal((5.0, 3.0, 4.0), (1.0, 1.5, 2.0), 0.5, clip=False).draw(2000, 50, generator).flatten(0, 1)
    assert torch.allclose(normal.mean(0), torch.tensor([5.0, 3.0, 4.0]), atol=0.03)
    assert torch.allclose(normal.std(0), torch.tensor([1.0, 1.5, 2.0]), atol=0.02)
    assert torch.allclose(normal.T.corrcoef(), torch.eye(3) * 0.5 + 0.5, atol=0.02)
    assert normal.min() < 0
    assert Normal((1.0,), (2.0,)).draw(100, 10, generator).min() == 0


def test_christmas():
    """2013-01-01 is a week after it, 2013-06-25 is 182 days after it, the week after that 176 days before the next."""
    days = days_from_christmas(datetime.date(2013, 1, 1), 53)
    assert days[:2].tolist() == [7, 14]
    assert days[25:27].tolist() == [182, -176]
    assert days[51:].tolist() == [-1, 6]


def test_splits_overlap_only_in_the_warm_up():
    """Metric weeks 32-110, 120-140 and 150-170; the weeks before a split are the history of its policies."""
    series = torch.arange(171.0).expand(2, 171)[:, :, None]
    env = InventoryEnv(make_task("one_store_real_data", series=Recorded(series, "weeks")))
    weeks = []
    for split in ("train", "dev", "test"):
        part = env.split(split)
        scenarios = part.sample(2, torch.Generator())
        state, demand = part.initial(scenarios), part.noise(scenarios)
        assert state["past_demand"][0, 0].tolist() == [demand[0, 0, 0] - 16 + i for i in range(16)]
        assert state["week"].tolist() == [demand[0, 0, 0]] * 2
        weeks.append((demand[part.ignore, 0, 0].item(), demand[-1, 0, 0].item()))
        following, _ = part.step(state, torch.zeros(2, 1), demand[0])
        assert following["past_demand"][0, 0, -1] == demand[0, 0, 0]
        assert following["week"].tolist() == [demand[1, 0, 0]] * 2
        calendar = days_from_christmas(datetime.date(2013, 1, 1), 171)
        assert part.observe(state)["days_from_christmas"][0, 0] == calendar[int(demand[0, 0, 0])]
    assert weeks == [(32, 110), (120, 140), (150, 170)]


def test_load_csv(tmp_path):
    file = tmp_path / "sales.csv"
    file.write_text("week,store,series,demand\n3,a,milk,5\n4,b,milk,2.5\n4,a,bread,1\n")
    series = load_series(file)
    assert series.series.tolist() == [[[5, 0], [0, 2.5]], [[0, 0], [1, 0]]]
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as spreadsheets write it
    assert torch.equal(load_series(file).series, series.series)
    assert series.source == "sales.csv"
    file.write_text("series,week,demand\nmilk,2020-03-09,1\nmilk,2020-03-23,2\n")
    dated = load_series(file)
    assert dated.series.tolist() == [[[1], [0], [2]]]
    assert dated.first_day == datetime.date(2020, 3, 9)


def test_load_npz(tmp_path):
    file = tmp_path / "sales.npz"
    np.savez(file, demand=np.ones((3, 171)), first_day="2020-01-06")
    series = load_series(file)
    assert series.series.shape == (3, 171, 1)
    assert series.first_day == datetime.date(2020, 1, 6)
    env = InventoryEnv(make_task("one_store_real_data", series=series))
    assert env.sample(3, torch.Generator())["demand"].shape == (3, 111, 1)
    assert "sales.npz" in env.task.name
    np.savez(file, demand=np.ones((3, 171, 2)))
    undated = load_series(file)
    assert (undated.series.shape[2], undated.first_day) == (2, datetime.date(2013, 1, 1))
    np.savez(file, demand=np.ones((3, 171)))
    series = load_series(file)
    by_path = make_task("one_store_real_data", series=str(file))
    assert torch.equal(by_path.demand.series, series.series)


def test_the_stand_in_says_what_it_is():
    series = synthetic_series(200, 3)
    assert "synthetic" in series.source
    assert "synthetic" in make_task("one_store_real_data", count=2).name
    assert "synthetic" in make_task("many_warehouses_real_data", count=2).name
    demand = series.series
    assert demand.shape == (200, 171, 3)
    assert torch.equal(demand, demand.round())
    busy = demand[demand.mean((1, 2)) > 20]
    assert 0.03 < (busy == 0).float().mean() < 0.12, "weeks without sales, 7.5 % of them, where much is sold in others"
    assert torch.equal(synthetic_series(200, 3).series, demand)
    assert not torch.equal(synthetic_series(200, 3, seed=1).series, demand)
    days = days_from_christmas(series.first_day, 171)
    december, summer = (days > -15) & (days < 0), days.abs() > 150
    assert demand[:, december].mean() > 1.3 * demand[:, summer].mean()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "week,demand\n1,2\n", "expected columns series, week, demand"),
        ("a.csv", "series,week,demand\n", "at least one row"),
        ("a.csv", "series,week,demand\nm,1,2\nm,1,3\n", "with repetitions"),
        ("a.csv", "series,week,demand\nm,2020-03-09,1\nm,2020-03-12,2\n", "seven days apart"),
        ("a.csv", "series,week,demand\nm,1,2\nm,2,many\n", "a number as demand, got 'many' in row 2"),
        ("a.csv", "series,week,demand\nm,1\n", "a number as demand, got None in row 1"),
        ("a.csv", "series,week,demand\nm,first,1\n", "whole numbers or days .*'first'"),
        ("a.csv", "series,week,demand\nm,1,-2\n", "not negative.* 1 other values; set returned goods to 0"),
        ("a.txt", "", "expected a .npz or .csv file"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=match):
        load_series(file)


def test_bad_series(tmp_path):
    with pytest.raises(ValueError, match=r"x: expected demand .* 3 other values"):
        Recorded(torch.full((1, 3, 1), torch.nan), "x")
    with pytest.raises(ValueError, match=r"got shape \(0, 3, 1\)"):
        Recorded(torch.zeros(0, 3, 1), "x")
    with pytest.raises(ValueError, match="positive means"):
        Poisson((5.0, 0.0))
    with pytest.raises(ValueError, match="stds that are not negative"):
        Normal((5.0,), (-1.0,))
    with pytest.raises(ValueError, match="finite means"):
        Normal((math.nan,), (1.0,))
    np.savez(tmp_path / "a.npz", sales=np.ones(3))
    with pytest.raises(ValueError, match="expected an array 'demand'"):
        load_series(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="the splits need 171 weeks, the series have 100"):
        make_task("one_store_real_data", series=synthetic_series(2, weeks=100))
    short = {"train": (0, 10, 2), "dev": (5, 10, 2), "test": (10, 10, 2)}
    make_task("one_store_real_data", series=synthetic_series(2, weeks=36), horizons=short)
    for wrong in ((0, 10), (-1, 10, 2), (0, 10, 10)):
        with pytest.raises(ValueError, match=r"first week, periods and a shorter warm-up of 'dev'.*got \("):
            make_task("one_store_real_data", count=2, horizons=short | {"dev": wrong})
    with pytest.raises(ValueError, match="expected demand of 21 stores"):
        make_task("many_warehouses_real_data", series=synthetic_series(2))
    for wrong in (
        {"train": (0, 10, 2)},
        [1, 2],
        short | {"dev": 3},
        short | {"dev": ("0", 10, 2)},
        short | {"dev": (0, 1e1, 2)},
    ):
        with pytest.raises(ValueError, match=r"one_store_real_data .*horizons: expected"):
            make_task("one_store_real_data", count=2, horizons=wrong)


def test_short_series_are_told_horizons_that_fit(recwarn):
    """156 weeks: three years, and less than the published splits need."""
    with pytest.raises(ValueError, match=r"need 171 weeks, the series have 156; .*horizons=\{'train'") as caught:
        make_task("one_store_real_data", series=synthetic_series(2, weeks=156))
    example = ast.literal_eval(re.search(r"\{.*\}", str(caught.value))[0])
    task = make_task("one_store_real_data", series=synthetic_series(2, weeks=156), horizons=example)
    last = [start + task.demand.history + periods for start, periods, _ in example.values()]
    assert last == [94, 125, 156]  # weeks up to which each split goes: none is seen twice
    assert InventoryEnv(task, "test").periods == 31
    with pytest.raises(ValueError, match="they begin with 16 weeks of history"):
        make_task("one_store_real_data", series=synthetic_series(2, weeks=20))


def test_prices_and_lead_times_that_nobody_gave_are_announced(recwarn):
    series = synthetic_series(3)
    make_task("one_store_real_data", count=3)
    make_task("one_store_real_data", series=series, prices=5.0, lead_times=[1, 2, 9])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="prices and lead_times are not given and those of a published benchmark"):
        make_task("one_store_real_data", series=series)
    with pytest.warns(UserWarning, match="prices are not given"):
        make_task("one_store_real_data", series=series, lead_times=2)
    with pytest.warns(UserWarning, match="network, lead times, costs and prices are not given.*build a Task"):
        make_task("many_warehouses_real_data", series=synthetic_series(2, 21))


def test_prices_and_lead_times_of_ones_own():
    series = synthetic_series(3)
    task = make_task("one_store_real_data", series=series, prices=[1.0, 2.5, 4.0], lead_times=[1, 2, 9])
    scenarios = InventoryEnv(task).sample(3, torch.Generator())
    assert scenarios["underage"].tolist() == [[1.0], [2.5], [4.0]]
    assert scenarios["lead_time"].tolist() == [[1.0], [2.0], [9.0]]
    assert task.network.slots == 9
    task = make_task("one_store_real_data", series=series, prices=5, lead_times=2)
    assert (task.underage_by_series, task.lead_time_by_series, task.network.slots) == ((5, 5, 5), (2, 2, 2), 2)
    for wrong, message in (
        ({"prices": [1.0, 2.0]}, "prices: expected one, or one for each of the 3 series"),
        ({"prices": 0.0}, "prices: expected positive numbers"),
        ({"prices": float("nan")}, "prices: expected positive numbers"),
        ({"lead_times": 1.5}, "lead_times: expected weeks, at least 1"),
        ({"lead_times": "4"}, "lead_times: expected one, or one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("one_store_real_data", series=series, **{"prices": 1.0, "lead_times": 1} | wrong)


def test_series_without_dates_and_files_that_are_not_there(tmp_path, monkeypatch):
    file = tmp_path / "sales.csv"
    file.write_text("series,week,demand\nm,1,2\n")
    with pytest.warns(UserWarning, match=r"sales.csv: the series have no dates: week 0 .* 2013-01-01"):
        load_series(file)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"expected a file, got 'other.csv', which there is not in .*; a relative path counts from the working",
    ):
        load_series("other.csv")
