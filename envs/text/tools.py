"""Tool calls: a completion asks for a computation, reads the result and goes on.

    prompt 12*7-90=    the model writes <12*7-90>    the tool -6;    the model -6 and the end token

Results are tokens of the context that nobody chose: present and not valid, so that no loss, ratio or count of chosen
tokens sees them (``ccrl.llm.task.ConversationTask``); in demonstrations too.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor

from ccrl import registry
from ccrl.llm.task import Prompts, Score, Split, Vocabulary, pad_right
from envs.text.generated import LONGEST, GeneratedTask, Question, Verdict, at_least, columns, some_of
from envs.text.jsonl import JsonLines
from envs.text.rewards import Asked, Reward
from envs.text.vocabulary import CharVocabulary

__all__ = ["TOOLS", "Calculator", "Tool", "ToolLines", "calculator"]

Tool = Callable[..., Any]
"""From the text of a call, or the arguments of a JSON one, to a result, whose text the model reads."""
_DIGITS = 30
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip


def calculator(expression: str) -> str:
    """The value of ``+ - * / // %`` and parentheses over decimal numbers, exact, at most 12 digits of a fraction.

    Raises:
        ValueError: something else, or more than 30 digits.
        ZeroDivisionError: as it says.
    """

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            found = Fraction(str(node.value))
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            found = Fraction(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            found = _OPERATORS[type(node.op)](value(node.operand))
        else:
            raise ValueError("expected numbers and + - * / // % ( )")
        if max(abs(found.numerator), found.denominator) >= 10**_DIGITS:
            raise ValueError(f"expected at most {_DIGITS} digits")
        return found

    if len(expression) > 200:
        raise ValueError("expected at most 200 characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("expected an expression") from error
    result = value(tree.body)
    return str(result.numerator) if result.denominator == 1 else f"{float(result):.12g}"


TOOLS: dict[str, Tool] = {"calculator": calculator}
"""Tools by name."""


class Calculator(GeneratedTask):
    """Arithmetic with a calculator: ``<EXPRESSION>`` is a call, which the environment answers with ``RESULT;`` (``?;``
    where there is none, or no call is left). What stands after the last ``;`` is the answer.

    Args:
        operands, digits, operators: of the questions, as in ``arithmetic``; results are not reduced.
        calls: calls that are answered.
        max_new_tokens: longest completion, calls and results included; 0 leaves room for ``calls`` of the whole
            question.

    Raises:
        ValueError: an option out of range, too few or too many different questions, a limit shorter than a
            demonstration.
    """

    name = "calculator"

    def __init__(
        self, operands: int = 3, digits: int = 2, operators: str = "+-*", calls: int = 2, max_new_tokens: int = 0
    ) -> None:
        self.operands = at_least("operands", operands, 2, 6)
        self.base = 10 ** at_least("digits", digits, 1, 3)
        self.operators = some_of("operators", operators, "+-*")
        self.calls = at_least("calls", calls, 1, 100)
        question, result = operands * (digits + 1), operands * digits + 2
        needed = question + 1 + 2 * result + 1
        whole = calls * (question + 1 + result) + result + 1
        self.max_new_tokens = at_least("max_new_tokens", max_new_tokens or whole, needed, LONGEST)
        self.questions = self.base**operands * len(operators) ** (operands - 1)
        if self.questions >= 2**62:
            raise ValueError(f"expected fewer than 2^62 questions, got {self.questions}; take fewer operands or digits")
        self.vocab: Vocabulary = CharVocabulary("0123456789+-*=<>;?")
        (self.turn,) = self.vocab.encode(">")
        self.check()

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        return [self._question(number) for number in torch.randint(self.questions, (n,), generator=generator).tolist()]

    def judge(self, truth: int, text: str) -> Verdict:
        answer = text.rpartition(";")[2]
        right = re.fullmatch(r"-?\d{1,18}", answer) is not None and int(answer) == truth
        return Verdict((float(right),), abs(int(answer)) * 2 + (answer[0] == "-") if right else -1)

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        """See :class:`ccrl.llm.task.ConversationTask`; to be called when the last token is the turn token."""
        tokens = list(tokens)
        expression = self.vocab.decode(tokens[:-1]).rpartition("<")[2]
        try:
            result = calculator(expression) if tokens.count(self.turn) <= self.calls else "?"
        except (ValueError, ZeroDivisionError):
            result = "?"
        return self.vocab.encode(f"{result};")

    def reencoded(self, vocab: Vocabulary) -> GeneratedTask:
        """Raises:
        ValueError: ``>`` is not a single token of ``vocab``, also behind digits.
        """
        if len(end := vocab.encode(">")) != 1 or vocab.encode("<1>") != [*vocab.encode("<1"), *end]:
            raise ValueError("calculator needs a vocabulary with a token for '>', also behind digits; train it with a "
                             "model without a tokenizer, or take the task tools")  # fmt: skip
        found = super().reencoded(vocab)
        assert isinstance(found, Calculator)
        (found.turn,) = end
        return found

    def forced(self, demonstration: Sequence[int]) -> list[bool]:
        """Which tokens of a demonstration the tool wrote: from after a turn token to ``;``."""
        (stop,) = self.vocab.encode(";")
        found, inside = [], False
        for token in demonstration:
            found.append(inside)
            inside = (inside and token != stop) or token == self.turn
        return found

    def _question(self, number: int) -> Question:
        rest, operand = divmod(number, self.base)
        text = str(operand)
        for _ in range(self.operands - 1):
            rest, operand = divmod(rest, self.base)
            rest, which = divmod(rest, len(self.operators))
            text += f"{self.operators[which]}{operand}"
        truth = calculator(text)
        return Question(number, f"{text}=", int(truth), f"<{text}>{truth};{truth}")


class ToolLines(JsonLines):
    """:class:`~envs.text.jsonl.JsonLines` whose completions may call tools:

        <tool_call>12*7</tool_call>                                                        with one tool
        <tool_call>{"name": "calculator", "arguments": {"expression": "12*7"}}</tool_call>

    The environment writes ``<tool_response>84</tool_response>`` behind it, and the model goes on. Rewards judge what
    stands behind the last result; the record has ``transcript`` (all of it) and ``tool_calls`` (how many) for them.

    Args:
        path, reward, ...: see :class:`~envs.text.jsonl.JsonLines`.
        tools: names of :data:`TOOLS`, ``"module:function"``, or functions. What a function raises is read by the model
            as ``error: ...``.
        calls: calls that are answered; later ones get an error.
        call, result: what stands before and after a call, and a result. The end of a call is one token.
        max_result: characters of a result; the rest is cut.

    Raises:
        ValueError: no tool, an unknown one, or the end of a call is no single token; see also ``JsonLines``.
    """

    name = "tools"

    def __init__(
        self,
        path: str | Path,
        reward: Reward | str | Sequence[Reward | str] | None = None,
        tools: Tool | str | Sequence[Tool | str] = "calculator",
        calls: int = 4,
        call: Sequence[str] = ("<tool_call>", "</tool_call>"),
        result: Sequence[str] = ("<tool_response>", "</tool_response>"),
        max_result: int = 256,
        components: Sequence[str] | None = None,
        vocab: Vocabulary | None = None,
        max_new_tokens: int = 64,
        test_path: str | Path | None = None,
        system: str = "",
        chat: bool = False,
        judge_device: str = "cpu",
        judge_batch: int = 64,
    ) -> None:
        several = [tools] if callable(tools) or isinstance(tools, str) else list(tools)
        self.tools = dict(map(_find, several))
        if not self.tools:
            raise ValueError("tools: expected at least one, got none; take the task jsonl")
        self.calls, self.max_result = at_least("calls", calls, 1), at_least("max_result", max_result, 1)
        self.call, self.result = _pair("call", call), _pair("result", result)
        if not self.call[0]:
            raise ValueError(f"call: expected what stands before a call, by which it is found, got {call!r}")
        super().__init__(path, reward, components, vocab, max_new_tokens, test_path, system, chat, judge_device,
                         judge_batch)  # fmt: skip
        self.turn = self._turn()

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        """See :class:`ccrl.llm.task.ConversationTask`; to be called when the last token is the turn token."""
        tokens = list(tokens)
        if tokens.count(self.turn) > self.calls:
            said = f"error: no more than {self.calls} calls"
        else:
            said = self._called(self.vocab.decode(tokens[:-1]).rpartition(self.call[0])[2])
        for mark in (*self.call, *self.result):  # a result that holds a mark would be read as one
            said = said.replace(mark, "")
        return self._written_by_tools(f"{self.result[0]}{said[: self.max_result]}{self.result[1]}")

    def reencoded(self, vocab: Vocabulary) -> Self:
        found = super().reencoded(vocab)
        found.turn = found._turn()
        return found

    def ask(self, numbers: Tensor, split: Split) -> Prompts:
        """See :class:`ccrl.llm.task.FiniteTask`.

        Raises:
            ValueError: the end of a call has several characters, and no tokenizer came.
        """
        if self.turn < 0:
            raise ValueError(f"call: expected one character as the end of a call without a tokenizer, got "
                             f"{self.call[1]!r}; pass call=['<', '>'], result=['', ';'], or a model with a "
                             "tokenizer")  # fmt: skip
        prompts = super().ask(numbers, split)
        if prompts.demonstration is None or prompts.demonstration_valid is None:
            return prompts
        told = [self._results(row[valid > 0].tolist())
                for row, valid in zip(prompts.demonstration, prompts.demonstration_valid)]  # fmt: skip
        if not any(map(any, told)):
            return prompts
        forced = pad_right(told, 0, prompts.demonstration.shape[1]).float()
        return dataclasses.replace(prompts, demonstration_forced=forced)

    def score(self, prompts: Any, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        completions = columns(tokens, length)
        asked: list[Asked] = []
        texts = []
        for q, completion in zip(question.tolist(), completions):
            where, record = prompts.truth[q]
            text = self.vocab.decode(completion)
            asked.append((where, record | {"transcript": text, "tool_calls": completion.count(self.turn)}))
            texts.append(text.rpartition(self.result[1])[2])
        return self.judged(asked, texts, completions, tokens.device)

    def _results(self, demonstration: list[int]) -> list[bool]:
        """Which tokens of a demonstration are results: what stands between their marks right behind a call."""
        first, last = map(self.vocab.encode, self.result)
        found, place = [False] * len(demonstration), 0
        while self.turn in demonstration[place:]:
            place = start = demonstration.index(self.turn, place) + 1
            ends = range(start + len(first) + len(last), len(demonstration) + 1)
            end = next((i for i in ends if demonstration[i - len(last) : i] == last), None)
            if end is not None and demonstration[start : start + len(first)] == first:
                found[start:end] = [True] * (end - start)
                place = end
        return found

    def _called(self, content: str) -> str:
        try:
            arguments: Any = content
            name = next(iter(self.tools))
            if content.lstrip().startswith("{"):
                parsed = json.loads(content)
                name, arguments = parsed["name"], parsed.get("arguments", "")
            elif len(self.tools) > 1:
                raise ValueError(f"expected {{'name': ..., 'arguments': ...}} with a name of {sorted(self.tools)}")
            tool = self.tools[name]
            return str(tool(**arguments) if isinstance(arguments, Mapping) else tool(arguments))
        except Exception as error:  # whatever a model writes, and whatever a tool raises, is something to read
            return f"error: {type(error).__name__}: {error}"

    def _written_by_tools(self, text: str) -> list[int]:
        try:
            return self.vocab.encode(text)
        except ValueError:  # a vocabulary of characters lacks some
            return [token for character in text for token in _tokens(self.vocab, character)]

    def _characters(self) -> CharVocabulary:
        more = "".join((*self.call, *self.result)) + "0123456789+-*/.() "
        return CharVocabulary(sorted({*super()._characters().chars, *more}))

    def _turn(self) -> int:
        tokens = self.vocab.encode(self.call[1])
        if isinstance(self.vocab, CharVocabulary):
            return tokens[0] if len(tokens) == 1 else -1  # a model's tokenizer may follow
        if len(tokens) != 1:
            raise ValueError(f"call: expected an end of a call that is one token, got {self.call[1]!r} of "
                             f"{len(tokens)}; add it to the tokenizer, or choose another end")  # fmt: skip
        return tokens[0]


def _tokens(vocab: Vocabulary, character: str) -> list[int]:
    try:
        return vocab.encode(character)
    except ValueError:
        return []


def _pair(name: str, marks: Sequence[str]) -> tuple[str, str]:
    found = tuple(marks)
    if len(found) != 2 or not all(isinstance(mark, str) for mark in found) or not found[1]:
        raise ValueError(f"{name}: expected what stands before and after, the latter not empty, got {marks!r}")
    return found


def _find(tool: Tool | str) -> tuple[str, Tool]:
    if callable(tool):
        return getattr(tool, "__name__", type(tool).__name__), tool
    if tool in TOOLS:
        return tool, TOOLS[tool]
    found = registry.load_function(tool, "tools", f"some of {', '.join(TOOLS)} or module:function")
    return getattr(found, "__name__", tool), found
