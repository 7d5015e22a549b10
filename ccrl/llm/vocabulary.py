"""What text is to a model: tokens of a vocabulary, which of them end a completion, and how a prompt is written.

One encoding of prompts serves training, evaluation and completion: ``encode_prompt``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ccrl.packages import require

__all__ = [
    "HFVocabulary", "Vocabulary", "encode_prompt", "end_tokens", "folder_ends", "has_tokenizer", "write_messages",
]  # fmt: skip


class Vocabulary(Protocol):
    """Tokens as integers ``0..size-1``. ``ends`` (a tuple of tokens), where it has one, are all tokens that end a
    completion; without it ``eos`` is the only one."""

    size: int
    pad: int
    bos: int
    eos: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str:
        """Text without padding and special tokens."""
        ...


def end_tokens(vocab: Vocabulary) -> tuple[int, ...]:
    """The tokens that end a completion; none of a vocabulary whose ``eos`` is -1."""
    return tuple(token for token in getattr(vocab, "ends", (vocab.eos,)) if token >= 0)


def encode_prompt(vocab: Vocabulary, text: str) -> list[int]:
    """Tokens of a prompt: its text behind the begin token, if the vocabulary has one. A text that begins with it (chat
    templates write it) gets no second one."""
    tokens = vocab.encode(text)
    return tokens if vocab.bos < 0 or tokens[:1] == [vocab.bos] else [vocab.bos, *tokens]


def write_messages(vocab: Vocabulary | None, messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages (``role`` and ``content``) as the text that the assistant goes on from: with the vocabulary's chat
    template, or, of a vocabulary that is no tokenizer, one below the other.

    :raises ValueError: a tokenizer without a template, or one whose template refuses these messages.
    """
    template: Callable[[Sequence[Mapping[str, str]]], str] | None = getattr(vocab, "chat", None)
    if template is None:
        return "\n".join(message["content"] for message in messages) + "\n"
    return template(messages)


class HFVocabulary:
    """A Hugging Face tokenizer with the members of a vocabulary.

    :param tokenizer: anything with ``encode``, ``decode``, ``__len__``, ``eos_token_id``, ``pad_token_id`` and
        ``bos_token_id``. Without a pad token the end token pads, without a begin token none is written.
    :param ends: tokens that end a completion besides the tokenizer's own, such as the end of a chat turn.
    :raises ValueError: the tokenizer has no end token: completions would never end. Or one of ``ends`` is no token.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"expected a tokenizer with an end token, got {type(tokenizer).__name__} with eos_token_id=None; set it"
            )
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.eos = int(tokenizer.eos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.bos = -1 if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        wrong = [token for token in ends if not 0 <= token < self.size]
        if wrong:
            raise ValueError(f"ends: expected tokens from 0 to {self.size - 1}, got {wrong}")
        self.ends = tuple(dict.fromkeys((self.eos, *map(int, ends))))

    @classmethod
    def from_folder(cls, directory: str | Path) -> HFVocabulary:
        """The tokenizer in a model's folder; the end tokens of ``generation_config.json`` end completions too. Nothing
        is downloaded and no code of the folder runs."""
        transformers = require("transformers", "llm")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        ends = [token for token in folder_ends(directory) if token < len(tokenizer)]
        if tokenizer.eos_token_id is None and ends:
            tokenizer.eos_token_id = ends[0]
        return cls(tokenizer, ends)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without special tokens but those that it writes out."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages in the tokenizer's chat template, up to where the assistant's answer begins.

        :raises ValueError: the tokenizer has no template, or its template refuses these messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("expected a tokenizer with a chat template for messages, got one without; set "
                             "tokenizer.chat_template and save it, or write the prompts as texts")  # fmt: skip
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of jinja2, which this project does not import
            raise ValueError(f"the chat template refuses the messages {list(messages)!r}: {error}") from error
        return text

    def with_ends(self, ends: Sequence[int]) -> HFVocabulary:
        """The same with more end tokens."""
        found = copy.copy(self)
        found.ends = tuple(dict.fromkeys((*self.ends, *ends)))
        return found


def folder_ends(directory: str | Path) -> tuple[int, ...]:
    """The end tokens in a model folder's generation settings, which may be several: of the text and of a turn."""
    path = Path(directory) / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    several = found if isinstance(found, list) else [found]
    return tuple(token for token in several if isinstance(token, int) and token >= 0)


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a model's folder has a tokenizer beside the weights."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((Path(directory) / name).is_file() for name in names)
