"""Sorting digits: ``52907=`` wants ``02579``."""

from __future__ import annotations

import torch
from torch import Generator

from envs.text.generated import GeneratedTask, Question, Verdict, at_least, fingerprint
from envs.text.vocabulary import CharVocabulary

__all__ = ["Sorting"]


class Sorting(GeneratedTask):
    """Digits in ascending order.

    Args:
        digits: how many, 2 to 18.

    Raises:
        ValueError: another number of digits.
    """

    name = "sorting"

    def __init__(self, digits: int = 5) -> None:
        self.digits = at_least("digits", digits, 2, 18)
        self.max_new_tokens = digits + 1
        self.vocab = CharVocabulary("0123456789=")
        self.check()

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        numbers = torch.randint(10**self.digits, (n,), generator=generator).tolist()
        return [self._question(number) for number in numbers]

    def judge(self, truth: str, text: str) -> Verdict:
        return Verdict((float(text == truth),), fingerprint(text) if text else -1)

    def _question(self, number: int) -> Question:
        text = str(number).zfill(self.digits)
        ordered = "".join(sorted(text))
        return Question(number, text + "=", ordered, ordered)
