"""Tasks whose questions are drawn from a numbered set and whose answers are strings."""

from __future__ import annotations

import copy
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ccrl.llm.task import Prompts, Score, Split, Vocabulary, pad_demonstrations, pad_left, pad_right
from ccrl.llm.vocabulary import encode_prompt, end_tokens

__all__ = [
    "LONGEST",
    "GeneratedTask",
    "Question",
    "Verdict",
    "at_least",
    "columns",
    "fingerprint",
    "natural",
    "some_of",
]

LONGEST = 2**20
"""Tokens of a completion, at most: what is asked for is reserved."""
TEST_SHARE = 10
"""One question in this many is a test question."""


class Question(NamedTuple):
    """One question: ``number`` is equal for equal texts only."""

    number: int
    text: str
    truth: Any
    demonstration: str | None


class Verdict(NamedTuple):
    """``components`` of one completion and its final ``answer`` as a number, -1 for none."""

    components: tuple[float, ...]
    answer: int


def fingerprint(text: str) -> int:
    """32 bits that are the same on every machine and in every process, unlike ``hash``."""
    return zlib.crc32(text.encode())


def natural(text: str) -> int:
    """The number that ``text`` writes in digits, leading zeros allowed; -1 if it is none or has more than 18 digits."""
    digits = text.lstrip("0") or text[-1:]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else -1


def columns(tokens: Tensor, length: Tensor) -> list[list[int]]:
    """The completions as lists: ``tokens`` ``[T, N]``, of which the first ``length[n]`` of column ``n`` count."""
    return [column[:end] for column, end in zip(tokens.t().tolist(), length.tolist())]


class GeneratedTask(ABC):
    """A text task with questions made on the fly.

    The questions are split by a hash of their text: the test questions (a tenth) never come up in training. A
    completion that does not end with the end token is unfinished and scores 0.
    """

    name: str
    vocab: Vocabulary
    components: tuple[str, ...] = ("accuracy",)
    max_new_tokens: int
    disjoint: bool = True
    """Whether the splits are; a task that wants the same questions in both says no."""

    @abstractmethod
    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        """``n`` questions of either split."""

    @abstractmethod
    def judge(self, truth: Any, text: str) -> Verdict:
        """What a finished completion is worth."""

    def check(self) -> None:
        """Call it at the end of the constructor.

        Raises:
            ValueError: there are so few questions that one of the splits is empty.
        """
        for split in ("train", "test"):
            self.prompts(1, Generator().manual_seed(0), split)

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions of ``split``, drawn independently of each other."""
        if split not in ("train", "test"):
            raise ValueError(f"expected the split 'train' or 'test', got {split!r}")
        chosen: list[Question] = []
        rounds = 0
        while len(chosen) < n:
            drawn = self.draw(n - len(chosen) if split == "train" else TEST_SHARE * (n - len(chosen)), generator)
            chosen += [q for q in drawn if not self.disjoint or self._is_test(q) == (split == "test")]
            rounds += 1
            if rounds > 1000 and not chosen:
                raise ValueError(f"{self.name} has no question in the split {split!r}; its options leave too few")
        del chosen[n:]
        vocab = self.vocab
        tokens, valid = pad_left([encode_prompt(vocab, q.text) for q in chosen], vocab.pad)
        shown = [[] if q.demonstration is None else [*vocab.encode(q.demonstration), vocab.eos] for q in chosen]
        index = torch.tensor([q.number for q in chosen], dtype=torch.int64)
        demonstration, mask = pad_demonstrations(shown, vocab.pad)
        written = [self.forced(row) for row in shown]
        forced = pad_right(written, 0, mask.shape[1]).float() if any(map(any, written)) else None
        return Prompts(tokens, valid, index, tuple(q.truth for q in chosen), demonstration, mask, forced)

    def forced(self, demonstration: Sequence[int]) -> list[bool]:
        """Which tokens of a demonstration the environment wrote: they are read and not imitated. None, unless a task
        of several turns says otherwise."""
        return [False] * len(demonstration)

    def reencoded(self, vocab: Vocabulary) -> GeneratedTask:
        """The same questions in another vocabulary.

        Raises:
            ValueError: there is a text that cannot be written in it, or an answer that is too long in it.
        """
        found = copy.copy(self)
        found.vocab = vocab
        for question in self.draw(64, Generator().manual_seed(0)):
            for text in (question.text, question.demonstration or ""):
                # a character that a tokenizer does not know becomes its unknown token, without a word
                written = vocab.decode(vocab.encode(text))
                if written.strip() != text.strip():
                    raise ValueError(
                        f"{self.name}: expected a vocabulary that can write {text!r}, got "
                        f"{type(vocab).__name__}, which makes {written!r} of it"
                    )
        shown = found.prompts(64, Generator().manual_seed(0)).demonstration_valid
        longest = 0 if shown is None else int(shown.sum(1).max())
        if longest > self.max_new_tokens:
            raise ValueError(f"{self.name}: expected answers of at most max_new_tokens = {self.max_new_tokens} tokens, "
                             f"got {longest} with {type(vocab).__name__}; raise max_new_tokens")  # fmt: skip
        return found

    @staticmethod
    def _is_test(question: Question) -> bool:
        return fingerprint(question.text) % TEST_SHARE == 0

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """Verify completions; see :class:`ccrl.llm.task.TextTask`."""
        verdicts = self.verdicts([prompts.truth[q] for q in question.tolist()], columns(tokens, length))
        components = torch.tensor([v.components for v in verdicts], device=tokens.device)
        return Score(components, torch.tensor([v.answer for v in verdicts], device=tokens.device))

    def verdicts(self, truths: Sequence[Any], completions: Sequence[Sequence[int]]) -> list[Verdict]:
        """One verdict per completion; a task that judges many of them at once replaces it."""
        decode, judge, ends = self.vocab.decode, self.judge, end_tokens(self.vocab)
        unfinished = Verdict((0.0,) * len(self.components), -1)
        return [
            judge(truth, decode(completion)) if completion and completion[-1] in ends else unfinished
            for truth, completion in zip(truths, completions)
        ]


def at_least(name: str, value: int, least: int, most: int = 2**31 - 1) -> int:
    """``value``, checked.

    Raises:
        ValueError: it is no whole number, below ``least`` or above ``most``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name}: expected a whole number <= {most}, got {value!r}")
    return value


def some_of(name: str, value: str, allowed: str) -> str:
    """``value``, checked: characters out of ``allowed``.

    Raises:
        ValueError: it is no text, an empty one, has other characters or one of them twice.
    """
    if not isinstance(value, str) or not value or set(value) - set(allowed) or len(set(value)) < len(value):
        raise ValueError(f"{name}: expected some of {allowed!r}, each once, got {value!r}")
    return value
