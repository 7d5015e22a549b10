"""ETR: elastic clip ranges on ModSum beside GRPO with a constant range of the same mean: more than a wider clip?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.modsum import exact, modsum_shape
from scripts.reproductions.tables import partial_sums, train

check_siblings("agents", "envs")

from agents.llm.etr import ETR, ETRRecipe
from envs.text import make_task

UPDATES = 100
SHAPE = modsum_shape(n_epochs=8, optimiser="sgd", learning_rate=50.0, model="tabular")
ARMS: dict[str, tuple[dict[str, Any], tuple[float, float], float]] = {
    "additive": ({}, (0.834, 0.838), 0.30),
    "multiplicative": ({"form": "multiplicative"}, (0.842, 0.843), 0.31),
    "multiplicative, neutral 0.5": ({"form": "multiplicative", "neutral": 0.5}, (0.816, 0.827), 0.26),
    "implicit_abs": ({"form": "implicit_abs"}, (0.806, 0.811), 0.25),
    "implicit_sq": ({"form": "implicit_sq"}, (0.830, 0.840), 0.25),
}
"""Form -> settings, mean reward of all updates and mean range of three reference runs (docs/reference_runs.md)."""


class Run(NamedTuple):
    """One training run."""

    area: float
    """Mean reward of all updates."""
    entropy: float
    """Of the last policy, nats per token."""
    range: float
    """Mean over updates of the mean clip range in groups whose rewards differ."""


def go(seed: int, **options: Any) -> Run:
    """ModSum with these settings of ETR."""
    ranges: list[Tensor] = []

    class Measured(ETRRecipe):
        def after_update(self, data: dict[str, Data], stats: dict[str, Tensor], ctx: Context) -> None:
            super().after_update(data, stats, ctx)
            on = data["on"]
            if bool((mixed := on["reward_spread"] > 0).any()):
                ranges.append(on["range_high"][0, mixed].mean())

    config = ETR.Settings(**SHAPE, **options)
    history = train(replace(ETR, Recipe=Measured), make_task("modsum"), config, UPDATES, seed, partial_sums)
    policy: Any = history.agent.policy
    return Run(history.area, exact(policy).entropy, float(torch.stack(ranges).mean()))


def constant(seed: int, eps: float) -> Run:
    """GRPO with this range."""
    return go(seed, micro=0.0, macro=0.0, clip_low=eps, clip_high=eps)


def run(seeds: list[int]) -> list[Measurement]:
    """Every form, and GRPO with its mean range."""
    plain = [constant(seed, 0.2) for seed in seeds]
    rows = [Measurement("mean reward of all updates, GRPO, range 0.2", "0.755-0.764 (reference run)", (0.745, 0.774),
                        tuple(one.area for one in plain))]  # fmt: skip
    for name, (options, (low, high), width) in ARMS.items():
        ours = [go(seed, **options) for seed in seeds]
        theirs = [constant(seed, one.range) for seed, one in zip(seeds, ours)]
        rows += [
            Measurement(f"mean range, {name}", f"{width:g} (reference run)", (width - 0.01, width + 0.01),
                        tuple(one.range for one in ours)),
            Measurement(f"mean reward of all updates, {name}", f"{low:g}-{high:g} (reference run)",
                        (low - 0.01, high + 0.01), tuple(one.area for one in ours)),
            Measurement(f"the same, {name} minus a constant range of the same mean",
                        "at least 0.01: more than a wider clip (reference run: 0.016-0.049)", (0.01, math.inf),
                        tuple(a.area - b.area for a, b in zip(ours, theirs))),
            Measurement(f"entropy at the end, {name} minus the constant range (nats per token)",
                        "> 0: entropy falls more slowly (paper); 0 or less (reference run)", (0.0, math.inf),
                        tuple(a.entropy - b.entropy for a, b in zip(ours, theirs))),
        ]  # fmt: skip
    return rows
