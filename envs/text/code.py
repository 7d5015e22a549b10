"""A code task: ``f(x)=3x^2-2x+7;`` wants Python that computes it, such as ``3*x*x-2*x+7``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator

from ccrl.llm.vocabulary import end_tokens
from envs.text.generated import LONGEST, GeneratedTask, Question, Verdict, at_least, fingerprint
from envs.text.sandbox import MISSING, Sandbox
from envs.text.vocabulary import CharVocabulary

__all__ = ["Code"]

INPUTS = (-7, -2, 0, 1, 3, 10)
"""More than a polynomial of degree ``largest degree + 1`` needs to be told from all others."""
LARGEST_DEGREE = len(INPUTS) - 2


class Code(GeneratedTask):
    """A polynomial in the notation of school, to be written as a Python expression in ``x`` or as a program that
    defines ``f``. Right means that it gives the right integer for each of six inputs. Answers run in a
    :class:`envs.text.sandbox.Sandbox`; equal outputs are equal final answers.

    Args:
        degree: of the polynomial at most, up to 4.
        largest: coefficients are ``-largest`` to ``largest``.
        max_new_tokens: longest completion, the end token included.
        cpu_seconds, wall_seconds, memory: limits of the sandbox, per completion.

    Raises:
        ValueError: an option out of range, a limit shorter than the answers.
        RuntimeError: this machine cannot run the sandbox.
    """

    name = "code"

    def __init__(
        self,
        degree: int = 1,
        largest: int = 9,
        max_new_tokens: int = 24,
        cpu_seconds: float = 0.5,
        wall_seconds: float = 5.0,
        memory: int = 2**28,
    ) -> None:
        self.degree = at_least("degree", degree, 0, LARGEST_DEGREE)
        self.largest = at_least("largest", largest, 1)
        self.choices = 2 * largest + 1
        if self.choices ** (degree + 1) >= 2**62:
            raise ValueError(f"expected fewer than 2^62 questions, got degree={degree}, largest={largest}")
        longest = sum(len(f"-{largest}{'*x' * power}") for power in range(degree + 1)) + 1
        self.max_new_tokens = at_least("max_new_tokens", max_new_tokens, longest, LONGEST)
        # All that a program may be written in.
        self.vocab = CharVocabulary("\n" + "".join(map(chr, range(32, 127))))
        self.sandbox = Sandbox(cpu_seconds, wall_seconds, memory)
        self.check()

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        numbers = torch.randint(self.choices ** (self.degree + 1), (n,), generator=generator).tolist()
        return [self._question(number) for number in numbers]

    def judge(self, truth: tuple[int, ...], text: str) -> Verdict:
        return _verdict(truth, self.sandbox.run([(text, INPUTS)])[0])

    def verdicts(self, truths: Sequence[Any], completions: Sequence[Sequence[int]]) -> list[Verdict]:
        """All completions in one start of the sandbox; equal programs run once."""
        ends = end_tokens(self.vocab)
        texts = [self.vocab.decode(c) if len(c) > 1 and c[-1] in ends else None for c in completions]
        different = sorted({text for text in texts if text is not None})
        outputs: dict[str | None, list[Any]] = {None: [MISSING] * len(INPUTS)}
        if different:
            outputs |= zip(different, self.sandbox.run([(text, INPUTS) for text in different]))
        return [_verdict(truth, outputs[text]) for truth, text in zip(truths, texts)]

    def _question(self, number: int) -> Question:
        rest, coefficients = number, []
        for _ in range(self.degree + 1):
            rest, digit = divmod(rest, self.choices)
            coefficients.append(digit - self.largest)
        truth = tuple(sum(c * x**power for power, c in enumerate(coefficients)) for x in INPUTS)
        school = _written(coefficients, ("", "x", *(f"x^{power}" for power in range(2, self.degree + 1))), "")
        python = _written(coefficients, [("*x" * power)[1:] for power in range(self.degree + 1)], "*")
        return Question(number, f"f(x)={school};", truth, python)


def _verdict(truth: tuple[int, ...], outputs: list[Any]) -> Verdict:
    # True is 1 and 3.0 is 3 for Python, and neither is the integer asked for.
    right = all(type(output) is int and output == wanted for output, wanted in zip(outputs, truth))
    found = any(output is not MISSING for output in outputs)
    return Verdict((float(right),), fingerprint(repr(outputs)) if found else -1)


def _written(coefficients: Sequence[int], powers: Sequence[str], times: str) -> str:
    """Terms from the highest power down, without those that are 0 and factors that are 1."""
    text = ""
    for coefficient, power in reversed(list(zip(coefficients, powers))):
        if coefficient:
            factor = str(abs(coefficient)) + times if abs(coefficient) != 1 else ""
            text += ("-" if coefficient < 0 else "+") + (f"{factor}{power}" if power else str(abs(coefficient)))
    return text.removeprefix("+") or "0"
