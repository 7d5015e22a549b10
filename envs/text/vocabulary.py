"""Vocabularies: characters; and ``HFVocabulary``, which is at home in ccrl, for who looks for it here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ccrl.llm.vocabulary import HFVocabulary

__all__ = ["CharVocabulary", "HFVocabulary"]


class CharVocabulary:
    """One token per character, behind the special tokens pad (0), bos (1) and eos (2).

    Args:
        chars: the characters, in the order of their tokens.

    Raises:
        ValueError: no character, or one that comes twice.
    """

    pad, bos, eos = 0, 1, 2

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(chars)
        twice = sorted({c for c in self.chars if self.chars.count(c) > 1})
        if not self.chars or twice or any(len(c) != 1 for c in self.chars):
            raise ValueError(f"expected different single characters, at least one, got {self.chars} (twice: {twice})")
        self.size = 3 + len(self.chars)
        self._token = {c: i for i, c in enumerate(self.chars, start=3)}
        self._text = ("", "", "", *self.chars)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special tokens.

        Raises:
            ValueError: ``text`` has characters that the vocabulary lacks.
        """
        try:
            return [self._token[c] for c in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - self._token.keys()))
            raise ValueError(
                f"expected text of the characters {''.join(self.chars)!r}, got {text!r} with the unknown {unknown!r}"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens left out."""
        text = self._text
        return "".join([text[t] for t in tokens])
