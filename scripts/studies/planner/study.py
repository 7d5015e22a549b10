"""The planner's case: our policy and tuned rules on held-out weeks, by the protocol of ``protocol.py``.

    python scripts/studies/planner run --out results/planner --cases store
    python scripts/studies/planner run --out results/planner                      # the networks too
    python scripts/studies/planner terms --out results/planner                    # lot size and capacity
    python scripts/studies/planner terms --out results/planner --lot 1 --capacity 0 --fixed-cost 20
    python scripts/studies/planner report --out results/planner --figures docs/figures

Every training is a cell (case, demand seed), a row of ``OUT/NAME.csv`` when it is done; the same command again runs
what is left. Seeds are yours to change (``--seeds``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO, HDPOConfig
from ccrl.experiment.cells import CellsFailed, complete
from ccrl.inventory.functional_env import Network
from ccrl.inventory.rules import Rule, RuleName, seasonal_forecast, tune
from ccrl.settings import Count, Nonnegative, Settings
from envs.inventory import InventoryEnv, Recorded, Task, retail_sales
from envs.inventory.own import own_demand
from envs.inventory.scores import score
from envs.inventory.task import horizons_of
from envs.inventory.terms import Terms
from scripts.studies.planner import report as reports
from scripts.studies.planner.protocol import SEEDS, SETTINGS

__all__ = ["Report", "Run", "TermsCase", "case_task", "main", "measure"]

CaseName = Literal["store", "warehouse", "two_warehouses"]
RULES: tuple[RuleName, ...] = ("base_stock", "s_S", "r_Q", "seasonal_newsvendor", "promotion_base_stock")
NETWORK_RULES: tuple[RuleName, ...] = ("base_stock", "s_S", "promotion_base_stock")


def case_task(case: str, seed: int, products: int = 40, weeks: int = 156, **terms: float) -> Task:
    """A case of the protocol; ``terms``: ``lot``, ``capacity`` in periods of usual demand, ``fixed_cost``."""
    settings = SETTINGS[case]
    sales = retail_sales(products, weeks, settings["stores"], seed)
    if not settings["warehouses"]:
        task = own_demand(sales, holding=1.0, underage=9.0, lead_time=4)
    else:
        task = _network(sales, settings["warehouses"])
    by_series = dict(task.by_series)
    for name, value in terms.items():
        usual = by_series["scale"].sum(1, keepdim=True) if name == "capacity" else 1.0
        by_series[name] = torch.full_like(by_series["lead_time"], 1.0) * value * usual
    if "capacity" in terms:
        by_series["capacity"] = by_series["capacity"].ceil().maximum(by_series["lot"])
    return Task(
        task.name, task.network, task.demand, task.holding, task.underage, lost=True, horizons=task.horizons,
        by_series=by_series, terms=Terms(), nodes=task.nodes,
    )  # fmt: skip


def _network(sales: Recorded, warehouses: int) -> Task:
    """One warehouse two weeks from the stores, or a far, cheap and a near, dear one."""
    stores = sales.series.shape[2]
    leads, prices = ((2,), (0.0,)) if warehouses == 1 else ((4, 1), (0.0, 1.0))
    edges = tuple((w, warehouses + k) for w in range(warehouses) for k in range(stores))
    edges += tuple((-1, w) for w in range(warehouses))
    lead = [leads[w] for w in range(warehouses) for _ in range(stores)] + [3] * warehouses
    cost = [prices[w] for w in range(warehouses) for _ in range(stores)] + [0.0] * warehouses
    net = Network(0, warehouses, stores, edges, tuple(lead))
    count = len(sales.series)
    horizons = horizons_of(sales.series.shape[1], sales.history, sales.history)
    training = sales.series[:, : sales.history + horizons["train"][1]]
    each = torch.ones(count, len(edges))
    by_series = {
        "holding": torch.tensor([0.5] * warehouses + [1.0] * stores).expand(count, -1).contiguous(),
        "underage": torch.full((count, stores), 9.0), "edge_cost": each * torch.tensor(cost),
        "lead_time": each * torch.tensor(lead, dtype=torch.float32), "fixed_cost": 0.0 * each, "minimum": 0.0 * each,
        "lot": each, "capacity": each * torch.inf, "scale": training.mean(1).clamp_min(1.0 / training.shape[1]),
    }  # fmt: skip
    names = (*(f"W{w + 1}" for w in range(warehouses)), *sales.locations)
    return Task(
        f"own_demand [{sales.source}]", net, sales, (1.0,) * net.nodes, (1.0,) * stores, lost=True, horizons=horizons,
        by_series=by_series, terms=Terms(), nodes=names,
    )  # fmt: skip


def tuned(task: Task, names: tuple[RuleName, ...], split: Literal["train", "dev"]) -> dict[str, Rule]:
    """The rules that cost least in the periods of ``split``."""
    env = InventoryEnv(task, split)
    assert isinstance(task.demand, Recorded)
    count = len(task.demand.series)
    scenarios = env.sample(count, torch.Generator())
    forecast = None
    if "seasonal_newsvendor" in names:
        _, periods, _ = task.split_horizons["train"]
        known = task.demand.history + periods
        forecast = seasonal_forecast(task.demand.series[:, :, 0], task.by_series["lead_time"][:, 0], known)
    fixed = bool((task.by_series["fixed_cost"] > 0).any())
    return {name: tune(name, env, scenarios, forecast=forecast, fixed_cost=fixed) for name in names}


def measure(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: held-out cost, fill rate, stock, orders."""
    torch.set_num_threads(1)
    terms = {k: cell[k] for k in ("lot", "capacity", "fixed_cost") if cell.get(k)}
    task = case_task(cell["case"], cell["seed"], cell["products"], cell["weeks"], **terms)
    start = time.process_time()
    count = cell["products"]
    agent = HDPO(
        InventoryEnv(task),
        HDPOConfig(policy="planner", n_train=count, n_dev=count, batch_size=min(64, count), dev_every=5,
                   patience=cell["patience"]),
        seed=cell["seed"],
    )  # fmt: skip
    agent.learn(until=cell["epochs"] * agent.samples_per_iteration)
    spent = time.process_time() - start
    policies: dict[str, Any] = {"ours": agent.ctx.bank.policy("best")}
    names = RULES if task.network.nodes == 1 else NETWORK_RULES
    for split in ("dev", "train"):
        chosen = names if split == "dev" else tuple(n for n in names if n in ("base_stock", "promotion_base_stock"))
        for name, rule in tuned(task, chosen, split).items():  # type: ignore[arg-type]
            policies[name if split == "dev" else f"{name} (training weeks)"] = rule
    env = InventoryEnv(task, "test")
    scenarios = env.sample(count, torch.Generator())
    rows = []
    for name, policy in policies.items():
        found, _ = score(env, policy, scenarios)
        rows.append({
            "method": name, "cost": float(found.cost.mean()), "fill": float(found.fill_rate.nanmean()),
            "stock": float(found.stock.mean()), "orders": float(found.orders.mean()),
            "costs": " ".join(f"{value:.4f}" for value in found.cost.tolist()),
            "cpu": spent if name == "ours" else 0.0, "epochs run": agent.iteration if name == "ours" else 0,
        })  # fmt: skip
    return rows


