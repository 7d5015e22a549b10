"""A trained policy on held-out weeks beside tuned rules: costs, fill rates, stocks, orders, what if, pictures, a page.

python scripts/inventory_report.py RUN --out report
python scripts/inventory_report.py RUN --out report --what-if lead_time=+1 demand=*1.2

Writes ``report/report.html``, which has the pictures in it and needs no other file and no network, and
``report/products.csv``. Rules are tuned product by product on the development weeks; differences are paired by product,
with the 95 % interval of Student's t.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.experiment import checkpoint
from ccrl.inventory.functional_env import State
from ccrl.inventory.rules import RuleName, seasonal_forecast, tune
from ccrl.settings import Natural, Settings
from ccrl.stats import paired_t
from envs.inventory import InventoryEnv, Recorded, Task, Trace
from envs.inventory.scores import Scores, changed, score
from scripts import inventory_page as page
from scripts.inventory_orders import load_plan

__all__ = ["ReportConfig", "Row", "compare", "main", "what_if"]

Order = Callable[[State], torch.Tensor]


@dataclass(frozen=True)
class ReportConfig(Settings):
    """What is compared and drawn."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of inventory_train.py, or a checkpoint; what orders is the best parameters in it."""
    out: Path
    """The page and the table of products are written to this folder."""
    what_if: tuple[str, ...] = ()
    """Each of these changes one thing: lead_time=+1, demand=*1.2, underage=5, lot=*2 ..."""
    pictures: Natural = 40
    """So many products have a picture on the page, those of the largest cost first."""
    trust: tuple[str, ...] = ()
    """The run's files may import these names, module:name; all others that are not registered are refused."""


@dataclass(frozen=True)
class Row:
    """One method on the held-out weeks."""

    name: str
    scores: Scores
    trace: Trace
    difference: tuple[float, float, float] | None
    """Cost of the trained policy minus this one's, mean over products and its 95 % interval."""


def _title(name: str) -> str:
    return {"s_S": "(s, S)", "r_Q": "(r, Q)"}.get(name, name.replace("_", " "))


def _rules(task: Task) -> tuple[RuleName, ...]:
    names: list[RuleName] = ["base_stock", "s_S"]
    demand = task.demand
    assert isinstance(demand, Recorded)
    if task.network.nodes == 1:
        names += ["r_Q", "seasonal_newsvendor"]
    if demand.features is not None and any(name.startswith("promotion") for name in demand.feature_names):
        names += ["promotion_base_stock"]
    return tuple(names)


def _tuned(task: Task) -> dict[str, Order]:
    """Every rule that the task allows, tuned on its development weeks."""
    env, demand = InventoryEnv(task, "dev"), task.demand
    assert isinstance(demand, Recorded)
    count = len(demand.series)
    # the first copy of every product: with the lead time that it has
    scenarios = env.sample(count, torch.Generator().manual_seed(0))
    known = demand.history + task.split_horizons["train"][1]
    year, recent = (52, 16) if demand.step_days == 7 else (364, 28)
    fixed = bool((task.by_series["fixed_cost"] > 0).any())
    found: dict[str, Order] = {}
    for name in _rules(task):
        forecast = None
        if name == "seasonal_newsvendor":
            lead = task.by_series["lead_time"][:, 0]
            forecast = seasonal_forecast(demand.series[:, :, 0], lead, known, year, recent)
        found[name] = tune(name, env, scenarios, forecast=forecast, fixed_cost=fixed)
    return found


def compare(task: Task, policy: Order, rules: dict[str, Order] | None = None) -> list[Row]:
    """The policy and the rules (``None``: tuned here) on the held-out weeks of ``task``, the policy first."""
    env = InventoryEnv(task, "test")
    count = env.available
    assert count is not None
    scenarios = env.sample(count, torch.Generator().manual_seed(1))
    found, trace = score(env, policy, scenarios)
    rows = [Row("trained policy", found, trace, None)]
    for name, rule in (_tuned(task) if rules is None else rules).items():
        theirs, played = score(env, rule, scenarios)
        pair = None
        if count > 1:
            test = paired_t(found.cost.numpy(), theirs.cost.numpy())
            pair = (test.difference, test.low, test.high)
        rows.append(Row(_title(name), theirs, played, pair))
    return rows


def what_if(task: Task, policy: Order, question: str) -> dict[str, Any]:
    """Held-out cost of the policy after a change, with nothing trained again, beside the best rule: as it was tuned
    before the change, and tuned again after it."""
    other = changed(task, question)
    before = _tuned(task)
    kept = compare(other, policy, before)
    again = compare(other, policy)
    best_kept = min(kept[1:], key=lambda row: float(row.scores.cost.mean()))
    best_again = min(again[1:], key=lambda row: float(row.scores.cost.mean()))
    ours = kept[0].scores
    return {
        "question": question, "cost": float(ours.cost.mean()), "fill_rate": float(ours.fill_rate.nanmean()),
        "stock": float(ours.stock.mean()), "kept": best_kept.name, "kept_cost": float(best_kept.scores.cost.mean()),
        "again": best_again.name, "again_cost": float(best_again.scores.cost.mean()),
    }  # fmt: skip


def main(config: ReportConfig) -> Path:
    """Write everything; returns the page."""
    torch.set_num_threads(1)
    agent, simulator = load_plan(config.run, config.trust)
    task = simulator.task
    policy: Any = agent.ctx.bank.policy("best")
    for question in config.what_if:  # what cannot be asked fails before anything is computed
        changed(task, question)
    rows = compare(task, policy)
    questions = [what_if(task, policy, question) for question in config.what_if]
    demand = task.demand
    assert isinstance(demand, Recorded)
    env = InventoryEnv(task, "test")
    print("held-out periods; cost per product and period, of all locations together")
    print(page.text_table(rows))
    for found in questions:
        print(
            f"what if {found['question']}: cost {found['cost']:.4g}, fill rate {100 * found['fill_rate']:.1f} %; "
            f"{found['kept']} as tuned before {found['kept_cost']:.4g}, {found['again']} tuned again "
            f"{found['again_cost']:.4g}"
        )
    order = np.argsort(-rows[0].scores.cost.numpy())
    if len(order) > config.pictures:
        print(f"[ccrl] {config.pictures} of {len(order)} products have pictures: those of the largest cost")
    config.out.mkdir(parents=True, exist_ok=True)
    page.write_products(config.out / "products.csv", demand, rows)
    best = min(rows[1:], key=lambda row: float(row.scores.cost.mean()))
    pictures = [
        (demand.product(int(i)), page.product_picture(env, demand, rows[0], best, int(i)))
        for i in order[: config.pictures]
    ]
    target = config.out / "report.html"
    page.write_page(target, env, rows, questions, pictures, page.network_picture(env, rows[0], int(order[0])))
    print(f"[ccrl] {target}")
    return target


if __name__ == "__main__":
    try:
        main(tyro.cli(ReportConfig, description=__doc__))
    except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
