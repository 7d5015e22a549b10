"""REAL: the shape of its gradient weights beside GRPO's, and both methods on ModSum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccrl.data import Batching, Data
from ccrl.estimators.losses import clip
from ccrl.estimators.terms import LogRatio
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import History, partial_sums, train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.real import REAL, anchored
from envs.text import make_task

TAU, GROUP = 0.5, 8
SHAPE = {"n_prompts": 16, "group_size": GROUP, "n_epochs": 8, "max_grad_norm": 0.0, "model": "tabular"}
UPDATES = {"Adam": 150, "SGD": 100}
"""The expected numbers of SGD are those of 100 updates; after 150 GRPO has a mean reward of 0.83 in place of 0.76."""


def run(seeds: list[int]) -> list[Measurement]:
    """The weights (exact), then ModSum."""
    return [*_weights(), *_modsum(seeds)]


def _weight(right: int, positive: bool, s: Tensor) -> Tensor:
    """``|d L / d s|`` of one member at logits ``s`` ``[S]``, the other members of its group at 0."""
    label = torch.zeros(GROUP, dtype=torch.float64)
    label[:right] = 1.0
    member = 0 if positive else GROUP - 1
    columns = {"valid": torch.ones(1, GROUP, dtype=torch.float64), "label": label,
               "group": torch.zeros(GROUP, dtype=torch.int64)}  # fmt: skip
    batch = Data(columns, sequence=frozenset({"label", "group"})).epoch(Batching("group", "full"), None)[0]
    found = []
    for value in s:
        logit = torch.zeros(1, GROUP, dtype=torch.float64)
        logit[0, member] = value
        logit.requires_grad_()
        level = LogRatio(logit, torch.zeros_like(logit), batch["valid"])
        element = anchored(TAU)(level, batch["valid"], {}, batch)
        found.append(torch.autograd.grad(element.sum(), logit)[0][0, member].abs())
    return torch.stack(found)


def _weights() -> list[Measurement]:
    s = torch.linspace(-3.0, 3.0, 121, dtype=torch.float64)
    largest, wrong_way = 0.0, 0
    for right in (1, 4, 7):
        for positive in (True, False):
            weight = _weight(right, positive, s)
            largest = max(largest, float(weight.max()))
            slope = weight.diff() if not positive else -weight.diff()
            wrong_way += int((slope <= 0).sum())
    log_prob = torch.full((1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    level = LogRatio(log_prob, torch.zeros_like(log_prob), torch.ones_like(log_prob))
    element = clip(0.2, 0.2)(level, -torch.ones_like(log_prob), {}, Data({"valid": level.valid}))
    grpo = float(torch.autograd.grad(element.sum(), log_prob)[0])
    return [
        Measurement("largest gradient weight of REAL, s in [-3, 3], groups 1/8, 4/8, 7/8", "below 1 / tau = 2 (paper)",
                    (0.0, 1.0 / TAU), (largest,)),
        Measurement("grid intervals on which REAL's weight is not monotone", "0 (paper)", (0, 0), (float(wrong_way),)),
        Measurement("GRPO's weight of a negative at s = 3, in |A|", "20 (e^3)", (20.0, 20.2), (grpo,)),
    ]  # fmt: skip


def _modsum(seeds: list[int]) -> list[Measurement]:
    task = make_task("modsum")

    def go(method: LLMMethod, updates: int, **options: object) -> list[History]:
        settings = method.Settings(**SHAPE, **options)
        return [train(method, task, settings, updates, seed, partial_sums) for seed in seeds]

    found = []
    for name, options, real, real_area, grpo, grpo_area in (
        ("Adam", {"learning_rate": 0.05}, (0.997, 0.998), (0.935, 0.935), (0.994, 0.998), (0.915, 0.920)),
        ("SGD", {"optimiser": "sgd", "learning_rate": 50.0}, (0.998, 0.998), (0.956, 0.962), (0.968, 0.968),
         (0.756, 0.767)),
    ):  # fmt: skip
        updates = UPDATES[name]
        ours, theirs = go(REAL, updates, **options), go(GRPO, updates, **options)
        for method, histories, final, area in (("REAL", ours, real, real_area), ("GRPO", theirs, grpo, grpo_area)):
            found += [
                Measurement(f"ModSum, {name}: final reward of {method}", f"{final[0]:g}-{final[1]:g} (reference run)",
                            (final[0] - 0.005, min(final[1] + 0.005, 1.0)), tuple(h.final() for h in histories)),
                Measurement(f"ModSum, {name}: mean reward of all updates, {method}",
                            f"{area[0]:g}-{area[1]:g} (reference run)", (area[0] - 0.01, area[1] + 0.01),
                            tuple(h.area for h in histories)),
            ]  # fmt: skip
        found.append(Measurement(
            f"ModSum, {name}: mean reward of all updates, REAL minus GRPO", "positive (reference run)", (0.0, math.inf),
            tuple(a.area - b.area for a, b in zip(ours, theirs)),
        ))  # fmt: skip
    return found
