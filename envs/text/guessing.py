"""Guessing a number in several turns: ``9;`` - ``>`` - ``14;`` - ``<`` - ``11;`` and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator

from ccrl.llm.vocabulary import Vocabulary
from envs.text.generated import GeneratedTask, Question, Verdict, at_least, natural
from envs.text.vocabulary import CharVocabulary

__all__ = ["Guessing"]


class Guessing(GeneratedTask):
    """A conversation: a guess ends with ``;`` (the turn token), and the reply says where the secret number is: ``>``
    above the guess, ``<`` below it. The right guess, one that is no number, and the last one allowed end the episode.

    The prompt says how many numbers there are, and not which is meant: questions differ in what only the replies
    tell. Training and test draw from the same secrets, since a policy that never met some of them would learn not to
    guess them. Replies are part of the completion.

    Args:
        numbers: the secret is 0 to ``numbers - 1``.
        turns: guesses allowed. Halving needs the bits of ``numbers``; where it comes too late, a question has no
            demonstration.

    Raises:
        ValueError: an option out of range.
    """

    name = "guessing"
    disjoint = False

    def __init__(self, numbers: int = 20, turns: int = 5) -> None:
        self.numbers = at_least("numbers", numbers, 2, 10**15)
        self.turns = at_least("turns", turns, 1, 1000)
        self.vocab = CharVocabulary("0123456789:;<>")
        (self.turn,) = self.vocab.encode(";")
        self.max_new_tokens = turns * (len(str(numbers - 1)) + 2) + 1

    def draw(self, n: int, generator: Generator | None) -> list[Question]:
        secrets = torch.randint(self.numbers, (n,), generator=generator).tolist()
        return [Question(secret, f"{self.numbers}:", secret, self._halving(secret)) for secret in secrets]

    def respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        """See :class:`ccrl.llm.task.ConversationTask`; to be called when the last token is the turn token."""
        guesses = self._guesses(tokens)
        if not guesses or guesses[-1] in (-1, truth) or len(guesses) >= self.turns:
            return None
        return self.vocab.encode(">" if truth > guesses[-1] else "<")

    def reencoded(self, vocab: Vocabulary) -> GeneratedTask:
        """Replies are told from guesses by their place: one token each.

        Raises:
            ValueError: the turn token or a reply is not a single token of ``vocab``.
        """
        pieces = {text: vocab.encode(text) for text in ";<>"}
        several = {text: tokens for text, tokens in pieces.items() if len(tokens) != 1}
        if (
            several
            or len(set(map(tuple, pieces.values()))) < len(pieces)
            or vocab.encode("1;") != [*vocab.encode("1"), *pieces[";"]]
        ):
            raise ValueError(
                "guessing needs a vocabulary with a token each for ';', '<' and '>', also behind digits; "
                f"got {several or pieces}; train it with a model without a tokenizer"
            )
        found = super().reencoded(vocab)
        assert isinstance(found, Guessing)  # a copy of this one
        found.turn = pieces[";"][0]
        return found

    def forced(self, demonstration: Sequence[int]) -> list[bool]:
        """Which tokens of a demonstration are replies: what stands behind a turn token, if it is not the end."""
        replies = {token for text in "<>" for token in self.vocab.encode(text)}
        before = [-1, *demonstration[:-1]]
        return [last == self.turn and token in replies for last, token in zip(before, demonstration)]

    def judge(self, truth: int, text: str) -> Verdict:
        return self._verdict(truth, self.vocab.encode(text))

    def verdicts(self, truths: Sequence[Any], completions: Sequence[Sequence[int]]) -> list[Verdict]:
        """The right guess ends the episode, so that no end token is asked for."""
        return [self._verdict(truth, completion) for truth, completion in zip(truths, completions)]

    def _verdict(self, truth: int, tokens: Sequence[int]) -> Verdict:
        guesses = self._guesses(tokens)
        return Verdict((float(guesses[-1:] == [truth]),), guesses[-1] if guesses else -1)

    def _guesses(self, tokens: Sequence[int]) -> list[int]:
        """The guesses that were made before the episode ended by count or by one that is no number (-1).

        A right guess is not looked for: none can follow it where the replies come from :meth:`respond`.
        """
        guesses: list[int] = []
        start = 0
        for end, token in enumerate(tokens):
            if token == self.turn:
                guesses.append(natural(self.vocab.decode(tokens[start:end])))
                start = end + 2  # the reply is one token
                if guesses[-1] < 0 or len(guesses) == self.turns:
                    break
        return guesses

    def _halving(self, secret: int) -> str | None:
        low, high, text = 0, self.numbers - 1, ""
        for _ in range(self.turns):
            guess = (low + high) // 2
            if guess == secret:
                return f"{text}{guess};"
            low, high = (guess + 1, high) if secret > guess else (low, guess - 1)
            text += f"{guess};{'>' if secret > guess else '<'}"
        return None
