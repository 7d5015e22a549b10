"""Token bandits: a question's number, a fixed number of symbols, a reward; small enough for a table of logits.

A prompt is one token, the number of its question. A completion has ``fixed_length`` tokens and no end token
(``vocab.eos`` is -1), so that logits ``[questions, fixed_length, symbols]`` are a policy. Nothing here is text, and
scoring stays on tensors. The rules of a task are drawn from its own ``seed``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ccrl.llm.task import Prompts, Score, Split
from envs.text.generated import at_least

__all__ = ["Arms", "DeadPrompts", "EasyHard", "ModSum", "SequenceMatch", "SumRule", "SymbolVocabulary", "TokenBandit"]


LARGEST_TABLE = 2**24
"""Logits ``[questions, fixed_length, symbols]``: 64 MiB in float32, and as much again for each of Adam's moments."""


class SymbolVocabulary:
    """Symbols ``0..size-1``, written as numbers with spaces between them. No special tokens: all of them are -1."""

    pad = bos = eos = -1

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        """Symbols of ``text``.

        Raises:
            ValueError: it is no list of symbols.
        """
        symbols = [int(word) for word in text.split()]
        if any(not 0 <= symbol < self.size for symbol in symbols):
            raise ValueError(f"expected symbols 0 to {self.size - 1}, got {text!r}")
        return symbols

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, padding left out."""
        return " ".join(str(token) for token in tokens if token >= 0)


class TokenBandit(ABC):
    """A table of questions.

    Training draws questions independently; ``test`` takes all of them once, in random order, before any comes again.

    Args:
        questions: how many, each with a number.
        fixed_length: tokens of every completion.
        symbols: tokens to choose from.

    Raises:
        ValueError: one of them is too small, there are 2^62 completions or more, or the table has more than
            ``LARGEST_TABLE`` logits.
    """

    name: str
    components: tuple[str, ...] = ("accuracy",)
    demonstrations: Tensor | None = None
    """``[questions, fixed_length]`` int64, if the task has them."""

    def __init__(self, questions: int, fixed_length: int, symbols: int) -> None:
        self.questions = at_least("questions", questions, 1)
        self.fixed_length = self.max_new_tokens = at_least("fixed_length", fixed_length, 1, 61)
        self.symbols = at_least("symbols", symbols, 2)
        if symbols**fixed_length >= 2**62:
            raise ValueError(f"expected symbols^fixed_length < 2^62, got {symbols}^{fixed_length}")
        if questions * fixed_length * symbols > LARGEST_TABLE:
            raise ValueError(
                f"expected a table of at most {LARGEST_TABLE} logits, got questions={questions} x "
                f"fixed_length={fixed_length} x symbols={symbols}"
            )
        self.vocab = SymbolVocabulary(symbols)

    @abstractmethod
    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        """``[N]`` float32 of the completions ``tokens`` ``[fixed_length, N]`` to the questions ``[N]``."""

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """See :class:`ccrl.llm.task.TextTask`; ``truth`` is the question's number."""
        if split == "train":
            index = torch.randint(self.questions, (n,), generator=generator)
        elif split == "test":
            rounds = -(-n // self.questions)
            index = torch.cat([torch.randperm(self.questions, generator=generator) for _ in range(rounds)])[:n]
        else:
            raise ValueError(f"expected the split 'train' or 'test', got {split!r}")
        shown = None if self.demonstrations is None else self.demonstrations[index]
        mask = None if shown is None else torch.ones(shown.shape)
        return Prompts(index[:, None], torch.ones(n, 1), index, tuple(index.tolist()), shown, mask)

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """See :class:`ccrl.llm.task.TextTask`. A completion shorter than ``fixed_length`` is worth 0."""
        complete = length >= self.fixed_length
        answer = torch.full_like(length, -1)
        reward = torch.zeros(len(length), device=tokens.device)
        if tokens.shape[0] >= self.fixed_length:
            # Whatever stands beyond the end of a short completion may be no symbol at all, and would be an index below.
            chosen = torch.where(complete, tokens[: self.fixed_length], 0)
            number = prompts.index.to(question.device)[question].to(tokens.device)
            reward = torch.where(complete, self.reward(number, chosen), reward)
            base = self.symbols ** torch.arange(self.fixed_length, device=tokens.device)
            answer = torch.where(complete, (chosen * base[:, None]).sum(0), answer)
        return Score(reward[:, None], answer)


class ModSum(TokenBandit):
    """Reward 1 if the sum of the tokens is the question's number, both modulo ``symbols``. Every prefix leaves all
    answers possible: the credit is the last token's alone."""

    name = "modsum"

    def __init__(self, questions: int = 10, fixed_length: int = 4, symbols: int = 10) -> None:
        super().__init__(questions, fixed_length, symbols)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return ((tokens.sum(0) - question) % self.symbols == 0).float()


class SumRule(TokenBandit):
    """Reward 1 if the sum of the tokens modulo ``symbols`` is in the question's set, whose size is uniform from 1 to
    ``symbols - 1``: random completions succeed with probability size / ``symbols``, so that questions are of every
    difficulty."""

    name = "sum_rule"

    def __init__(self, questions: int = 256, fixed_length: int = 4, symbols: int = 16, seed: int = 0) -> None:
        super().__init__(questions, fixed_length, symbols)
        generator = _seeded(seed)
        size = torch.randint(1, symbols, (questions, 1), generator=generator)
        self.allowed = _random_sets(size, symbols, generator)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return self.allowed.to(tokens.device)[question, tokens.sum(0) % self.symbols].float()


class DeadPrompts(TokenBandit):
    """Questions that exploration does not solve, among others that it does, with a demonstration of each.

    A dead question has a single right completion, so that random ones succeed with probability
    ``symbols**-fixed_length``. Of the others, the first two tokens decide: each has a set of ``smallest`` to
    ``largest`` right symbols, and the demonstration's besides. Source: the bandit of the hybrid post-training study,
    256 questions, 4 tokens of 16, 40% dead.

    Args:
        dead: share of dead questions.
        smallest, largest: of the sets of right symbols.
        seed: of the rules.

    Raises:
        ValueError: an option out of range.
    """

    name = "dead_prompts"

    def __init__(
        self,
        questions: int = 256,
        fixed_length: int = 4,
        symbols: int = 16,
        dead: float = 0.4,
        smallest: int = 4,
        largest: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(questions, at_least("fixed_length", fixed_length, 2), symbols)
        if isinstance(dead, bool) or not isinstance(dead, int | float) or not 0 <= dead <= 1:
            raise ValueError(f"dead: expected a share from 0 to 1, got {dead!r}")
        if not at_least("smallest", smallest, 1) <= at_least("largest", largest, 1) <= symbols:
            raise ValueError(f"expected 1 <= smallest <= largest <= {symbols}, got {smallest} and {largest}")
        generator = _seeded(seed)
        self.dead = torch.zeros(questions, dtype=torch.bool)
        self.dead[torch.randperm(questions, generator=generator)[: round(dead * questions)]] = True
        self.demonstrations = torch.randint(symbols, (questions, fixed_length), generator=generator)
        size = torch.randint(smallest, largest + 1, (questions, 2, 1), generator=generator)
        some = _random_sets(size, symbols, generator)
        shown = torch.nn.functional.one_hot(self.demonstrations, symbols).bool()
        self.allowed = torch.ones(questions, fixed_length, symbols, dtype=torch.bool)
        self.allowed[:, :2] = some | shown[:, :2]
        self.allowed[self.dead] = shown[self.dead]

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        place = torch.arange(self.fixed_length, device=tokens.device)[:, None]
        return self.allowed.to(tokens.device)[question, place, tokens].all(0).float()


class EasyHard(TokenBandit):
    """One token; the odd questions have a single right symbol, the even ones ``easy``."""

    name = "easy_hard"

    def __init__(self, questions: int = 40, symbols: int = 20, easy: int = 10, seed: int = 0) -> None:
        super().__init__(questions, 1, symbols)
        at_least("easy", easy, 1, symbols)
        self.hard = torch.arange(questions) % 2 == 1
        self.allowed = _random_sets(torch.where(self.hard, 1, easy)[:, None], symbols, _seeded(seed))

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return self.allowed.to(tokens.device)[question, tokens[0]].float()


class SequenceMatch(TokenBandit):
    """Reward is the share of tokens that are those of the question's random sequence: graded, unlike the others."""

    name = "sequence_match"

    def __init__(self, questions: int = 1, fixed_length: int = 6, symbols: int = 8, seed: int = 0) -> None:
        super().__init__(questions, fixed_length, symbols)
        generator = _seeded(seed)
        self.targets = torch.randint(symbols, (questions, fixed_length), generator=generator)
        self.demonstrations = self.targets

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return (self.targets.to(tokens.device)[question].t() == tokens).float().mean(0)


class Arms(TokenBandit):
    """One question, one token: arm ``i`` pays ``rewards[i]``, at most 1."""

    name = "arms"

    def __init__(self, rewards: Sequence[float] = (1.0, 0.3, -0.5)) -> None:
        wrong = isinstance(rewards, str) or not isinstance(rewards, Sequence) or len(rewards) < 2
        if wrong or not all(isinstance(r, int | float) and -math.inf < r <= 1 for r in rewards):
            raise ValueError(f"rewards: expected two or more finite numbers up to 1 (success), got {rewards!r}")
        super().__init__(1, 1, len(rewards))
        self.rewards = torch.tensor(rewards, dtype=torch.float32)

    def reward(self, question: Tensor, tokens: Tensor) -> Tensor:
        return self.rewards.to(tokens.device)[tokens[0]]


def _seeded(seed: int) -> Generator:
    return Generator().manual_seed(at_least("seed", seed, 0, 2**63 - 1))


def _random_sets(size: Tensor, symbols: int, generator: Generator) -> Tensor:
    """``[..., symbols]`` bool: uniform subsets of ``size`` ``[..., 1]`` symbols."""
    rank = torch.rand((*size.shape[:-1], symbols), generator=generator).argsort(-1).argsort(-1)
    return rank < size
