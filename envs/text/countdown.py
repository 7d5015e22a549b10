"""Countdown: ``3,4,7:19=`` wants an expression of these numbers with that value, such as ``3*4+7``."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Generator

from envs.text.generated import GeneratedTask, Question, Verdict, at_least, fingerprint, natural, some_of
from envs.text.vocabulary import CharVocabulary

__all__ = ["Countdown", "evaluate"]

DEEPEST = 50
"""Open brackets beyond which an expression is refused, long before Python's stack ends."""


class Countdown(GeneratedTask):
    """Every number is to be used exactly once; brackets are allowed; there is always an answer.

    Args:
        numbers: how many are given, 2 to 6.
        largest: each is 1 to ``largest``.
        target: the value asked for is 0 to ``target``.
        operators: those that may be used. Division may pass through fractions.

    Raises:
        ValueError: an option out of range.
    """

    name = "countdown"

    def __init__(self, numbers: int = 3, largest: int = 9, target: int = 99, operators: str = "+-*") -> None:
        self.numbers = at_least("numbers", numbers, 2, 6)
        self.largest = at_least("largest", largest, 1)
        self.target = at_least("target", target, 1)
        self.operators = some_of("operators", operators, "+-*/")
        if (target + 1) * (largest + 1) ** numbers >= 2**62:
            raise ValueError(
                f"expected fewer than 2^62 questions, got numbers={numbers}, largest={largest}, target={target}"
            )
        # The digits, the operators between them, a pair of brackets for all but one of the operators, the end.
        self.max_new_tokens = numbers * len(str(largest)) + (numbers - 1) + 2 * (numbers - 2) + 1
        self.vocab = CharVocabulary("0123456789+-*/(),:=")
        self.check()

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        """Random expressions; those whose value cannot be asked for are left out, so there may be fewer than ``n``."""
        numbers = torch.randint(1, self.largest + 1, (n, self.numbers), generator=generator).tolist()
        # Enough bits to choose two of the parts and an operator, at every one of the steps.
        choices = torch.randint(2**30, (n, self.numbers - 1), generator=generator).tolist()
        drawn = (self._question(given, choice) for given, choice in zip(numbers, choices))
        return [question for question in drawn if question is not None]

    def judge(self, truth: tuple[int, tuple[int, ...]], text: str) -> Verdict:
        try:
            value, used, operators = evaluate(text)
        except ValueError:
            return Verdict((0.0,), -1)
        right = (value, tuple(sorted(used))) == truth and operators <= set(self.operators)
        return Verdict((float(right),), fingerprint(text))

    def _question(self, numbers: list[int], choices: list[int]) -> Question | None:
        parts: list[tuple[str, Fraction | int, int]] = [(str(number), number, 2) for number in numbers]
        for choice in choices:
            choice, i = divmod(choice, len(parts))
            left = parts.pop(i)
            choice, j = divmod(choice, len(parts))
            right = parts.pop(j)
            operator = self.operators[choice % len(self.operators)]
            if operator == "/" and right[1] == 0:
                return None
            parts.append(_join(left, operator, right))
        text, value, _ = parts[0]
        if value != int(value) or not 0 <= value <= self.target:
            return None
        target, given = int(value), tuple(sorted(numbers))
        number = target
        for each in given:
            number = number * (self.largest + 1) + each
        return Question(number, f"{','.join(map(str, given))}:{target}=", (target, given), text)


def evaluate(text: str) -> tuple[Fraction | int, list[int], set[str]]:
    """The exact value of an expression, the numbers in it and its operators.

    The grammar: ``sum = product {(+|-) product}``, ``product = atom {(*|/) atom}``, ``atom = digits | "(" sum ")"``.

    Raises:
        ValueError: it does not parse, divides by 0, has a number of more than 18 digits or too many open brackets.
    """
    used: list[int] = []
    operators: set[str] = set()
    position = 0

    def level(lowest: int, depth: int) -> Fraction | int:
        nonlocal position
        value = level(1, depth) if lowest == 0 else atom(depth)
        while position < len(text) and text[position] in ("+-", "*/")[lowest]:
            operator = text[position]
            operators.add(operator)
            position += 1
            value = _apply(value, operator, level(1, depth) if lowest == 0 else atom(depth))
        return value

    def atom(depth: int) -> Fraction | int:
        nonlocal position
        if text[position : position + 1] == "(" and depth < DEEPEST:
            position += 1
            value = level(0, depth + 1)
            if text[position : position + 1] != ")":
                raise ValueError(f"expected a closing bracket at {position} of {text!r}")
            position += 1
            return value
        end = position
        while end < len(text) and "0" <= text[end] <= "9":
            end += 1
        number = natural(text[position:end])
        if number < 0:
            raise ValueError(f"expected a number at {position} of {text!r}")
        position = end
        used.append(number)
        return number

    value = level(0, 0)
    if position < len(text):
        raise ValueError(f"expected an operator at {position} of {text!r}")
    return value, used, operators


def _apply(left: Fraction | int, operator: str, right: Fraction | int) -> Fraction | int:
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if right == 0:
        raise ValueError("division by 0")
    return Fraction(left) / right


def _join(
    left: tuple[str, Fraction | int, int], operator: str, right: tuple[str, Fraction | int, int]
) -> tuple[str, Fraction | int, int]:
    """Text, value and rank (0 sum, 1 product, 2 number) of two parts joined, with no more brackets than needed."""
    rank = "+-*/".index(operator) // 2
    before = f"({left[0]})" if left[2] < rank else left[0]
    after = f"({right[0]})" if right[2] < rank or (right[2] == rank and operator in "-/") else right[0]
    return f"{before}{operator}{after}", _apply(left[1], operator, right[1]), rank
