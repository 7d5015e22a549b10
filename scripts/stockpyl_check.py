"""Our costs and levels beside stockpyl's (Snyder 2023; 1.0.2), which needs numpy < 2 and so an environment of its own.

python3 -m venv stockpyl-env && stockpyl-env/bin/pip install "stockpyl==1.0.2" "numpy<2"
python scripts/stockpyl_check.py --python stockpyl-env/bin/python

* Newsvendor: backlogged normal demand over the lead time plus one period, in closed form on both sides.
* Serial: Clark and Scarf's recursion on a grid, ours and theirs. Their lead time into the store counts one period more
  (we order before demand, and what arrives serves the next period), and their cost includes goods on their way, at the
  sender's holding cost: ``E[D] sum_j h_{j+1} L_j`` with that lead time, taken off here. Demand is normal there and
  normal clipped at 0 here.
* (r, Q): Poisson demand, ours simulated by periods, theirs exact in continuous time with our lead time plus one: for
  orders of whole multiples of Q the position is uniform on r + 1 ... r + Q in both. Fixed costs are taken off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.inventory.pathwise import Unrolled, average_cost
from ccrl.inventory.rules import Rule
from ccrl.settings import Count, Settings
from envs.inventory import InventoryEnv, Poisson, Task, make_task
from envs.inventory.oracle import backlog_optimum, serial_optimum

__all__ = ["CheckConfig", "Pair", "main", "ours"]

NEWSVENDOR = ((1, 4.0), (4, 9.0), (10, 39.0))
SERIAL = ((1, 4.0), (4, 9.0))
R_Q = ((24, 6), (28, 10))
_MEAN, _UNDERAGE, _LEAD = 5.0, 9.0, 4

_THEIRS = """
import json, sys
from stockpyl.newsvendor import newsvendor_normal
from stockpyl.rq import r_q_cost_poisson
from stockpyl.ssm_serial import optimize_base_stock_levels
c = json.loads(sys.argv[1])
out = {"newsvendor": [], "serial": [], "r_Q": []}
for lead, p in c["newsvendor"]:
    level, cost = newsvendor_normal(1.0, p, 5.0, 1.6, lead_time=lead)
    out["newsvendor"].append([cost, [level]])
for lead, p in c["serial"]:
    levels, cost = optimize_base_stock_levels(num_nodes=4, node_order_in_system=[4, 3, 2, 1],
        node_order_in_lists=[1, 2, 3, 4], echelon_holding_cost=[0.5, 0.3, 0.1, 0.1], lead_time=[lead + 1, 3, 4, 2],
        stockout_cost=p, demand_mean=5, demand_standard_deviation=2, x_num=c["grid"])
    on_the_way = 5 * (0.5 * (lead + 1) + 0.2 * 3 + 0.1 * 4)
    out["serial"].append([cost - on_the_way, [levels[k] for k in (4, 3, 2, 1)]])
for r, q in c["r_Q"]:
    out["r_Q"].append([r_q_cost_poisson(r, q, 1.0, c["underage"], 8.0, 5.0, c["lead"] + 1) - 8.0 * 5.0 / q, []])
print(json.dumps(out))
"""


@dataclass(frozen=True)
class CheckConfig(Settings):
    """Where stockpyl is."""

    python: Path
    """This interpreter's environment has stockpyl 1.0.2."""
    scenarios: Count = 2000
    """The (r, Q) policy is simulated in so many scenarios of 400 periods."""
    grid: Count = 1000
    """Their serial recursion has so many points."""


@dataclass(frozen=True)
class Pair:
    """One number of ours beside theirs."""

    case: str
    ours: float
    theirs: float
    levels: tuple[float, ...] = ()
    their_levels: tuple[float, ...] = ()
    error: float = 0.0
    """Standard error of ours, where it is simulated."""


