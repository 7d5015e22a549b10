"""Tasks with a list of questions that stands when the task is built: a file of prompts, a generator's first ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Generator, Tensor

from ccrl.llm.task import Prompts, Score, Split, Vocabulary, pad_demonstrations, pad_left
from ccrl.llm.vocabulary import encode_prompt, write_messages
from envs.text.generated import columns, fingerprint
from envs.text.rewards import Asked, RewardFunction
from envs.text.vocabulary import CharVocabulary

__all__ = ["ListedTask", "checked_vocabulary"]

FIELDS = ("prompt", "answer", "demonstration")


class ListedTask:
    """Questions ``records`` (where each stands, and its fields), judged by functions of a user's.

    Args:
        records: ``prompt``, a text or a list of chat messages; ``demonstration`` where it has one; what rewards read.
        is_test: for each whether it is a test question.
        rewards: their components stand side by side.
        vocab: None: that of the model's folder where it has a tokenizer, else the characters of the records.
        max_new_tokens: longest completion, the end token included.
        system: the first message of all conversations that bring none.
        chat: whether a prompt that is a text is the user's message of a conversation.

    Raises:
        ValueError: a prompt that has no token, or a demonstration that is too long.
    """

    name: str

    def __init__(
        self,
        records: Sequence[Asked],
        is_test: Sequence[bool],
        rewards: Sequence[RewardFunction],
        *,
        vocab: Vocabulary | None,
        max_new_tokens: int,
        system: str = "",
        chat: bool = False,
    ) -> None:
        if not isinstance(system, str):
            raise TypeError(f"system: expected a text, got {system!r}")
        self.records, self.rewards, self.max_new_tokens = list(records), list(rewards), max_new_tokens
        self.components = tuple(name for function in rewards for name in function.components)
        self.system, self.chat = system, chat
        if system and not chat and all(isinstance(record["prompt"], str) for _, record in records):
            raise ValueError("system: expected prompts of chat messages, or chat=True; a system message is not written "
                             "into plain texts")  # fmt: skip
        self._given = vocab is not None
        self.vocab = self._characters() if vocab is None else checked_vocabulary(vocab)
        self._tokens = self._encoded()
        self._questions = {"train": _where(is_test, False), "test": _where(is_test, True)}
        self._shows = {
            split: any("demonstration" in self.records[i][1] for i in numbers.tolist())
            for split, numbers in self._questions.items()
        }

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions, none twice before all came once; ``index`` counts the records."""
        count = self.count(split)
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-n // count))]
        return self.ask(torch.cat(rounds)[:n], split)

    def count(self, split: Split) -> int:
        """See :class:`ccrl.llm.task.FiniteTask`.

        Raises:
            ValueError: there is no such split.
        """
        if split not in self._questions:
            raise ValueError(f"expected the split 'train' or 'test', got {split!r}")
        return len(self._questions[split])

    def ask(self, numbers: Tensor, split: Split) -> Prompts:
        """See :class:`ccrl.llm.task.FiniteTask`."""
        index = self._questions[split][numbers]
        prompts, demonstrations = zip(*(self._tokens[i] for i in index.tolist()))
        tokens, valid = pad_left(prompts, self.vocab.pad)
        # by the split: none of these may have one where others do
        shown, mask = pad_demonstrations(demonstrations, self.vocab.pad) if self._shows[split] else (None, None)
        return Prompts(tokens, valid, index, tuple(self.records[i] for i in index.tolist()), shown, mask)

    def reencoded(self, vocab: Vocabulary) -> Self:
        """The same questions in another vocabulary.

        Raises:
            ValueError: the vocabulary was chosen by whoever made the task; or a demonstration is too long in this one.
        """
        if self._given:
            raise ValueError(
                f"vocab: expected the tokenizer of the model's folder, got {type(self.vocab).__name__}; "
                "leave vocab out to have the folder's"
            )
        found = copy.copy(self)
        found.vocab = vocab
        found._tokens = found._encoded()
        return found

    def longest_prompt(self) -> tuple[int, str]:
        """Tokens of the longest prompt, and where it stands (``file:line``)."""
        lengths = [len(prompt) for prompt, _ in self._tokens]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        return lengths[longest], self.records[longest][0]

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """See :class:`ccrl.llm.task.TextTask`.

        Raises:
            ValueError: the reward is not finite or has other components.
            TypeError: the reward is no number.
        """
        asked = [prompts.truth[q] for q in question.tolist()]
        completions = columns(tokens, length)
        texts = [self.vocab.decode(completion) for completion in completions]
        return self.judged(asked, texts, completions, tokens.device)

    def judged(
        self, asked: Sequence[Asked], texts: Sequence[str], completions: Sequence[Sequence[int]], device: torch.device
    ) -> Score:
        """What the rewards say of ``texts``, and their fingerprints as answers."""
        parts = [function(asked, texts, completions) for function in self.rewards]
        if all(function.silent for function in self.rewards):
            raise ValueError(f"reward: expected a number for at least one of {len(texts)} completions, got None for "
                             "all of them from every function; does one lack its return?")  # fmt: skip
        rows = [[value for part in row for value in part] for row in zip(*parts)]
        answers = [fingerprint(text.strip()) if text.strip() else -1 for text in texts]
        return Score(torch.tensor(rows, device=device), torch.tensor(answers, device=device))

    # -- texts --------------------------------------------------------------------------------------------------------

    def _written(self, vocab: Vocabulary | None, record: Mapping[str, Any]) -> str:
        """A record's prompt as the text that the model reads."""
        prompt = record["prompt"]
        if isinstance(prompt, str) and not self.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        return write_messages(vocab, messages)

    def _characters(self) -> CharVocabulary:
        texts = [record[field] for _, record in self.records for field in FIELDS if isinstance(record.get(field), str)]
        return CharVocabulary(sorted(set("".join([*texts, *(self._written(None, r) for _, r in self.records)]))))

    def _encoded(self) -> list[tuple[list[int], list[int]]]:
        return [self._encode(where, record) for where, record in self.records]

    def _encode(self, where: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the demonstration with its end token; none without one."""
        vocab = self.vocab
        try:
            prompt = encode_prompt(vocab, self._written(vocab, record))
            shown = [*vocab.encode(record["demonstration"]), vocab.eos] if "demonstration" in record else []
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not prompt:
            raise ValueError(f"{where}: expected a prompt of at least one token, got {record['prompt']!r}")
        if len(shown) > self.max_new_tokens:
            raise ValueError(
                f"{where}: expected a demonstration of at most {self.max_new_tokens} tokens, got {len(shown)}; raise "
                "max_new_tokens or shorten it"
            )
        return prompt, shown


def checked_vocabulary(vocab: Vocabulary) -> Vocabulary:
    """``vocab``. :raises TypeError: it lacks members of a vocabulary."""
    missing = [m for m in ("size", "pad", "bos", "eos", "encode", "decode") if not hasattr(vocab, m)]
    if missing:
        raise TypeError(
            f"vocab: expected a vocabulary, got {type(vocab).__name__} without {', '.join(missing)}; wrap a Hugging "
            "Face tokenizer in envs.text.vocabulary.HFVocabulary"
        )
    return vocab


def _where(flags: Sequence[bool], value: bool) -> Tensor:
    return torch.tensor([i for i, flag in enumerate(flags) if flag == value], dtype=torch.int64)
