"""MHPO: how large the gradient multiplier can be, and parity with GRPO on ModSum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators.losses import clip
from ccrl.estimators.terms import LogRatio, Loss
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import History, partial_sums, train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.mhpo import MHPO, Hazard, modulated
from envs.text import make_task

SECOND_MOMENTS = {
    0.5: (0.074038, 1.130683, 0.432954, 1.526628),
    1.0: (0.060129, 1.074915, 0.255343, 7.292232),
    2.0: (0.037520, 0.757927, 0.138229, 2980.899),
}
"""Deviation of the log-ratio -> E[M^2] of MHPO, of its modulator alone, of GRPO's clip with A > 0 and with A < 0
(docs/reference_runs.md)."""
SHAPE = {"n_prompts": 16, "group_size": 8, "n_epochs": 8, "max_grad_norm": 0.0, "model": "tabular"}
UPDATES = 150


def run(seeds: list[int]) -> list[Measurement]:
    """The multiplier's second moments (exact), then ModSum."""
    return [*_moments(), *_modsum(seeds)]


def _multiplier(loss: Loss, x: Tensor, advantage: float) -> Tensor:
    """``-d loss / d log pi / A`` at log-ratios ``x``, by autograd."""
    log_prob = x.clone().unsqueeze(0).requires_grad_()
    level = LogRatio(log_prob, torch.zeros_like(log_prob), torch.ones_like(log_prob))
    element = loss(level, torch.full_like(level.valid, advantage), {}, Data({"valid": level.valid}))
    (gradient,) = torch.autograd.grad(element.sum(), log_prob)
    return -gradient.squeeze(0) / advantage


def _moments() -> list[Measurement]:
    x = torch.linspace(-60.0, 60.0, 400_001, dtype=torch.float64)
    plain = Hazard(scale_up=math.inf, scale_down=math.inf)
    cases: Sequence[tuple[str, Loss, float]] = (
        ("MHPO", modulated(Hazard()), 1.0), ("modulator alone", modulated(plain), 1.0),
        ("GRPO, A > 0", clip(0.2, 0.2), 1.0), ("GRPO, A < 0", clip(0.2, 0.2), -1.0),
    )  # fmt: skip
    found = []
    for deviation, expected in SECOND_MOMENTS.items():
        density = torch.exp(-0.5 * (x / deviation) ** 2) / (deviation * math.sqrt(2.0 * math.pi))
        for (name, loss, advantage), value in zip(cases, expected):
            moment = float(torch.trapezoid(_multiplier(loss, x, advantage) ** 2 * density, x))
            room = 1e-3 * max(1.0, value)
            found.append(Measurement(
                f"E[M^2], log-ratio deviation {deviation:g}: {name}", f"{value:g} (quadrature)",
                (value - room, value + room), (moment,),
            ))  # fmt: skip
    return found


def _modsum(seeds: list[int]) -> list[Measurement]:
    task = make_task("modsum")
    adam, sgd = {"learning_rate": 0.05}, {"optimiser": "sgd", "learning_rate": 50.0}
    open_clip = {"clip_low": 1.0, "clip_high": math.inf}

    def go(method: LLMMethod, seed: int, **options: object) -> History:
        return train(method, task, method.Settings(**SHAPE, **options), UPDATES, seed, partial_sums)

    mhpo = [go(MHPO, s, **adam) for s in seeds]
    grpo = [go(GRPO, s, **adam) for s in seeds]
    slow = {
        "MHPO": [max(go(MHPO, s, **sgd).grad_norm) for s in seeds],
        "GRPO": [max(go(GRPO, s, **sgd).grad_norm) for s in seeds],
        "no clip": [max(go(GRPO, s, **sgd, **open_clip).grad_norm) for s in seeds],
    }

    def ratio(a: str, b: str) -> tuple[float, ...]:
        return tuple(x / y for x, y in zip(slow[a], slow[b]))

    return [
        Measurement("ModSum, Adam: final reward of MHPO", "0.997-0.998 (reference run)", (0.99, 1.0),
                    tuple(h.final() for h in mhpo)),
        Measurement("ModSum, Adam: MHPO minus GRPO, final reward", "0: parity (reference run)", (-0.01, 0.01),
                    tuple(a.final() - b.final() for a, b in zip(mhpo, grpo))),
        Measurement("ModSum, SGD: largest gradient norm of MHPO", "0.012 (reference run)", (0.01, 0.014),
                    tuple(slow["MHPO"])),
        Measurement("ModSum, SGD: largest gradient norm, MHPO / GRPO", "0.29 (reference run: 0.012 / 0.041)",
                    (0.24, 0.34), ratio("MHPO", "GRPO")),
        Measurement("ModSum, SGD: largest gradient norm, GRPO / no clip",
                    "0.33-0.60 (reference run: 0.041 / 0.068-0.126)", (0.3, 0.65), ratio("GRPO", "no clip")),
    ]  # fmt: skip
