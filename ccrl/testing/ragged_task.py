"""A bandit over tokens whose completions differ in length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from ccrl.llm.task import Prompts, Score, Split

__all__ = ["RaggedTask"]


class _Symbols:
    """Four symbols and an end token."""

    size, pad, bos, eos = 5, -1, -1, 4

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def decode(self, tokens: Any) -> str:
        return "".join(str(t) for t in tokens if t < self.eos)


class RaggedTask:
    """A bandit for tables whose completions differ in length: they end at the end token, at the latest after six of the
    eight positions, so that there is room for padding.

    ``accuracy``: the first token is the question's number. :param graded: a second component that differs between
    nearly all completions; else it is 0.
    """

    name = "ragged"
    components = ("accuracy", "grade")
    questions, fixed_length, max_new_tokens = 3, 8, 8
    vocab = _Symbols()

    def __init__(self, graded: bool = True) -> None:
        self.graded = graded

    def initial_logits(self) -> Tensor:
        """``[3, 8, 5]``: never the end first, always from the sixth position on."""
        logits = torch.zeros(self.questions, self.fixed_length, self.vocab.size)
        logits[:, 0, self.vocab.eos] = -40.0
        logits[:, 5:, self.vocab.eos] = 40.0
        return logits

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        index = torch.arange(n) % self.questions
        end = torch.full_like(index, self.vocab.eos)
        shown = torch.stack([index, (index + 1) % 4, end], 1)
        return Prompts(index[:, None], torch.ones(n, 1), index, tuple(index.tolist()), shown, torch.ones(n, 3))

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        number = prompts.index[question]
        place = torch.arange(tokens.shape[0])[:, None]
        counted = torch.where(place < length, tokens + 1, 0)
        accuracy = (tokens[0] == number).float()
        grade = (counted * (place + 1) ** 2).sum(0) / 500.0 if self.graded else torch.zeros_like(accuracy)
        answer = (counted * 6 ** place.clamp_max(7)).sum(0)
        return Score(torch.stack([accuracy, grade], 1), answer)
