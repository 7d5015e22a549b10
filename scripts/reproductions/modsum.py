"""ModSum with a table that sees the running sum: the token task of several papers' small experiments.

With a table that does not see it (``model=tabular``) only deterministic completions reach reward 1; with it the first
three tokens may stay uniform, and a reward of 1 goes with any entropy up to ``3/4 ln 10`` nats per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Evaluation
from ccrl.llm.policy import token_outputs
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings

check_siblings()

from agents.llm.base import LLM
from envs.text.bandits import ModSum

__all__ = ["Exact", "RunningSumPolicy", "modsum_agent"]


class Exact(NamedTuple):
    """Expectations under the policy, over all questions equally."""

    reward: float
    entropy: float
    """Nats per token."""


class RunningSumPolicy(TabularTokenPolicy):
    """Logits ``[questions * symbols, length, symbols]``: a row per question and sum of the tokens so far."""

    def __init__(self, task: ModSum) -> None:
        super().__init__(task.questions * task.symbols, task.fixed_length, task.symbols)
        self.questions = task.questions

    def forward(self, batch: Data, want: frozenset[str]) -> Evaluation:
        tokens, symbols = batch["action"], self.vocab_size
        row = batch["prompt"][:, -1] * symbols + (tokens.cumsum(0) - tokens) % symbols
        place = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
        logits = self.logits[row, place]
        return token_outputs(logits, tokens, want, self.temperature, self.second_temperature, self.k)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        row = prompts.tokens[question, -1] * self.vocab_size
        return (row, 0), self.logits[row, 0]

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        row, t = state
        symbols = self.vocab_size
        row = row // symbols * symbols + (row + token) % symbols
        return (row, t + 1), self.logits[row, t + 1]

    @torch.no_grad()
    def exact(self) -> Exact:
        """By the distribution of the running sum, token by token."""
        symbols, steps = self.vocab_size, self.logits.shape[1]
        probability = self.logits.softmax(-1).view(self.questions, symbols, steps, symbols)
        sums = torch.arange(symbols)
        token = (sums.unsqueeze(0) - sums.unsqueeze(1)) % symbols  # [before, after]
        reached = torch.zeros(self.questions, symbols)
        reached[:, 0] = 1.0
        entropy = torch.zeros(self.questions)
        for t in range(steps):
            p = probability[:, :, t]
            entropy += (reached * torch.special.entr(p).sum(-1)).sum(-1)
            reached = (reached.unsqueeze(-1) * p.gather(-1, token.expand_as(p))).sum(1)
        question = torch.arange(self.questions)
        return Exact(float(reached[question, question % symbols].mean()), float(entropy.mean() / steps))


def modsum_agent(method: type[LLM], seed: int, **options: Any) -> LLM:
    """An agent of ``method`` on ModSum (10 questions, 4 of 10 symbols) with the table above; ``options`` are of its
    config. 16 prompts and 8 completions each by default, and gradients are not clipped."""

    class OnRunningSums(method):  # type: ignore[misc, valid-type]
        def make_model(self) -> nn.Module:
            return RunningSumPolicy(self.task)

    sizes: dict[str, Any] = {"n_prompts": 16, "group_size": 8, "max_grad_norm": 0.0}
    return OnRunningSums(ModSum(), method.Config(**(sizes | options)), seed=seed)
