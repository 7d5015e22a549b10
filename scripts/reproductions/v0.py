"""V0: success of unseen policies from outcomes in context, on simulated item responses, beside simple readers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from ccrl.data import Batching
from ccrl.estimators.base import Phase
from ccrl.learn import Cycle, DatasetLearner
from ccrl.packages import check_siblings
from ccrl.updaters import ModuleUpdater
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.v0 import Adapter, ContextLogistic, OutcomeLog, ValueModel, intra_auc, loss_terms, residuals

__all__ = ["run"]

FEATURES, PROMPTS, SEEN, UNSEEN = 6, 512, 200, 40
STEPS, SIZES, QUERIES = 500, (32, 64, 128, 256), 32
TESTED = (32, 128, 256)


def policies(n: int, weights: Tensor, generator: Generator) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Outcomes of ``n`` policies on prompts of their own: ability ``th``, weights ``u``, success with probability
    ``sigmoid(th - u x)``."""
    found = {}
    for i in range(n):
        ability = torch.randn((), generator=generator)
        own = weights + 0.6 * torch.randn(FEATURES, generator=generator)
        x = torch.randn(PROMPTS, FEATURES, generator=generator)
        label = torch.rand(PROMPTS, generator=generator) < (ability - x @ own).sigmoid()
        found[i] = (x.unsqueeze(1), torch.ones(PROMPTS, 1), label.float())
    return found


class Learning(Cycle):
    """One phase."""

    def __init__(self, updater: ModuleUpdater, alpha: float) -> None:
        super().__init__()
        self._phases = (Phase("value", loss_terms(alpha), Batching(), updater),)

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def trained(rows: dict[int, tuple[Tensor, Tensor, Tensor]], alpha: float, seed: int) -> ValueModel:
    """Adapter and stand-in head after 500 steps of 8 policies, Adam at 1e-3 falling to 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # a prompt of one token gives every query the same answer: four of the 168 queries say as much
        model = ValueModel(FEATURES, adapter=Adapter(FEATURES, queries=4))
        updater = ModuleUpdater(model, lambda params: torch.optim.Adam(params, lr=1e-3), max_grad_norm=1.0)
        source = OutcomeLog(rows, sizes=SIZES, queries=QUERIES)
        learner = DatasetLearner(
            source,
            model,
            Learning(updater, alpha),
            {"value": updater},
            batch_size=8,
            updates=50,
            anneal=True,
            seed=seed,
        )
        learner.begin(0, STEPS)
        for _ in range(STEPS // 50):
            learner.iterate()
    return model.eval()


def nearest(x: Tensor, label: Tensor, query: Tensor, k: int = 16) -> Tensor:
    """Mean label of the nearest prompts of the context."""
    return label[torch.cdist(query, x).topk(k, largest=False).indices].mean(1)


def read(value: Any, row: tuple[Tensor, Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Predictions of the prompts after the first 256 from the first ``size``, and their outcomes."""
    states, mask, label = row
    if value == "nearest":
        return nearest(states[:size, 0], label[:size], states[256:, 0]), label[256:]
    if value == "mean":
        return label[:size].mean().expand(PROMPTS - 256), label[256:]
    said: Tensor = value.predict(states[:size], mask[:size], label[:size], states[256:], mask[256:])
    return said, label[256:]


def leaning(value: Any, rows: dict[int, tuple[Tensor, Tensor, Tensor]], size: int) -> float:
    """Size of the rank correlation of errors with the context's mean label."""
    said, truth, mean = list[Tensor](), list[Tensor](), list[Tensor]()
    for row in rows.values():
        p, y = read(value, row, size)
        said.append(p)
        truth.append(y)
        mean.append(row[2][:size].mean().expand(len(y)))
    predicted, wanted, known = (torch.cat(x) for x in (said, truth, mean))
    return abs(residuals(predicted, wanted, known, known)[0])


def run(seeds: list[int]) -> list[Measurement]:
    """Intra-AUC of unseen policies by size of the context, and what the ranking part of the loss does."""
    aucs: dict[tuple[str, int], list[float]] = {}
    lean: dict[str, list[float]] = {"both": [], "cross entropy": []}
    for seed in seeds:
        generator = Generator().manual_seed(seed)
        direction = torch.randn(FEATURES, generator=generator)
        weights = 2.5 * direction / direction.norm()
        seen, unseen = policies(SEEN, weights, generator), policies(UNSEEN, weights, generator)
        models = {"both": trained(seen, 0.25, seed), "cross entropy": trained(seen, 0.0, seed)}
        readers = {"V0": models["both"], "V0, cross entropy alone": models["cross entropy"], "nearest": "nearest",
                   "logistic": ContextLogistic(), "mean": "mean"}  # fmt: skip
        for size in TESTED:
            for name, value in readers.items():
                found = intra_auc([read(value, row, size) for row in unseen.values()])
                aucs.setdefault((name, size), []).append(found)
        for name, model in models.items():
            lean[name].append(leaning(model, unseen, 256))
    measured = list[Measurement]()
    expected = {
        "mean": (0.5, 0.5, 0.5), "nearest": (0.802, 0.841, 0.858), "logistic": (0.852, 0.890, 0.897),
        "V0": (0.868, 0.881, 0.885),
    }  # fmt: skip
    for name, values in expected.items():
        for size, value in zip(TESTED, values):
            room = 1e-9 if name == "mean" else 0.03
            measured.append(Measurement(f"AUC within unseen policies, {name}, context of {size}",
                                        f"{value} (reference run, other draws)", (value - room, value + room),
                                        tuple(aucs[name, size])))  # fmt: skip
    for size in TESTED:
        gap = tuple(a - b for a, b in zip(aucs["V0", size], aucs["nearest", size]))
        measured.append(Measurement(f"V0 minus nearest 16, context of {size}", "positive", (0.0, math.inf), gap))
    gap = tuple(a - b for a, b in zip(aucs["V0", 256], aucs["logistic", 256]))
    measured.append(Measurement("V0 minus logistic, context of 256", "above -0.02", (-0.02, math.inf), gap))
    more = tuple(a - b for a, b in zip(aucs["V0", 256], aucs["V0, cross entropy alone", 256]))
    measured.append(Measurement("V0 minus cross entropy alone, AUC, context of 256", "positive (paper: .705 and .686)",
                                (0.0, math.inf), more))  # fmt: skip
    less = tuple(b - a for a, b in zip(lean["both"], lean["cross entropy"]))
    measured.append(Measurement("error's rank correlation with the context's mean, cross entropy alone minus both",
                                "positive (paper)", (0.0, math.inf), less))  # fmt: skip
    return measured
