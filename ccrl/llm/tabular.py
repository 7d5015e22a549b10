"""A table of logits as a policy over tokens: the bandits in which the papers' small experiments run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data, Unit
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.task import Prompts

__all__ = ["TabularTokenPolicy"]


class TabularTokenPolicy(nn.Module):
    """Independent softmax distributions per question and position; a prompt is one token, the question's number.

    :param init: logits ``[questions, length, symbols]`` to start from; None: zeros (uniform).
    """

    unit: Unit = "sequence"

    def __init__(
        self, questions: int, length: int, symbols: int, *, init: Tensor | None = None, temperature: float = 1.0,
        k: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        shape = (questions, length, symbols)
        if init is not None and init.shape != shape:
            raise ValueError(f"init: expected logits {shape}, got {tuple(init.shape)}")
        self.logits = nn.Parameter(torch.zeros(shape) if init is None else init.clone())
        self.temperature, self.k = temperature, k

    def outputs(self) -> frozenset[str]:
        return OUTPUTS - {"hidden"}

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[2]

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[T', B, ...]``."""
        return self._evaluate(batch, want, self.temperature)

    def log_prob(self, batch: Data, temperature: float) -> Tensor:
        """``[T', B]``: log-probability of the tokens at another temperature than that of sampling."""
        return self._evaluate(batch, frozenset({"log_prob"}), temperature)["log_prob"]

    def _evaluate(self, batch: Data, want: frozenset[str], temperature: float) -> Outputs:
        tokens = batch["action"]
        logits = self.logits[batch["prompt"][:, -1], : tokens.shape[0]].transpose(0, 1)
        return token_outputs(logits, tokens, want, temperature, self.k)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        row = prompts.tokens[question, -1]
        return (row, 0), self.logits[row, 0]

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        row, t = state
        return (row, t + 1), self.logits[row, t + 1]

    def keep(self, state: Any, rows: Tensor) -> Any:
        return state[0][rows], state[1]
