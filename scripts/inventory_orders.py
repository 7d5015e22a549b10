"""What to order now: a trained policy and the present stock in, a table of orders out.

python scripts/inventory_orders.py RUN --stock stock.csv --out orders.csv
python scripts/inventory_orders.py RUN --stock stock.csv --out orders.csv --sales newer_sales.csv

The stock table has the columns of the products (named as in training), ``on_hand`` and, for what is on its way,
``arriving_1``, ``arriving_2`` ... (units that can be sold 1, 2 ... periods from now); of several locations also theirs.
"Now" is the period after the last one of the sales.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO
from ccrl.experiment import checkpoint
from ccrl.experiment.files import write_atomic
from ccrl.settings import Settings
from envs.inventory import InventoryEnv, Recorded, make_task
from envs.inventory.own import SUPPLIER, read_stock
from envs.inventory.sales import measured_as
from scripts.inventory_train import announced

__all__ = ["OrdersConfig", "load_plan", "main"]


@dataclass(frozen=True)
class OrdersConfig(Settings):
    """Which policy, which stock."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of inventory_train.py, or a checkpoint; what orders is the best parameters in it."""
    stock: Path
    """This CSV or Parquet table says what is on hand and on its way."""
    out: Path
    """The orders are written to this CSV file."""
    sales: Path | None = None
    """Sales up to the present are in this file, of the same products; None takes those of training."""
    trust: tuple[str, ...] = ()
    """The run's files may import these names, module:name; all others that are not registered are refused."""


def load_plan(run: Path, trust: tuple[str, ...] = ()) -> tuple[HDPO, InventoryEnv]:
    """The agent of a run (its newest checkpoint) and its simulator.

    Raises:
        FileNotFoundError: no run, or one without a checkpoint.
        ValueError: a run of another task than your own demand.
    """
    path = checkpoint.latest(run / "checkpoints") if run.is_dir() else run
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"{run}: expected a run folder of inventory_train.py with a checkpoint, or a checkpoint"
        )
    with announced():
        agent = HDPO.load(path, trust=trust)
    env = agent.simulator
    if not isinstance(env, InventoryEnv) or not env.task.by_series or not isinstance(env.task.demand, Recorded):
        raise ValueError(f"{run}: expected a run of your own demand (inventory_train.py), got {agent.env_id}")
    return agent, env


def main(config: OrdersConfig) -> list[dict[str, Any]]:
    """Write the orders; returns the rows."""
    torch.set_num_threads(1)
    agent, env = load_plan(config.run, config.trust)
    if config.sales is not None:
        env = _with_sales(agent, env, config.sales)
    task, net = env.task, env.network
    demand = task.demand
    assert isinstance(demand, Recorded)
    options = agent.env_kwargs
    product, location = options.get("product", "sku"), options.get("location") or "location"
    with announced():
        stock = read_stock(config.stock, demand, net, task.nodes, product, location)
    here, state = env.today(stock)
    with torch.no_grad():
        wanted = agent.ctx.bank.policy("best")(here.observe(state))
        orders = here.placed(state, here.feasible(state, wanted))
    rows: list[dict[str, Any]] = []
    for s in range(len(orders)):
        for edge, (source, node) in enumerate(net.edges):
            on_hand, on_order = float(stock[s, node, 0]), float(stock[s, node, 1:].sum())
            units = float(orders[s, edge])
            row: dict[str, Any] = {product: demand.product(s)}
            if net.nodes > 1:
                row |= {"source": task.nodes[source] if source >= 0 else SUPPLIER, location: task.nodes[node]}
            lead = float(state["lead_time"][s, edge])
            rows.append(row | {
                "units": round(units), "arrives_in": f"{lead:g}", "on_hand": round(on_hand),
                "on_order": round(on_order),
            })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config.out, lambda file: file.write(text.getvalue().encode()))
    first = demand.first_day + datetime.timedelta(days=demand.step_days * demand.series.shape[1])
    total = sum(row["units"] for row in rows)
    print(f"[ccrl] {config.out}: {sum(row['units'] > 0 for row in rows)} orders of {total} units for the period that "
          f"begins on {first}", flush=True)  # fmt: skip
    return rows


def _with_sales(agent: HDPO, env: InventoryEnv, sales: Path) -> InventoryEnv:
    """The same task after newer sales: products keep the usual demand, and promotions and prices the units, that the
    policy was trained on."""
    with announced():
        newer = make_task("own_demand", **(agent.env_kwargs | {"sales": str(sales)}))
    old = env.task
    assert isinstance(newer.demand, Recorded)
    assert isinstance(old.demand, Recorded)
    before, after = (set(d.products) for d in (old.demand, newer.demand))
    if newer.demand.products != old.demand.products or newer.nodes != old.nodes:
        raise ValueError(
            f"{sales.name}: expected the products and locations of training, in their order; new: "
            f"{sorted(after - before)[:5]}, missing: {sorted(before - after)[:5]}; train again"
        )
    if newer.network != old.network or newer.demand.feature_names != old.demand.feature_names:
        raise ValueError(f"{sales.name}: expected the lead times and promotions of training, got others; train again")
    by_series = newer.by_series | {"scale": old.by_series["scale"]}
    return InventoryEnv(dataclasses.replace(newer, demand=measured_as(newer.demand, old.demand), by_series=by_series))


if __name__ == "__main__":
    try:
        main(tyro.cli(OrdersConfig, description=__doc__))
    except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
