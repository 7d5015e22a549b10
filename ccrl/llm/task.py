"""What a language-model agent needs of a task: prompts, verifiable scores, demonstrations, replies.

Tasks live outside this package and are looked up in ``ccrl.registry.text_tasks`` when an agent is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from ccrl import registry

__all__ = [
    "ConversationTask",
    "Prompts",
    "Score",
    "Split",
    "TextTask",
    "Vocabulary",
    "pad_left",
    "pad_right",
    "resolve_task",
]

Split = Literal["train", "test"]


class Vocabulary(Protocol):
    """Tokens as integers ``0..size-1``."""

    size: int
    pad: int
    bos: int
    eos: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str:
        """Text without padding and special tokens."""
        ...


@dataclass(frozen=True)
class Prompts:
    """``Q`` questions, left-padded; ``truth`` is what the task's verifier wants and nobody else reads."""

    tokens: Tensor
    """``[Q, P]`` int64."""
    valid: Tensor
    """``[Q, P]`` float32, 0 on padding."""
    index: Tensor
    """``[Q]`` int64: which question it is (its number in a finite set), for statistics per question."""
    truth: tuple[Any, ...]
    demonstration: Tensor | None = None
    """``[Q, L]`` int64: one right answer with its end token, right-padded with the task's pad token; None where the
    task has none. A row of padding alone: none for that question."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, questions: Tensor) -> Prompts:
        """Some of the questions, ``questions`` ``[Q']`` int64."""
        demonstration = None if self.demonstration is None else self.demonstration[questions]
        truth = tuple(self.truth[i] for i in questions.tolist())
        return Prompts(self.tokens[questions], self.valid[questions], self.index[questions], truth, demonstration)


class Score(NamedTuple):
    """What the verifier says of ``N`` completions."""

    components: Tensor
    """``[N, C]`` float32, one column per name in ``TextTask.components``; the reward is their sum."""
    answer: Tensor
    """``[N]`` int64: equal numbers are equal final answers to one question; -1: no answer found."""


@runtime_checkable
class TextTask(Protocol):
    """Questions with verifiable answers."""

    name: str
    vocab: Vocabulary
    components: tuple[str, ...]
    """Names of the reward's components; the first one is the success of pass@k: 1 is right, less is wrong."""
    max_new_tokens: int
    """Longest completion, end token (and replies) included."""

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions, decided by the state of ``generator`` (a CPU generator) alone."""
        ...

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """Verify ``N`` completions: ``tokens`` ``[T, N]``, of which the first ``length[n]`` of column ``n`` count (the
        end token included, if it was produced); ``question`` ``[N]`` says which of ``prompts`` each one answers."""
        ...


@runtime_checkable
class ConversationTask(Protocol):
    """A text task that replies: after ``turn`` (a token) the environment writes before the model goes on."""

    turn: int

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        """The reply to a column's tokens so far (replies included), to be forced into it; None ends the episode."""
        ...


def resolve_task(task: Any, **options: Any) -> TextTask:
    """A task from one (returned as it is) or from a name of ``ccrl.registry.text_tasks``, called with ``options``.

    :raises TypeError: if ``task`` is neither a name nor has the members of the protocol.
    :raises ValueError: an unknown name.
    """
    if isinstance(task, str):
        task = registry.text_tasks.get(task)(**options)
    if not isinstance(task, TextTask):
        missing = [
            m for m in ("name", "vocab", "components", "max_new_tokens", "prompts", "score") if not hasattr(task, m)
        ]
        raise TypeError(f"task: expected a name or a TextTask, got {type(task).__name__} without {missing}")
    return task


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """``[Q, P]`` tokens and their mask: prompts end at the same column, where the completion begins."""
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], dtype=torch.int64)
    valid = torch.tensor([[0.0] * (width - len(r)) + [1.0] * len(r) for r in rows])
    return tokens, valid


def pad_right(rows: Sequence[Sequence[int]], pad: int, width: int | None = None) -> Tensor:
    """``[Q, L]`` int64."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([list(r) + [pad] * (width - len(r)) for r in rows], dtype=torch.int64)