def ours(scenarios: int = 2000) -> dict[str, list[tuple[float, tuple[float, ...], float]]]:
    """Cost, levels and standard error of every case."""
    found: dict[str, list[tuple[float, tuple[float, ...], float]]] = {"newsvendor": [], "serial": [], "r_Q": []}
    for lead, underage in NEWSVENDOR:
        best = backlog_optimum(lead, underage)
        found["newsvendor"].append((best.cost, (best.level,), 0.0))
    for lead, underage in SERIAL:
        chain = serial_optimum(make_task("serial_system", lead_time=lead, underage=underage))
        found["serial"].append((chain.cost, chain.levels, 0.0))
    for r, quantity in R_Q:
        cost, error = simulated(r, quantity, scenarios)
        found["r_Q"].append((cost, (), error))
    return found


def simulated(r: int, quantity: int, scenarios: int) -> tuple[float, float]:
    """Mean cost and standard error of an (r, Q) policy of one store with backlogged Poisson demand, by simulation."""
    base = make_task("one_store_backlogged", lead_time=_LEAD, underage=_UNDERAGE)
    task = Task(
        "r_Q", base.network, Poisson((_MEAN,)), (1.0,), (_UNDERAGE,), lost=False,
        horizons=dict.fromkeys(("train", "dev", "test"), (0, 400, 100)),
    )  # fmt: skip
    one = torch.ones(1, 1)
    rule = Rule("r_Q", task.network, r * one, 0.0 * one, one, lot=quantity * one)
    env = InventoryEnv(task, "test")
    drawn = env.sample(scenarios, torch.Generator().manual_seed(0))

    def order(seen: dict[str, torch.Tensor]) -> torch.Tensor:
        return rule(seen | {"series": torch.zeros(len(seen["inventory"]), dtype=torch.int64)})

    costs = average_cost(Unrolled(env, order), drawn)
    return float(costs.mean()), float(costs.std() / len(costs) ** 0.5)


def main(config: CheckConfig) -> list[Pair]:
    """Print the table; returns its rows."""
    torch.set_num_threads(1)
    cases: dict[str, Any] = {"newsvendor": NEWSVENDOR, "serial": SERIAL, "r_Q": R_Q, "underage": _UNDERAGE,
                             "lead": _LEAD, "grid": config.grid}  # fmt: skip
    if not config.python.is_file():
        raise FileNotFoundError(
            f"{config.python}: expected the interpreter of an environment with stockpyl 1.0.2; make one: python3 -m "
            'venv stockpyl-env && stockpyl-env/bin/pip install "stockpyl==1.0.2" "numpy<2"'
        )
    command = [str(config.python), "-c", _THEIRS, json.dumps(cases)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{config.python}: expected stockpyl 1.0.2 to answer, got: {last}")
    theirs = json.loads(answer.stdout)
    names = {
        "newsvendor": [f"newsvendor, L = {lead}, p = {p:g}" for lead, p in NEWSVENDOR],
        "serial": [f"serial, four stages, store's L = {lead}, p = {p:g}" for lead, p in SERIAL],
        "r_Q": [f"(r, Q) = ({r}, {q}), L = {_LEAD}, p = {_UNDERAGE:g}" for r, q in R_Q],
    }
    rows = [
        Pair(name, cost, their_cost, levels, tuple(their_levels), error)
        for kind, mine in ours(config.scenarios).items()
        for name, (cost, levels, error), (their_cost, their_levels) in zip(names[kind], mine, theirs[kind], strict=True)
    ]
    print("| case | our cost | stockpyl's | our levels | stockpyl's |\n|---|---|---|---|---|")
    for row in rows:
        level, other = (", ".join(f"{v:.2f}" for v in values) for values in (row.levels, row.their_levels))
        spread = f" ± {row.error:.4f}" if row.error else ""
        print(f"| {row.case} | {row.ours:.6f}{spread} | {row.theirs:.6f} | {level} | {other} |")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(CheckConfig, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
