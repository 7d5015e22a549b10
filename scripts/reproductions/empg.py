"""EMPG: a chain of ten decisions of which two matter; gradient norms by the kind of state, and entropies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement
from scripts.reproductions.tables import History, StateTable, train

check_siblings("agents", "envs")

from agents.llm.agent import LLM, LLMMethod
from agents.llm.baselines import GRPO
from agents.llm.empg import EMPG, EMPGRecipe
from envs.text.bandits import TokenBandit

__all__ = ["Chain", "run"]

KEYS, RIGHT = [3, 7], [2, 4]
FILLERS = [t for t in range(10) if t not in KEYS]
UPDATES = 100


class Chain(TokenBandit):
    """Reward 1 if the two key decisions are right; of the other eight any will do."""

    name = "chain"

    def __init__(self) -> None:
        super().__init__(1, 10, 6)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return (tokens[KEYS] == torch.tensor(RIGHT).unsqueeze(1)).all(0).float()


class _Checked(EMPGRecipe):
    """Notes how far the mean of the factors g is from 1."""

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        found = super().prepare(have, ctx)
        on = found["on"]
        mean = (on["step_scale"] * on["valid"]).sum() / on["valid"].sum()
        self.furthest = max(getattr(self, "furthest", 0.0), abs(float(mean) - 1.0))
        return found


_EMPG = replace(EMPG, Recipe=_Checked)


def _table(memory: bool) -> Any:
    """A state is the place in the chain; with ``memory`` the decision before as well."""
    if memory:
        return lambda task: StateTable(1, 10, 6, 6, lambda state, token: token)
    return lambda task: StateTable(1, 10, 1, 6, lambda state, token: torch.zeros_like(state))


def _go(method: LLMMethod, config: Any, seed: int, memory: bool = False) -> tuple[History, Tensor]:
    """A run, and per update the mean gradient norm of a filler's and of a key's logits, ``[updates, 2]``."""
    norms: list[Tensor] = []

    def look(agent: LLM) -> None:
        norm = agent.policy.logits.grad[0].flatten(1).norm(dim=1)
        norms.append(torch.stack([norm[FILLERS].mean(), norm[KEYS].mean()]))

    history = train(method, Chain(), config, UPDATES, seed, _table(memory), look)
    return history, torch.stack(norms)


def _filler_entropy(history: History) -> float:
    """Mean entropy (nats) of the fillers in fresh completions of the final policy."""
    agent = history.agent
    data = agent.collector.collect(Request(counts=torch.full((1,), 512, dtype=torch.int64)), agent.policy)
    return float(data["entropy"][FILLERS].mean())


def run(seeds: list[int]) -> list[Measurement]:
    """GRPO and EMPG for the same number of updates; a decision is a step."""
    shape = {"model": "tabular", "n_prompts": 32, "group_size": 8, "max_grad_norm": 0.0, "learning_rate": 0.05}

    def empg(zeta: float, memory: bool = False) -> list[tuple[History, Tensor]]:
        config = EMPG.Settings(**shape, step="token", zeta=zeta)
        return [_go(_EMPG, config, seed, memory) for seed in seeds]

    grpo = [_go(GRPO, GRPO.Settings(**shape), seed) for seed in seeds]
    scaled, default = empg(0.0), empg(0.1)

    def success(runs: list[tuple[History, Tensor]]) -> tuple[float, ...]:
        return tuple(history.final() for history, _ in runs)

    def ratio(runs: list[tuple[History, Tensor]]) -> tuple[float, ...]:
        """Fillers, which stay uncertain, to keys, which become certain."""
        return tuple(float(norms[:, 0].mean() / norms[:, 1].mean()) for _, norms in runs)

    def below(with_bonus: list[tuple[History, Tensor]], without: list[tuple[History, Tensor]]) -> tuple[float, ...]:
        return tuple(_filler_entropy(a[0]) - _filler_entropy(b[0]) for a, b in zip(with_bonus, without))

    remembering = {zeta: empg(zeta, memory=True) for zeta in (0.0, 0.1, 0.5)}
    falls, lower = (-math.inf, 0.0), "below 0 (the bonus's purpose)"
    furthest = tuple(float(history.agent.estimator.furthest) for history, _ in scaled)
    return [
        Measurement("success over the last 20 of 100 updates, EMPG minus GRPO", "no loss (paper: a gain on its tasks)",
                    (-0.01, math.inf), tuple(a - b for a, b in zip(success(default), success(grpo)))),
        Measurement("zeta = 0: largest distance of mean g from 1", "0 (paper)", (0.0, 1e-5), furthest),
        Measurement("gradient norm, fillers / keys: EMPG with zeta = 0, over GRPO's", "below 1 (the scaling's purpose)",
                    (-math.inf, 1.0), tuple(a / b for a, b in zip(ratio(scaled), ratio(grpo)))),
        Measurement("gradient norm, fillers / keys: EMPG, over GRPO's", "below 1 (the scaling's purpose)",
                    (-math.inf, 1.0), tuple(a / b for a, b in zip(ratio(default), ratio(grpo)))),
        # here no decision changes the entropy ahead: the bonus is a constant of the place, and its gradient noise
        Measurement("entropy of fillers, nats: zeta = 0.1 minus zeta = 0", "0 (derived; the bonus's purpose: below 0)",
                    (-0.01, 0.01), below(default, scaled)),
        Measurement("the same where a state remembers the decision before", lower, falls,
                    below(remembering[0.1], remembering[0.0])),
        Measurement("the same, zeta = 0.5", lower, falls, below(remembering[0.5], remembering[0.0])),
    ]  # fmt: skip
