"""Modular arithmetic: ``12+7%100=`` wants ``19``."""

from __future__ import annotations

import torch
from torch import Generator

from envs.text.generated import LONGEST, GeneratedTask, Question, Verdict, at_least, natural, some_of
from envs.text.vocabulary import CharVocabulary

__all__ = ["Arithmetic"]


class Arithmetic(GeneratedTask):
    """A sum, difference or product of whole numbers, modulo ``modulus``.

    ``%`` binds weakest: ``12+7%10`` is (12 + 7) mod 10, which is never negative; ``*`` binds strongest. Leading zeros
    in the answer are no error.

    Args:
        operands: how many numbers.
        digits: each is below ``10**digits``.
        operators: of which each place takes one at random.
        modulus: what the result is reduced by.
        max_new_tokens: longest completion, the end token included; more than the answer needs leaves room to ramble.

    Raises:
        ValueError: an option out of range, too few or too many different questions, a limit shorter than the answers.
    """

    name = "arithmetic"
    mark = ""
    """What stands before and after the number of a demonstration."""

    def __init__(
        self, operands: int = 2, digits: int = 2, operators: str = "+", modulus: int = 100, max_new_tokens: int = 6
    ) -> None:
        # 18 digits are what an answer is read from, and the questions are numbered in 62 bits
        self.operands = at_least("operands", operands, 1, 18)
        self.base = 10 ** at_least("digits", digits, 1, 18)
        self.modulus = at_least("modulus", modulus, 2, 10**18)
        self.operators = some_of("operators", operators, "+-*")
        needed = len(str(modulus - 1)) + 2 * len(self.mark) + 1
        self.max_new_tokens = at_least("max_new_tokens", max_new_tokens, needed, LONGEST)
        self.questions = self.base**operands * len(operators) ** (operands - 1)
        if self.questions >= 2**62:
            raise ValueError(f"expected fewer than 2^62 questions, got {self.questions}; take fewer operands or digits")
        self.vocab = CharVocabulary("0123456789+-*%=" + self.mark)
        self.check()

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        return [self._question(number) for number in torch.randint(self.questions, (n,), generator=generator).tolist()]

    def judge(self, truth: int, text: str) -> Verdict:
        answer = natural(text)
        return Verdict((float(answer == truth),), answer)

    def _question(self, number: int) -> Question:
        rest, operand = divmod(number, self.base)
        text, total, product = str(operand), 0, operand
        for _ in range(self.operands - 1):
            rest, operand = divmod(rest, self.base)
            rest, which = divmod(rest, len(self.operators))
            operator = self.operators[which]
            text += f"{operator}{operand}"
            if operator == "*":
                product *= operand
            else:
                total, product = total + product, operand if operator == "+" else -operand
        truth = (total + product) % self.modulus
        return Question(number, f"{text}%{self.modulus}=", truth, f"{self.mark}{truth}{self.mark}")
