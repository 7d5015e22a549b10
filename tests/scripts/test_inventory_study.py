"""The inventory study: resuming, the estimate of a gap, like-for-like scores, tables from CSV files, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ccrl.experiment.csv_table import read_rows
from ccrl.inventory.pathwise import Unrolled, average_cost
from envs.inventory import InventoryEnv, make_task
from envs.inventory.batched import mean_flow
from envs.inventory.oracle import oracle_cost
from scripts.studies.inventory import cells, methods, report
from scripts.studies.inventory import study as inventory
from scripts.studies.inventory.study import Data, Gaps, Methods, Speed


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# -- running ----------------------------------------------------------------------------------------------------------


def test_finished_cells_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, int]] = []

    def fake(cell: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        if len(asked) == 3:
            raise RuntimeError("the fourth fails")
        asked.append((options["lead_time"], cell["seed"]))
        return {"cost": 0.1 + 0.2} | ({"late column": 1} if len(asked) > 1 else {})

    monkeypatch.setitem(inventory.MEASURES, "gaps", fake)
    kind = cells.KINDS["serial"]
    kinds = {"serial": cells.Kind(**vars(kind) | {"policies": ("vanilla",)})}
    monkeypatch.setattr(cells, "KINDS", kinds)
    study = Gaps(out=tmp_path, only=("serial",), seeds=(0,))
    assert inventory.run_study(study) == 1
    assert "FAILED" in capsys.readouterr().out
    rows = read_rows(tmp_path / "gaps_serial.csv")
    assert [row["late column"] for row in rows] == ["", "1", "1"]
    assert float(rows[0]["cost"]) == 0.1 + 0.2
    asked.clear()
    assert inventory.run_study(study) == 0
    assert asked == [(4, 0)], "only the one that failed was left"
    assert inventory.run_study(Gaps(out=tmp_path, only=("serial",), seeds=(0, 1))) == 2
    assert asked[1:] == [(1, 1), (2, 1)], "other seeds are other cells"
    assert "4 of them finished before" in capsys.readouterr().out


def test_a_half_written_row_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inventory.MEASURES, "speed", lambda cell, options: {"ms": 1.0})
    study = Speed(out=tmp_path, batches=(512, 1024), stores=(), compiled=False)
    inventory.run_study(study)
    path = tmp_path / "speed.csv"
    path.write_text(path.read_text()[:-3])
    assert len(read_rows(path)) == 1
    inventory.run_study(study)
    assert [row["batch_size"] for row in read_rows(path)] == ["512", "1024"]


def test_processes_measure_what_one_process_measures(tmp_path: Path) -> None:
    for jobs in (1, 2):
        study = Speed(out=tmp_path / str(jobs), batches=(4, 8), stores=(), compiled=False, rounds=1, threads=1)
        object.__setattr__(study, "jobs", jobs)
        assert inventory.run_study(study) == 0
    same = ("options", "policy", "batch_size")
    one, two = (
        sorted(tuple(row[k] for k in same) for row in read_rows(tmp_path / str(jobs) / "speed.csv")) for jobs in (1, 2)
    )
    assert one == two
    assert len(one) == 2
    row = read_rows(tmp_path / "1/speed.csv")[0]
    speed = 4 * 50 / (float(row["forward and backward, ms"]) / 1000)  # one store
    assert float(row["forward and backward, store-periods/s"]) == pytest.approx(speed)


# -- gaps -------------------------------------------------------------------------------------------------------------


def test_a_gap_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = cells.KINDS["backlog"]
    small = {"instances": kind.instances[:1], "n_train": 8, "n_dev": 4, "batch_size": 4}
    monkeypatch.setitem(cells.KINDS, "backlog", cells.Kind(**vars(kind) | small))
    assert inventory.run_study(Gaps(out=tmp_path, only=("backlog",), budget=2, tests=2)) == 0
    (row,) = read_rows(tmp_path / "gaps_backlog.csv")
    number = {k: float(row[k]) for k in ("cost", "optimum", "gap %", "updates", "samples")}
    assert (number["updates"], number["samples"]) == (4, 800)
    assert number["optimum"] == pytest.approx(3.1674, abs=2e-3)
    assert number["gap %"] == pytest.approx(100 * (number["cost"] - number["optimum"]) / number["optimum"])


def test_the_control_variate_by_hand() -> None:
    """Costs are 2 c + e with e orthogonal to the control c, whose mean was 3 where 2 is expected."""
    control = torch.tensor([2.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    extra = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    mean, error = cells.adjusted(2 * control + extra, control, 2.0)
    assert mean == pytest.approx(4.0)
    assert error == pytest.approx(((4 * 0.25) / 3) ** 0.5 / 2)


@pytest.mark.parametrize(
    "name", ["one_store_lost", "one_store_backlogged", "serial_system", "transshipment_backlogged"]
)
def test_controls_cost_what_is_known(name: str) -> None:
    env = InventoryEnv(make_task(name, lead_time=2, underage=9.0), periods=400, ignore=100)
    control, expected = cells.control_policy(env)
    scenarios = env.sample(400, torch.Generator().manual_seed(0))
    costs = average_cost(Unrolled(env, control), scenarios)
    assert abs(float(costs.mean()) - expected) < 4 * float(costs.std()) / 20
    optimum = oracle_cost(env.task)
    assert optimum is not None
    assert expected > optimum if name == "one_store_lost" else expected == pytest.approx(optimum)


# -- methods ----------------------------------------------------------------------------------------------------------


def test_the_batched_environment_is_scored_as_hdpo_is() -> None:
    """A constant action there, and the quantities it stands for here, cost the same in the same scenarios."""
    task = make_task("one_warehouse_lost_demand", stores=3)
    env = InventoryEnv(task, "dev")
    scenarios = env.sample(5, torch.Generator().manual_seed(0))
    action = torch.tensor([[-0.2, 0.1, 0.0, 0.05]]).expand(5, 4)
    wanted = torch.tensor(task.demand.mean) @ mean_flow(task.network) * (action + 1.0).square()
    expected = average_cost(Unrolled(env, lambda seen: env.feasible(seen, wanted)), scenarios)
    found = methods.play(task, "dev", scenarios, lambda obs: action)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_reinforce_subtracts_the_batch_mean_of_each_period() -> None:
    config = methods.ReinforceConfig(num_envs=4, n_steps=3, gamma=0.5)
    agent = methods.Reinforce("ccrl/InventoryOneStoreLost-v0", config)
    rollout = {"reward": torch.arange(12.0).view(3, 4) ** 2, "valid": torch.ones(3, 4), "carry": torch.ones(3, 4)}
    advantage = agent.estimator.advantages(methods.Data(rollout, raw=frozenset(rollout)))["advantage"]
    r = rollout["reward"]
    togo = torch.stack([r[0] + 0.5 * r[1] + 0.25 * r[2], r[1] + 0.5 * r[2], r[2]])
    centred = togo - togo.mean(1, keepdim=True)
    torch.testing.assert_close(advantage, centred / centred.std())


@pytest.mark.parametrize("method", ["hdpo", "ppo", "reinforce"])
def test_methods_keep_their_best_parameters(method: str) -> None:
    cell = {"env": "ccrl/InventoryOneStoreLost-v0", "method": method, "learning_rate": 3e-3, "seed": 0}
    cell |= {"samples": 51_200, "n_train": 512, "n_dev": 8, "scores": 2, "tests": 4}
    row = methods.compare(cell, {"lead_time": 1, "underage": 4.0})
    scores = [float(point.split(":")[2]) for point in row["curve"].split(";")]
    assert row["dev cost"] == pytest.approx(min(scores), rel=1e-4)
    assert row["samples used"] >= 51_200
    assert row["cost"] > 0


# -- report -----------------------------------------------------------------------------------------------------------


def gap_row(seed: int, cost: float, dev: float, **more: Any) -> dict[str, Any]:
    return {
        "env": "e", "options": json.dumps({"lead_time": 2, "underage": 9.0}), "policy": "vanilla", "seed": seed,
        "epochs": 1, "batch_size": 512, "n_train": 8, "learning_rate": "", "cost": cost, "se": 0.01, "optimum": 10.0,
        "gap %": 100 * (cost / 10 - 1), "gap se %": 0.1, "dev cost": dev, "CPU seconds": 90.0, "updates": 7, **more,
    }  # fmt: skip


def test_the_table_of_gaps_takes_the_seed_that_development_chose(tmp_path: Path) -> None:
    capped = {"capped base stock": 10.03, "better than capped": False}
    write(tmp_path / "gaps_lost.csv", [gap_row(0, 10.01, 9.5, **capped), gap_row(1, 10.06, 9.4, **capped)])
    write(tmp_path / "gaps_serial.csv", [gap_row(0, 10.05, 9.5), gap_row(1, 10.2, 9.6)])
    text, figure = (path for path in inventory.reports.write(tmp_path, tmp_path / "figures"))
    table = text.read_text()
    assert figure.stat().st_size > 10_000
    assert "4 cells, 6 CPU minutes" in table
    assert "| 10.0300, NOT beaten | 10.0600 +- 0.0100 | 0.60 +- 0.10 | NO | 1, published (2) | 0.10 to 0.60 |" in table
    assert (
        "| L = 2, p = 9, vanilla | 10.0000 | 10.0500 +- 0.0100 | 0.50 +- 0.10 | yes | 0, published (2) | 0.50 to 2.00 |"
        in table
    )
    assert "**lost**: 0 of 1 instances within 0.5 %" in table


def test_tables_of_data_and_methods(tmp_path: Path) -> None:
    same = {"env": "ccrl/InventoryOneStoreLost-v0", "options": json.dumps({"lead_time": 1, "underage": 4.0})}
    same |= {"se": 0.1, "updates": 5, "batch_size": 16, "CPU seconds": 60.0, "seconds": 61.0, "samples used": 2_000_000}
    sizes = [(16, 6.0), (16, 8.0), (256, 5.0), (256, 5.5)]
    rows = [{"policy": "gnn", "n_train": n, "seed": i % 2, "cost": c} | same for i, (n, c) in enumerate(sizes)]
    write(tmp_path / "data.csv", rows)
    found = [("ppo", 1e-3, 4.2, 4.4), ("ppo", 3e-4, 4.1, 4.5), ("hdpo", "", 4.0407, 4.1)]
    found += [("reinforce", 1e-3, 4.3, 4.6), ("reinforce", 1e-3, 4.5, 4.6), ("reinforce", 3e-3, 4.2, 4.5)]
    write(
        tmp_path / "methods.csv",
        [{"method": m, "learning_rate": r, "seed": 0, "cost": c, "dev cost": d, "curve": "10:0.1:9;20:0.2:8"} | same
         for m, r, c, d in found],
    )  # fmt: skip
    inventory.main(["report", "--out", str(tmp_path), "--figures", str(tmp_path)])
    assert "| gnn | 16 | 7.000 | -5.706 to 19.706 | 6.000, 8.000 |" in (tmp_path / "inventory_data.md").read_text()
    table = (tmp_path / "inventory_methods.md").read_text()
    assert "| ppo | 0.001 | 1 | 4.200 (4.200 to 4.200) | 0.100 | 3.9 | 2.0 M |" in table, "not the better test cost"
    assert "| reinforce | 0.001 | 2 | 4.400 (4.300 to 4.500) |" in table, "tried on more seeds"
    assert "| hdpo | published | 1 | 4.041 (4.041 to 4.041) | 0.100 | -0.0 | 2.0 M |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"inventory_data.png", "inventory_methods.png"}


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path: Path) -> None:
    for build, message in (
        (lambda: Gaps(out=tmp_path, only=("lots",)), "only: expected some of lost, serial, backlog, transshipment"),
        (lambda: Gaps(out=tmp_path, budget=0), "budget: expected >= 1, got 0"),
        (lambda: Gaps(out=tmp_path, jobs=0), "jobs: expected >= 1"),
        (lambda: Gaps(out=tmp_path, only=("lost",), lead_times=(7,)), "expected those of some instance of lost, got"),
        (lambda: Data(out=tmp_path, budget=100), "multiple of the 64 updates per epoch of 8192"),
        (lambda: Methods(out=tmp_path, methods=("sac",)), "methods: expected some of hdpo, ppo, reinforce, got sac"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    with pytest.raises(FileNotFoundError, match="run a study first"):
        report.write(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="optimal cost or bound is known"):
        cells.control_policy(InventoryEnv(make_task("one_warehouse_lost_demand")))
    with pytest.raises(ValueError, match="expected hdpo, ppo or reinforce, got 'sac'"):
        methods.compare({"method": "sac", "learning_rate": 1e-3, "seed": 0, "env": ""}, {})


def test_cells_get_equally_many_updates_whatever_the_number_of_scenarios(tmp_path: Path) -> None:
    found = Data(out=tmp_path).cells()["data"]
    assert {c["epochs"] * -(-c["n_train"] // c["batch_size"]) for c in found} == {512}
    assert len(found) == 18
    sizes = {name: len(rows) for name, rows in Gaps(out=tmp_path).cells().items()}
    assert sizes == {"gaps_lost": 16, "gaps_serial": 8, "gaps_backlog": 24, "gaps_transshipment": 9}
    some = Gaps(out=tmp_path, only=("lost", "serial"), lead_times=(3, 4), underages=(4.0, 9.0), seeds=(1, 2)).cells()
    assert {name: len(rows) for name, rows in some.items()} == {"gaps_lost": 8, "gaps_serial": 4}
    assert all(row in Gaps(out=tmp_path, seeds=(1, 2)).cells()["gaps_lost"] for row in some["gaps_lost"])
