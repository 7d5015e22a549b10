"""Token tables with a memory, and what the experiments on them have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.base import Context
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.agent import LLM, LLMMethod

__all__ = ["History", "StateTable", "partial_sums", "train"]


class StateTable(nn.Module):
    """Logits ``[questions, length, states, symbols]``; the state starts at 0 and ``move(state, token)`` is the next."""

    unit = "sequence"
    temperature = 1.0

    def __init__(
        self, questions: int, length: int, states: int, symbols: int, move: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(questions, length, states, symbols))
        self.move = move

    def outputs(self) -> frozenset[str]:
        return OUTPUTS - {"hidden"}

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[T', B, ...]``."""
        return self._evaluate(batch, want, self.temperature)

    def log_prob(self, batch: Data, temperature: float) -> Tensor:
        """``[T', B]``: of the tokens, at another temperature."""
        return self._evaluate(batch, frozenset({"log_prob"}), temperature)["log_prob"]

    def _evaluate(self, batch: Data, want: frozenset[str], temperature: float) -> Outputs:
        tokens, row = batch["action"], batch["prompt"][:, -1]
        states = [torch.zeros_like(row)]
        for token in tokens[:-1]:
            states.append(self.move(states[-1], token))
        place = torch.arange(len(tokens)).unsqueeze(1)
        logits = self.logits[row, place, torch.stack(states)]
        return token_outputs(logits, tokens, want, temperature, 16)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        row = prompts.tokens[question, -1]
        state = torch.zeros_like(row)
        return (row, 0, state), self.logits[row, 0, state]

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        row, t, memory = state
        memory = self.move(memory, token)
        return (row, t + 1, memory), self.logits[row, t + 1, memory]

    def keep(self, state: Any, rows: Tensor) -> Any:
        row, t, memory = state
        return row[rows], t, memory[rows]


def partial_sums(task: Any) -> StateTable:
    """ModSum's table: the state is the sum of the tokens so far, modulo the symbols."""
    n = task.vocab.size
    return StateTable(task.questions, task.fixed_length, n, n, lambda state, token: (state + token) % n)


@dataclass
class History:
    """What a run left behind."""

    agent: LLM
    reward: list[float] = field(default_factory=list)
    """Mean score of every iteration's rollout."""
    stats: list[dict[str, float]] = field(default_factory=list)
    """The update's statistics per iteration."""
    grad_norm: list[float] = field(default_factory=list)
    """One per gradient step."""

    def final(self, last: int = 20) -> float:
        """Mean reward of the last iterations."""
        return sum(self.reward[-last:]) / last

    @property
    def area(self) -> float:
        """Mean reward of all iterations: the area under the learning curve."""
        return sum(self.reward) / len(self.reward)


def train(
    method: LLMMethod, task: Any, config: Any, updates: int, seed: int, table: Callable[[Any], nn.Module],
    look: Callable[[LLM], None] | None = None,
) -> History:  # fmt: skip
    """Train ``method`` on ``task`` for ``updates`` iterations with the policy ``table(task)``; ``look(agent)`` follows
    every iteration."""
    norms: list[Tensor] = []

    class Watched(method.Recipe):  # type: ignore[name-defined, misc]
        def after_minibatch(self, stats: dict[str, Tensor], ctx: Context) -> None:
            super().after_minibatch(stats, ctx)
            norms.append(stats["grad_norm"])

    cls = LLM.of(replace(method, Recipe=Watched))
    agent = type(method.name, (cls,), {"make_model": lambda self: table(self.task)})(task, config, seed=seed)
    history = History(agent)

    def note(agent: LLM) -> None:
        history.reward.append(float(agent.collector.stats.returns.mean()))
        history.stats.append({k: float(v) for k, v in agent.scalars.items() if k.startswith("train/")})
        if look is not None:
            look(agent)

    agent.learn(updates * agent.samples_per_iteration, callback=note)
    history.grad_norm = [float(x) for x in norms]
    return history
