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
from ccrl.llm.vocabulary import Vocabulary

__all__ = [
    "AdaptiveTask",
    "ConversationTask",
    "FiniteTask",
    "Prompts",
    "Score",
    "Split",
    "TextTask",
    "Vocabulary",
    "pad_demonstrations",
    "pad_left",
    "pad_right",
    "resolve_task",
]

Split = Literal["train", "test"]


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
    """``[Q, L]`` int64: one right answer with its end token, right-padded; None where the task has none."""
    demonstration_valid: Tensor | None = None
    """``[Q, L]`` float32, 0 on padding; a row of zeros: no demonstration of that question. The mask alone says so: the
    pad token may be the end token."""
    demonstration_forced: Tensor | None = None
    """``[Q, L]`` float32, 1 on tokens that the environment wrote, which are read and not imitated; None: there are
    none."""

    def __post_init__(self) -> None:
        shown, mask = self.demonstration, self.demonstration_valid
        if (shown is None) != (mask is None) or (shown is not None and mask is not None and shown.shape != mask.shape):
            shape = [None if x is None else tuple(x.shape) for x in (shown, mask)]
            raise ValueError("Prompts: expected demonstration and demonstration_valid of one shape [Q, L], or neither, "
                             f"got {shape[0]} and {shape[1]}; pad_demonstrations makes both")  # fmt: skip

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, questions: Tensor) -> Prompts:
        """Some of the questions, ``questions`` ``[Q']`` int64."""
        columns = (self.demonstration, self.demonstration_valid, self.demonstration_forced)
        shown, mask, forced = (None if x is None else x[questions] for x in columns)
        truth = tuple(self.truth[i] for i in questions.tolist())
        return Prompts(self.tokens[questions], self.valid[questions], self.index[questions], truth, shown, mask, forced)

    def to(self, device: torch.device | str) -> Prompts:
        """The same on ``device``."""
        columns = (self.tokens, self.valid, self.index, self.demonstration, self.demonstration_valid,
                   self.demonstration_forced)  # fmt: skip
        tokens, valid, index, shown, mask, forced = (None if x is None else x.to(device) for x in columns)
        assert tokens is not None
        assert valid is not None
        assert index is not None
        return Prompts(tokens, valid, index, self.truth, shown, mask, forced)


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
    max_new_tokens: int
    """Longest completion, end token (and replies) included."""

    @property
    def vocab(self) -> Vocabulary:
        """The tokens."""
        ...

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the reward's components; the first one is the success of pass@k: 1 is right, less is wrong."""
        ...

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions, decided by the state of ``generator`` (a CPU generator) alone."""
        ...

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """Verify ``N`` completions: ``tokens`` ``[T, N]``, of which the first ``length[n]`` of column ``n`` count (the
        end token included, if it was produced); ``question`` ``[N]`` says which of ``prompts`` each one answers."""
        ...


@runtime_checkable
class FiniteTask(Protocol):
    """A text task with a list of questions. Training then goes through all of them, in a random order, before any comes
    again."""

    def count(self, split: Split) -> int:
        """How many questions the split has."""
        ...

    def ask(self, numbers: Tensor, split: Split) -> Prompts:
        """The questions ``numbers`` ``[Q]`` int64 of the split, each from 0 to ``count(split) - 1``."""
        ...


@runtime_checkable
class ConversationTask(Protocol):
    """A text task that replies: after ``turn`` (a token) the environment writes before the model goes on. ``turn`` may
    be an end token, as in many chat models: whether the episode ends there is then for ``respond`` to say."""

    turn: int

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        """The reply to a column's tokens so far (replies included), to be forced into it; None ends the episode."""
        ...


@runtime_checkable
class AdaptiveTask(Protocol):
    """A text task whose training questions follow what was learned. Its state is saved with the collector that it is
    told of; evaluation moves nothing."""

    def learned(self, index: Tensor, success: Tensor) -> dict[str, float]:
        """Of a training rollout: ``index`` ``[N]`` of the questions, and ``success`` ``[N]``, the first component of
        their completions. Returns what is logged."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def resolve_task(task: Any, /, **options: Any) -> TextTask:
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


def pad_demonstrations(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """``[Q, L]`` tokens and their mask; an empty row is a question without a demonstration."""
    width = max(1, max(map(len, rows)))
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return pad_right(rows, pad, width), mask
