"""The planner's path, from sales to orders: the commands of docs/inventory_planning.md, and their mistakes."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from agents.hdpo import HDPO, HDPOConfig
from envs.inventory import InventoryEnv
from scripts import inventory_example, inventory_orders, inventory_report, inventory_train
from scripts import train as train_command

PAGE = Path(inventory_train.__file__).resolve().parents[1] / "docs" / "inventory_planning.md"
COMMANDS: dict[str, tuple[Callable[[Any], Any], Any, list[str]]] = {
    "inventory_example": (
        inventory_example.main, inventory_example.ExampleConfig, ["--products", "3", "--weeks", "70"]
    ),
    "inventory_train": (inventory_train.main, inventory_train.InventoryTrainConfig, ["--epochs", "1", "--no-progress"]),
    "inventory_report": (inventory_report.main, inventory_report.ReportConfig, ["--pictures", "1"]),
    "inventory_orders": (inventory_orders.main, inventory_orders.OrdersConfig, []),
}  # fmt: skip
"""What runs a command, its options, and what makes it small."""


def run(line: str, folder: Path) -> Any:
    name, *words = shlex.split(line.replace("runs/RUN", str(newest(folder)) if "runs/RUN" in line else ""))[1:]
    function, config, small = COMMANDS[Path(name).stem]
    return function(tyro.cli(config, args=[*words, *small]))


def newest(folder: Path) -> Path:
    return max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def blocks() -> list[list[str]]:
    """The command lines of the page, from one ``inventory_example`` to the next."""
    lines = [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    python scripts/inventory")]
    starts = [i for i, line in enumerate(lines) if "inventory_example" in line]
    return [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_page_has_the_whole_path() -> None:
    for block in blocks():
        assert [Path(shlex.split(line)[1]).stem for line in block] == list(COMMANDS)
    assert len(blocks()) == 2


def test_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for line in blocks()[0]:
        run(line, tmp_path)
    said = capsys.readouterr().out
    assert "[ccrl] note: sales.csv:" in said
    assert "what if lead_time=+1: cost" in said
    assert re.search(r"promotion base stock +\d", said)
    orders = table(tmp_path / "orders.csv")
    assert list(orders[0]) == ["sku", "units", "arrives_in", "on_hand", "on_order"]
    assert [row["sku"] for row in orders] == ["P01", "P02", "P03"]
    assert all(row["units"].isdigit() for row in orders)
    page = (tmp_path / "report/report.html").read_text()
    assert "src='data:image/png;base64," in page
    assert not re.search(r"(src|href)=['\"]?(http|/|[a-z]+\.)", page), "nothing is fetched"
    assert len(table(tmp_path / "report/products.csv")) == 3 * 6
    run_folder = newest(tmp_path)
    # from another folder: the files are known by their whole path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_command.main(["--resume", str(run_folder)])
    # the printed orders are those of the best parameters, placed by the simulator
    agent = HDPO.load(next(iter(sorted((run_folder / "checkpoints").glob("*.pt")))))
    env = agent.simulator
    assert isinstance(env, InventoryEnv)
    assert env.task.vary_lead_time == 1
    stock = torch.zeros(3, 1, env.network.slots)
    for i, row in enumerate(table(tmp_path / "example/stock.csv")):
        stock[i, 0, 0], stock[i, 0, 1] = float(row["on_hand"]), float(row["arriving_1"])
    here, state = env.today(stock)
    with torch.no_grad():
        wanted = here.placed(state, agent.ctx.bank.policy("best")(here.observe(state)))
    assert [int(row["units"]) for row in orders] == wanted.flatten().int().tolist()
    config = inventory_report.ReportConfig(run_folder, tmp_path / "x", what_if=("lead_time=+2",))
    with pytest.raises(ValueError, match="train with --vary-lead-time"):
        inventory_report.main(config)


def test_newer_sales_and_their_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in blocks()[0][:2]:
        run(line, tmp_path)
    folder, stock = newest(tmp_path), tmp_path / "example/stock.csv"
    text = (tmp_path / "example/sales.csv").read_text().splitlines()
    sold = [line for line in text if line.split(",")[2]]
    newer = tmp_path / "newer.csv"
    newer.write_text("\n".join([*sold, "P01,2023-05-08,40,0"]) + "\n")
    config = inventory_orders.OrdersConfig(folder, stock, tmp_path / "new.csv", sales=newer)
    inventory_orders.main(config)
    newer.write_text("\n".join([sold[0], *reversed(sold[1:])]) + "\n")
    with pytest.raises(ValueError, match="expected the products and locations of training, in their order"):
        inventory_orders.main(config)
    newer.write_text("\n".join([*sold, "P09,2023-05-08,40,0"]) + "\n")
    with pytest.raises(
        ValueError, match="underage: expected a number for every product and location, got none for P09"
    ):
        inventory_orders.main(config)
    short = inventory_orders.OrdersConfig(folder, tmp_path / "none.csv", tmp_path / "o.csv")
    with pytest.raises(FileNotFoundError, match="stock: expected a file"):
        inventory_orders.main(short)
    with pytest.raises(FileNotFoundError, match="expected a run folder of inventory_train"):
        inventory_orders.load_plan(tmp_path)


def test_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in blocks()[1]:
        run(line, tmp_path)
    orders = table(tmp_path / "orders.csv")
    assert list(orders[0]) == ["sku", "source", "location", "units", "arrives_in", "on_hand", "on_order"]
    first = [row for row in orders if row["sku"] == "P01"]
    assert [(row["source"], row["location"]) for row in first] == [
        ("W", "S1"), ("W", "S2"), ("W", "S3"), ("supplier", "W")
    ]  # fmt: skip
    shipped = sum(int(row["units"]) for row in first if row["source"] == "W")
    assert shipped <= int(next(row["on_hand"] for row in first if row["location"] == "W"))


def test_what_is_missing_is_said_before_training(tmp_path: Path) -> None:
    files = inventory_example.main(inventory_example.ExampleConfig(tmp_path, products=2, weeks=60))
    with pytest.raises(ValueError, match="holding: expected a number for every product"):
        inventory_train.main(inventory_train.InventoryTrainConfig(files[0], run_root=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    agent = HDPO("ccrl/InventoryOneStoreLost-v0", HDPOConfig(policy="base_stock", n_train=2, n_dev=2, batch_size=2))
    agent.learn(until=1).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="expected a run of your own demand"):
        inventory_orders.load_plan(tmp_path / "checkpoint.pt")