@dataclass(frozen=True)
class Run(Settings):
    """The three cases."""

    out: Path
    """The CSV files are in this folder."""
    cases: tuple[CaseName, ...] = ("store", "warehouse", "two_warehouses")
    """These cases are run."""
    seeds: tuple[int, ...] = SEEDS
    """Each number makes other sales, and seeds the policy."""
    products: Count = 40
    """So many products are sold."""
    weeks: Count = 156
    """Sales are this many weeks long."""
    epochs: Count = 200
    """Training passes this many times over the products at most."""
    patience: Count = 40
    """Training ends after this many epochs without a lower development cost."""
    jobs: Count = 1
    """So many cells run at a time, each a process."""

    def cells(self) -> dict[str, list[dict[str, Any]]]:
        same = {"products": self.products, "weeks": self.weeks, "epochs": self.epochs, "patience": self.patience}
        return {f"planner_{case}": [{"case": case, "seed": s, **same} for s in self.seeds] for case in self.cases}


@dataclass(frozen=True)
class TermsCase(Settings):
    """One store with a lot size and a capacity, and with a fixed cost."""

    out: Path
    """The CSV files are in this folder."""
    seeds: tuple[int, ...] = SEEDS
    """Each number makes other sales, and seeds the policy."""
    lot: Count = 6
    """Orders are multiples of this many units."""
    capacity: Nonnegative = 2.0
    """No order is larger than this many weeks of usual demand (and than one lot); 0 says that there is no limit."""
    fixed_cost: Nonnegative = 0.0
    """Each order costs this."""
    products: Count = 40
    """So many products are sold."""
    weeks: Count = 156
    """Sales are this many weeks long."""
    epochs: Count = 200
    """Training passes this many times over the products at most."""
    patience: Count = 40
    """Training ends after this many epochs without a lower development cost."""
    jobs: Count = 1
    """So many cells run at a time, each a process."""

    def cells(self) -> dict[str, list[dict[str, Any]]]:
        names = ("lot", "capacity", "fixed_cost", "products", "weeks", "epochs", "patience")
        same = {name: getattr(self, name) for name in names}
        name = "planner_fixed_cost" if self.fixed_cost else "planner_terms"
        return {name: [{"case": "store", "seed": s, **same} for s in self.seeds]}


@dataclass(frozen=True)
class Report(Settings):
    """Tables of what is there."""

    out: Path
    """The CSV files are in this folder."""
    figures: Path
    """The table is written to planner.md in this folder."""


def main(argv: list[str]) -> int:
    """Command line; the number of cells that failed."""
    kinds: dict[str, Any] = {"run": Run, "terms": TermsCase, "report": Report}
    config: Any = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=__doc__)
    if isinstance(config, Report):
        print(reports.write(config.out, config.figures))
        return 0
    failed = 0
    for name, cells in config.cells().items():
        try:
            complete(config.out / f"{name}.csv", cells, measure, jobs=config.jobs, name=name)
        except CellsFailed as error:
            print(error)
            failed += error.count
    return failed
