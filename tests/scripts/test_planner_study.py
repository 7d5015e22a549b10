"""The planner's case: its tasks, its cells, its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from envs.inventory import InventoryEnv, retail_sales
from scripts.studies.planner import report, study


def test_sales_are_decided_by_the_seed_alone() -> None:
    first, again, other = (retail_sales(6, 70, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(first.series, again.series)
    assert not torch.equal(first.series, other.series)
    assert torch.equal(first.series, first.series.round())
    assert first.features is not None
    assert set(first.features.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(first.features[:, :, 0], first.features[:, :, 1]), "promotions are the chain's, not a store's"
    many = retail_sales(200, 156)
    shares = (many.series == 0).float().mean((1, 2))
    assert 0.3 < (shares > 0.25).float().mean() < 0.5, "two in five are intermittent"
    assert many.features is not None
    sold = many.series[many.features[..., 0] > 0].mean() / many.series[many.features[..., 0] == 0].mean()
    assert 2.0 < sold < 3.0, "a promotion lifts by 0.5 to 2.5"


def test_cases_are_those_of_the_protocol() -> None:
    one, fan, two = (study.case_task(case, 0, 3) for case in ("store", "warehouse", "two_warehouses"))
    assert one.split_horizons == {"train": (0, 78, 16), "dev": (62, 47, 16), "test": (93, 47, 16)}
    assert (one.network.lead_times, fan.network.lead_times) == ((4,), (2,) * 5 + (3,))
    assert two.network.lead_times == (4,) * 5 + (1,) * 5 + (3, 3)
    assert two.by_series["edge_cost"][0].tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 2
    assert fan.by_series["holding"][0].tolist() == [0.5] + [1.0] * 5
    lots = study.case_task("store", 0, 3, lot=6, capacity=2.0)
    assert (lots.by_series["capacity"] >= 6).all()
    env = InventoryEnv(lots)
    scenarios = env.sample(3, torch.Generator())
    ordered = env.placed(env.initial(scenarios), torch.full((3, 1), 1e6))
    assert (ordered % 6 == 0).all()
    assert (ordered <= lots.by_series["capacity"]).all()


def test_a_small_study_runs_resumes_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--out", str(tmp_path), "--products", "2", "--weeks", "60", "--epochs", "1"]
    argv = ["run", *small, "--cases", "store", "--seeds", "3", "4"]
    assert study.main(argv) == 0
    assert study.main(argv) == 0
    assert "2 cells, 2 of them finished before" in capsys.readouterr().out
    assert study.main(["terms", *small, "--seeds", "3"]) == 0
    assert study.main(["report", "--out", str(tmp_path), "--figures", str(tmp_path)]) == 0
    page = (tmp_path / "planner.md").read_text()
    assert "## One store\n" in page
    assert "| ours |" in page
    assert "| (s, S) |" in page
    assert "Seeds 3, 4; ours by seed" in page
    with pytest.raises(FileNotFoundError, match="run a case first"):
        report.write(tmp_path / "nothing", tmp_path)


def test_the_table_pairs_by_seed() -> None:
    rows = [
        {"method": method, "seed": str(seed), "cost": str(cost), "fill": "0.9", "stock": "1", "orders": "1",
         "cpu": "60", "epochs run": "5"}
        for method, costs in (("ours", (9.0, 18.0)), ("base_stock", (10.0, 20.0))) for seed, cost in enumerate(costs)
    ]  # fmt: skip
    # -10 % in both: no spread
    assert "| base stock | 15.00 | -10.0 (-10.0 to -10.0) | 90.0 % | 1.0 | 1.00 |" in report.table(rows)
