"""Learn to order your own products: sales, costs and lead times in, a run folder with a policy out.

python scripts/inventory_train.py sales.csv --holding 0.2 --underage 3 --lead-time 4
python scripts/inventory_train.py sales.csv --product item --date week --units sold --location shop --promotion promo
    --costs costs.csv --network network.csv --vary-lead-time 1

Then: inventory_report.py RUN (held-out weeks beside tuned rules), inventory_orders.py RUN (what to order now). A run is
one of ``train.py hdpo`` and is resumed as one.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.hdpo import HDPO, HDPOConfig
from ccrl.experiment import checkpoint
from ccrl.experiment.run import RunFolder
from ccrl.settings import Count, Natural, Nonnegative, Positive, Settings
from envs.inventory import InventoryEnv, make_task
from envs.inventory.sales import Period
from scripts import training

__all__ = ["InventoryTrainConfig", "announced", "main"]


@dataclass(frozen=True)
class InventoryTrainConfig(Settings):
    """What is sold, what it costs, and how long to learn. What nobody gives is refused or announced."""

    sales: Annotated[Path, tyro.conf.Positional]
    """Sales are in this CSV or Parquet file: a row per product and period (long), a column per period, or a column per
    product (wide)."""
    product: str = "sku"
    """The column of this name holds the products."""
    date: str = "date"
    """The column of this name holds the days, as 2024-01-31."""
    units: str = "units"
    """The column of this name holds the units sold."""
    location: str | None = None
    """The column of this name holds the locations; without one all is one store."""
    promotion: tuple[str, ...] = ()
    """The columns of these names hold planned promotions, as numbers."""
    price: str | None = None
    """The column of this name holds planned prices."""
    period: Period = "auto"
    """A period is a week (days are added up from Monday), a day, or what the dates say (auto)."""
    history: Count | None = None
    """A policy sees this many past periods; None takes 16 weeks or 28 days."""
    holding: Nonnegative | None = None
    """A unit on stock at the end of a period costs this."""
    underage: Nonnegative | None = None
    """A unit of demand that is not served costs this: the margin that is lost."""
    lead_time: Count | None = None
    """An order can be sold this many periods later."""
    lead_time_min: Count | None = None
    """Lead times are random from this to lead_time, order by order; None fixes them."""
    unit_cost: Nonnegative | None = None
    """Each unit ordered costs this."""
    fixed_cost: Nonnegative | None = None
    """Each order costs this, whatever its size."""
    minimum: Nonnegative | None = None
    """An order has at least this many units."""
    lot: Count | None = None
    """Orders are multiples of this many units."""
    capacity: Nonnegative | None = None
    """An order has at most this many units."""
    shelf_life: Natural = 0
    """Goods are waste this many periods after they arrive in a store; 0 says that they keep."""
    waste_cost: Nonnegative | None = None
    """A unit that becomes waste costs this."""
    costs: Path | None = None
    """A table gives any of these numbers by product and location, and wins over the options."""
    network: Path | None = None
    """A table of source, target, lead_time says who ships to whom; None: every location orders from a supplier."""
    stock: Path | None = None
    """A table of product, on_hand, arriving_1 ... is the stock that training begins with; None begins with nothing."""
    stock_periods: Nonnegative | None = None
    """Training begins with so many periods of usual demand on stock, where no table says what there is."""
    backlog: bool = False
    """Demand that is not served waits; otherwise it is lost."""
    vary_lead_time: Natural = 0
    """The policy learns lead times up to this many periods shorter and longer too, for questions of what if."""
    epochs: Count = 200
    """Training passes this many times over the products, unless it ends earlier."""
    patience: Count = 40
    """Training ends after this many epochs without a lower cost in the development periods."""
    batch_size: Count = 64
    """An update takes this many products; with vary_lead_time a product counts once for each lead time."""
    learning_rate: Positive | None = None
    """This is Adam's step size; None takes 3e-3."""
    seed: Natural = 0
    """One number seeds the network and the order of the products."""
    run_root: Path = Path("runs")
    """The run folder is made in this folder."""
    progress: bool = True
    """A progress bar is shown, on a terminal."""

    def options(self) -> dict[str, Any]:
        """The options of ``ccrl/InventoryOwn-v0``: what was given."""
        own = ("epochs", "patience", "batch_size", "learning_rate", "seed", "run_root", "progress", "backlog")
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        found = {k: str(v) if isinstance(v, Path) else v for k, v in found.items() if v is not None and v != ()}
        found |= {"lost": not self.backlog}
        return found | ({"promotion": list(self.promotion)} if self.promotion else {})


@contextmanager
def announced() -> Iterator[None]:
    """Warnings become one line each: what is assumed of the user's data is no fault of the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(found.message) for found in caught):
        print(f"[ccrl] note: {text}", flush=True)


def main(config: InventoryTrainConfig) -> RunFolder:
    """Train; returns the run folder."""
    options = config.options()
    with announced():
        env = InventoryEnv(make_task("own_demand", **options))
    task, count = env.task, env.available
    assert count is not None
    products = env.split("test").available
    assert products is not None
    step = "days" if getattr(task.demand, "step_days", 7) == 1 else "weeks"
    train_span, dev, test = (task.split_horizons[k] for k in ("train", "dev", "test"))
    print(
        f"[ccrl] {products} products, {env.network.stores} locations, {env.network.warehouses} warehouses; "
        f"{train_span[1]} {step} to train on, {dev[1] - dev[2]} to choose by, {test[1] - test[2]} held out",
        flush=True,
    )
    agent = HDPOConfig(
        policy="planner", n_train=count, n_dev=count, batch_size=min(count, config.batch_size), dev_every=5,
        patience=config.patience, learning_rate=config.learning_rate,
    )  # fmt: skip
    total = config.epochs * count * env.periods
    settings = training.run_config("hdpo")(
        agent=agent, env="ccrl/InventoryOwn-v0", total_timesteps=total, seed=config.seed, run_root=config.run_root,
        checkpoint_every=max(1, total // 10), eval_every=0, env_kwargs=options, progress=config.progress,
    )  # fmt: skip
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said above
        run = training.train("hdpo", settings)
        path = checkpoint.latest(run.checkpoints)
        assert path is not None
        trained = HDPO.load(path)
    torch.set_num_threads(1)
    print(
        f"[ccrl] best cost in the development periods: {trained.best_cost:.4g} per period and store, in epoch "
        f"{trained.best_iteration} of {trained.iteration} (epoch 0 is the tuned rule); "
        f"{time.perf_counter() - start:.0f} s\n"
        f"[ccrl] next: python scripts/inventory_report.py {run.path} --out report\n"
        f"[ccrl]       python scripts/inventory_orders.py {run.path} --stock stock.csv --out orders.csv",
        flush=True,
    )
    return run


if __name__ == "__main__":
    try:
        main(tyro.cli(InventoryTrainConfig, description=__doc__))
    except (ValueError, TypeError, OSError, ImportError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
