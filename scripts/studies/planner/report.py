"""The tables of the planner's case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ccrl.experiment.csv_table import read_rows
from ccrl.experiment.files import write_atomic
from ccrl.stats import paired_t

__all__ = ["table", "write"]

TITLES = {
    "planner_store": "One store",
    "planner_warehouse": "One warehouse, five stores",
    "planner_two_warehouses": "Two warehouses, five stores",
    "planner_terms": "One store, lots and a capacity",
    "planner_fixed_cost": "One store, a fixed cost of every order",
}


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Markdown lines: per method the means over demand seeds, and ours minus it, percent of it, with the 95 % interval
    of Student's t over the seeds, paired."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    seeds = sorted({row["seed"] for row in rows}, key=int)
    by = {(row["method"], row["seed"]): row for row in rows}
    ours = np.array([float(by["ours", seed]["cost"]) for seed in seeds])
    lines = [
        "| method | cost per product and week | ours against it, % | fill rate | stock | orders a week |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        mine = [by[method, seed] for seed in seeds]
        cost = np.array([float(row["cost"]) for row in mine])
        against = ""
        if method != "ours":
            change = 100 * (ours / cost - 1)
            against = f"{change.mean():+.1f}"
            if len(seeds) > 1:
                low, high = paired_t(change, np.zeros_like(change))[1:3]
                against += f" ({low:+.1f} to {high:+.1f})"
        means = [np.mean([float(row[name]) for row in mine]) for name in ("fill", "stock", "orders")]
        name = method.replace("_", " ").replace("s S", "(s, S)").replace("r Q", "(r, Q)")
        lines.append(
            f"| {name} | {cost.mean():.2f} | {against} | {100 * means[0]:.1f} % | {means[1]:.1f} | {means[2]:.2f} |"
        )
    cpu = [float(by["ours", seed]["cpu"]) for seed in seeds]
    epochs = [by["ours", seed]["epochs run"] for seed in seeds]
    each = ", ".join(f"{value:.2f}" for value in ours)
    lines += ["", f"Seeds {', '.join(seeds)}; ours by seed: {each}; epochs {', '.join(epochs)}; CPU minutes each: "
                  f"{min(cpu) / 60:.1f} to {max(cpu) / 60:.1f}."]  # fmt: skip
    return lines


def write(out: Path, figures: Path) -> Path:
    """``planner.md`` of the CSV files in ``out``.

    Raises:
        FileNotFoundError: none of them is there.
    """
    found = [name for name in TITLES if (out / f"{name}.csv").is_file()]
    if not found:
        raise FileNotFoundError(
            f"{out}: expected one of {', '.join(f'{name}.csv' for name in TITLES)}; run a case first"
        )
    lines = ["# The planner's case", ""]
    for name in found:
        rows = read_rows(out / f"{name}.csv")
        lines += [f"## {TITLES[name]}", "", *table(rows), ""]
    path = figures / "planner.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    assert not any(math.isnan(float(row["cost"])) for name in found for row in read_rows(out / f"{name}.csv"))
    write_atomic(path, lambda file: file.write("\n".join(lines).encode()))
    return path
