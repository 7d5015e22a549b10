"""The study of seconds to a gap: what it chooses, what it prints, which seeds it takes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from ccrl import native
from scripts.studies.inventory import clock
from scripts.studies.inventory.study import run_study


def row(batch: int, rate: float, ours: float, theirs: float, **more: Any) -> dict[str, str]:
    found = {"instance": "lost", "side": "ours", "batch_size": batch, "learning_rate": rate, "seed": 1000}
    found |= {"ours, s": ours, "theirs, s": theirs, "updates": 10, "reached": True}
    return {k: str(v) for k, v in (found | more).items()}


def test_each_side_gets_the_setting_of_its_own_fewest_seconds() -> None:
    # ours: 64 takes (1 + 3) / 2 = 2, 512 takes (2 + 4) / 2 = 3; theirs: 64 takes 20, 512 takes 10; 256 is fastest for
    # both where it gets there, which it did not once
    rows = [row(64, 0.01, 1.0, 20.0), row(64, 0.01, 3.0, 20.0), row(512, 0.01, 2.0, 10.0), row(512, 0.01, 4.0, 10.0)]
    rows += [row(256, 0.01, 0.1, 0.1), row(256, 0.01, 0.1, 0.1, reached=False)]
    assert clock.chosen(rows) == {("lost", "ours"): (64, 0.01), ("lost", "theirs"): (512, 0.01)}


def test_the_table_pairs_equal_seeds(tmp_path: Path) -> None:
    rows = [row(64, 0.01, 2.0, 0.0, seed=100), row(64, 0.01, 4.0, 0.0, seed=101)]
    rows += [row(512, 0.01, 0.0, t, side="theirs", seed=s) for t, s in ((10.0, 100), (12.0, 101))]
    rows += [row(1024, 0.003, 5.0, 0.0, seed=100), row(1024, 0.003, 0.0, 30.0, seed=100, side="theirs", reached=False)]
    own, published = clock.table(rows).splitlines()[2:]
    assert own == (
        "| lost | own | 64, 0.01, 10, 3.00 (2.00 to 4.00) | 512, 0.01, 10, 11.00 (10.00 to 12.00) | 4.0 (3.0 to 5.0) |"
    )
    assert published.endswith("| 1024, 0.003, 10, 30.00 (30.00 to 30.00), 1 of 1 not there | 6.0 (6.0 to 6.0) |")
    # a test reads the choice from the file, and adds the published settings
    with (tmp_path / "clock_tune.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([row(64, 0.01, 1.0, 9.0), row(512, 0.01, 2.0, 8.0)])
    cells = clock.Clock(tmp_path, "test", only=("lost",), seeds=(100,)).cells()["clock_test"]
    assert [(c["side"], c["batch_size"]) for c in cells] == [
        ("ours", 64), ("ours", 1024), ("theirs", 512), ("theirs", 1024)
    ]  # fmt: skip


def test_seeds_and_instances_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds: expected from 100 to 999"):
        clock.Clock(tmp_path, "test", seeds=(1000,))
    with pytest.raises(ValueError, match="only: expected some of lost, backlogged"):
        clock.Clock(tmp_path, "tune", only=("serial",))


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on PATH")
def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    study = clock.Clock(
        tmp_path, "tune", only=("lost",), seeds=(1000,), batches=(8192,), rates=(0.01,), most=1, tests=2
    )
    assert run_study(study) == 0
    with (tmp_path / "clock_tune.csv").open() as file:
        (found,) = csv.DictReader(file)
    assert found["updates"] == "1"
    assert float(found["theirs, s"]) > 0.0
    assert 0.0 < float(found["gap %"]) < float("inf")  # a batch of 8,192 is tested after every update
