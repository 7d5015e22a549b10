"""How conditions and times are drawn, and what it does to the relative variance of gradients on eight Gaussians."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.flow.awm import AWM, AWMRecipe
from agents.flow.flow_grpo import FlowGRPO
from ccrl.flow import Conditions
from ccrl.seeding import named_generator, stream_seed
from scripts.reproductions import awm as awm_test
from scripts.studies import tables
from scripts.studies.tables import Rows

__all__ = ["DESIGNS", "Variance", "variance"]

DESIGNS = ("dealt, stratified", "dealt, independent", "with replacement, stratified", "with replacement, independent")
"""Conditions dealt in turn (every one as often) or drawn with replacement; times one per part of the sampler's grid, or
independent and uniform in (0, 1)."""


class Independent(AWMRecipe):
    """Times that are drawn independently of each other."""

    def times(self, generator: torch.Generator, device: torch.device) -> Tensor:
        return torch.rand(self.config.n_times, generator=generator, device=device).clamp_min(0.01)


def variance(start: Any, seed: int, method: str, design: str, batches: int) -> float:
    """Total variance over the squared norm of the mean. :param start: an agent with the pre-trained policy."""
    conditions, times = design.split(", ")
    if method == "flow_grpo":
        agent = awm_test.started(FlowGRPO, start, stream_seed(seed, "gradient variance"))
    else:
        made = AWM if times == "stratified" else replace(AWM, Recipe=Independent)
        settings = {"weighting": method, "n_times": 13, "kl_coef": 0.0, "ema_coef": 0.0, **awm_test.ODE}
        agent = awm_test.started(made, start, stream_seed(seed, "gradient variance"), **settings)
    if conditions == "with replacement":
        generator, count = named_generator(seed, "conditions with replacement"), agent.task.conditions
        agent.collector.draw = lambda n: Conditions(torch.randint(count, (n,), generator=generator))
    return awm_test.relative_variance(agent, batches)


@dataclass(frozen=True)
class Variance:
    """Uniform and ghuber weights and Flow-GRPO, by design."""

    figures: Path = Path("docs/figures")
    """Folder that flow_variance.md and .csv are written to."""
    seeds: int = 3
    """Pre-trained policies."""
    batches: int = 150
    """Fresh batches of 8 x 24 samples per number."""

    def run(self) -> list[Rows]:
        """Print and write the table."""
        rows = Rows()
        for seed in range(self.seeds):
            start = awm_test.base(seed)
            for method in ("uniform", "ghuber", "flow_grpo"):
                for design in DESIGNS:
                    if method == "flow_grpo" and design.endswith("independent"):
                        continue  # its times are the sampler's
                    found = variance(start, seed, method, design, self.batches)
                    rows.append({"method": method, "design": design, "seed": seed, "relative variance": found})
        table = Rows()
        for method, design in dict.fromkeys((row["method"], row["design"]) for row in rows):
            own = [row["relative variance"] for row in rows if (row["method"], row["design"]) == (method, design)]
            table.append({"method": method, "design": design, "mean": statistics.fmean(own),
                          **{f"seed {i}": value for i, value in enumerate(own)}})  # fmt: skip
        command = f"python scripts/studies/flow variance --seeds {self.seeds} --batches {self.batches}"
        tables.write(self.figures / "flow_variance", command, table, rows)
        return [table]
