"""DCPO: the pull toward a hotter policy (exact), and the entropy held at its target on ModSum."""

from __future__ import annotations

import math
from statistics import mean

import torch

from ccrl.data import Data
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.modsum import exact, modsum_shape
from scripts.reproductions.tables import partial_sums, train

check_siblings("agents", "envs")

from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.dcpo import DCPO, tempered_log_prob
from envs.text import make_task

UPDATES = 300


def entropy_slope(temperature: float) -> float:
    """Derivative of the entropy along the expected gradient of the REINFORCE term, for logits 2, 1, 0, -1."""
    policy = TabularTokenPolicy(1, 1, 4, init=torch.tensor([[[2.0, 1.0, 0.0, -1.0]]], dtype=torch.float64))
    columns = {"action": torch.arange(4).unsqueeze(0), "valid": torch.ones(1, 4), "prompt": torch.zeros(4, 1).long()}
    data = Data(columns, sequence=frozenset({"prompt"}))
    with torch.no_grad():
        log_prob = policy(data, frozenset({"log_prob"}))["log_prob"][0]
    pi = log_prob.exp()
    rho = (tempered_log_prob(policy, data, temperature, None)[0] - log_prob).exp()
    gradient = (pi * rho) @ (torch.eye(4) - pi)
    return float(gradient @ (-pi * (log_prob - pi @ log_prob)))


def _run(method: LLMMethod, seed: int, **options: float) -> tuple[float, float]:
    """Entropy (nats per token) and reward, means over the last 20 updates, both exact."""
    found = []
    config = method.Settings(**modsum_shape(learning_rate=0.05, n_epochs=4, weight_decay=0.0, **options))
    train(method, make_task("modsum"), config, UPDATES, seed, partial_sums, lambda a: found.append(exact(a.policy)))
    return mean(x.entropy for x in found[-20:]), mean(x.reward for x in found[-20:])


def run(seeds: list[int]) -> list[Measurement]:
    """The slopes, then the table of entropies."""
    grpo = [_run(GRPO, s) for s in seeds]
    one = [_run(DCPO, s, entropy_target=1.0) for s in seeds]
    more = [_run(DCPO, s, entropy_target=1.5) for s in seeds]
    ablated = [_run(DCPO, s, entropy_target=1.5, hot=1.0, cold=1.0) for s in seeds]

    def column(rows: list[tuple[float, float]], i: int) -> tuple[float, ...]:
        return tuple(row[i] for row in rows)

    return [
        Measurement("slope of the entropy, T 1.2", "0.025262 (exact)", (0.025261, 0.025263), (entropy_slope(1.2),)),
        Measurement("slope of the entropy, T 0.8", "-0.032816 (exact)", (-0.032817, -0.032815), (entropy_slope(0.8),)),
        Measurement("ModSum: entropy, GRPO", "0.42, 0.56 (reference run)", (0.35, 0.63), column(grpo, 0)),
        Measurement("ModSum: entropy, DCPO, target 1.0", "0.963, 0.977 (reference run): within 0.05 of 1", (0.95, 1.05),
                    column(one, 0)),
        Measurement("ModSum: reward, DCPO, target 1.0", "0.995-0.997 (reference run)", (0.99, 1.0), column(one, 1)),
        Measurement("ModSum: entropy, DCPO, target 1.5", "1.20, 1.25 (reference run)", (1.15, 1.3), column(more, 0)),
        Measurement("ModSum: entropy, DCPO, target 1.5, without rho", "0.38, 0.39 (reference run): it collapses",
                    (0.3, 0.5), column(ablated, 0)),
        Measurement("ModSum: entropy, DCPO minus GRPO", "> 0 (paper)", (0.0, math.inf),
                    tuple(a[0] - b[0] for a, b in zip(one, grpo))),
    ]  # fmt: skip
