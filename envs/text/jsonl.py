"""A user's own prompts and a user's own reward."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ccrl import registry
from ccrl.llm.task import Prompts, Score, Split, Vocabulary, pad_left, pad_right
from envs.text.generated import TEST_SHARE, at_least, columns, fingerprint
from envs.text.vocabulary import CharVocabulary

__all__ = ["JsonLines", "Reward"]

Reward = Callable[[str, str, dict[str, Any]], "float | Mapping[str, float]"]
"""``(prompt, completion, record)`` to a number, or to one number per component. ``record`` is the line's object."""
FIELDS = ("prompt", "answer", "demonstration")


class JsonLines:
    """Prompts from a file with one JSON object per line.

    Fields: ``prompt``; ``answer``, what the reward compares with; ``demonstration``, a completion to imitate. The last
    two are optional and any others are left to the reward.

    Args:
        path: of the file.
        reward: a function, or where to find one as ``"module:function"``. ``None`` gives 1 for completions that equal
            ``answer`` but for surrounding white space.
        components: names of what the reward returns, if it returns a mapping. The first is success: 1 is right.
        vocab: a vocabulary; ``HFVocabulary(tokenizer)`` makes one of a tokenizer. ``None`` takes the characters of all
            prompts, answers and demonstrations.
        max_new_tokens: longest completion, the end token included.
        test_path: the test questions. ``None`` takes a tenth of the prompts, by a hash of their text.

    Raises:
        ValueError: an unreadable line, a missing or mistyped field (with file and line), no training question, a
            demonstration that is too long, a reward that cannot be found.
        TypeError: a vocabulary or a reward that is none.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str | Path,
        reward: Reward | str | None = None,
        components: Sequence[str] = ("accuracy",),
        vocab: Vocabulary | None = None,
        max_new_tokens: int = 64,
        test_path: str | Path | None = None,
    ) -> None:
        self.components = tuple(components)
        if not self.components or isinstance(components, str):
            raise ValueError(f"components: expected a list of at least one name, got {components!r}")
        self.max_new_tokens = at_least("max_new_tokens", max_new_tokens, 1)
        self.records = _read(Path(path), reward is None)
        train = len(self.records)
        if test_path is not None:
            self.records += _read(Path(test_path), reward is None)
        self.reward = _equals_answer if reward is None else _find(reward)
        self.vocab = _characters(self.records) if vocab is None else _checked(vocab)
        self._tokens = [self._encode(where, record) for where, record in self.records]
        is_test = [i >= train or (test_path is None and _is_test(r["prompt"])) for i, (_, r) in enumerate(self.records)]
        self._questions = {"train": _where(is_test, False), "test": _where(is_test, True)}
        if not len(self._questions["train"]):
            raise ValueError(f"{path}: expected a training question, got {train} lines, all of them test questions")

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions, drawn independently; ``index`` counts the lines with a record.

        Raises:
            ValueError: there is no such question.
        """
        numbers = self._questions.get(split)
        if numbers is None or not len(numbers):
            raise ValueError(f"no question in the split {split!r}; expected 'train' or 'test', give a test_path for it")
        index = numbers[torch.randint(len(numbers), (n,), generator=generator)]
        prompts, demonstrations = zip(*(self._tokens[i] for i in index.tolist()))
        tokens, valid = pad_left(prompts, self.vocab.pad)
        shown = pad_right(demonstrations, self.vocab.pad) if any(demonstrations) else None
        return Prompts(tokens, valid, index, tuple(self.records[i] for i in index.tolist()), shown)

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """See :class:`ccrl.llm.task.TextTask`.

        Raises:
            ValueError: the reward is not finite or has other components.
            TypeError: the reward is no number.
        """
        rewards, answers = [], []
        for q, completion in zip(question.tolist(), columns(tokens, length)):
            where, record = prompts.truth[q]
            text = self.vocab.decode(completion)
            reward = self.reward(record["prompt"], text, record)
            rewards.append(self._row(reward, f"{where}: the reward of {text!r}"))
            answers.append(fingerprint(text.strip()) if text.strip() else -1)
        return Score(torch.tensor(rewards, device=tokens.device), torch.tensor(answers, device=tokens.device))

    def _row(self, reward: object, what: str) -> list[float]:
        if isinstance(reward, Mapping):
            if set(reward) != set(self.components):
                raise ValueError(f"{what}: expected the components {self.components}, got {tuple(reward)}")
            row = [reward[name] for name in self.components]
        elif len(self.components) == 1:
            row = [reward]
        else:
            raise ValueError(f"{what}: expected a mapping with the components {self.components}, got {reward!r}")
        try:
            numbers = [float(value) for value in row]
        except (TypeError, ValueError):
            raise TypeError(f"{what}: expected a number per component, got {reward!r}") from None
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{what}: expected finite numbers, got {reward!r}")
        return numbers

    def _encode(self, where: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the demonstration with its end token; none without one."""
        vocab = self.vocab
        try:
            prompt = [vocab.bos] * (vocab.bos >= 0) + vocab.encode(record["prompt"])
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


def _read(path: Path, needs_answer: bool) -> list[tuple[str, dict[str, Any]]]:
    """Where each record stands (``file:line``), and the record."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                records.append((where, _record(where, line, needs_answer)))
    if not records:
        raise ValueError(f"{path}: expected one JSON object per line, got an empty file")
    return records


def _record(where: str, line: str, needs_answer: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:80]!r} ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for field in ("prompt", "answer") if needs_answer else ("prompt",):
        if field not in record:
            near = difflib.get_close_matches(field, record, n=1, cutoff=0.5)
            hint = f" (did you mean {field!r} by {near[0]!r}?)" if near else ""
            fix = "; add it or give a reward function" if field == "answer" else ""
            raise ValueError(f"{where}: expected the field {field!r}, got {sorted(record)}{hint}{fix}")
    for field in ("prompt", "demonstration", *(("answer",) if needs_answer else ())):
        if field in record and not isinstance(record[field], str):
            raise ValueError(f"{where}: expected a string as {field!r}, got {record[field]!r}")
    return record


def _find(reward: Reward | str) -> Reward:
    if callable(reward):
        return reward
    if not isinstance(reward, str):
        raise TypeError(f"reward: expected a function or 'module:function', got {type(reward).__name__}")
    try:
        function = registry.load(reward)
    except registry.UntrustedError:
        raise
    except (ValueError, ModuleNotFoundError) as error:
        raise ValueError(f"reward: expected 'module:function', got {reward!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward: expected {reward!r} to be a function, got {type(function).__name__}")
    made: Reward = function
    return made


def _checked(vocab: Vocabulary) -> Vocabulary:
    missing = [m for m in ("size", "pad", "bos", "eos", "encode", "decode") if not hasattr(vocab, m)]
    if missing:
        raise TypeError(
            f"vocab: expected a vocabulary, got {type(vocab).__name__} without {', '.join(missing)}; wrap a Hugging "
            "Face tokenizer in envs.text.vocabulary.HFVocabulary"
        )
    return vocab


def _characters(records: Sequence[tuple[str, dict[str, Any]]]) -> CharVocabulary:
    texts = (record[field] for _, record in records for field in FIELDS if isinstance(record.get(field), str))
    return CharVocabulary(sorted(set("".join(texts))))


def _equals_answer(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return float(completion.strip() == record["answer"].strip())


def _is_test(prompt: str) -> bool:
    return fingerprint(prompt) % TEST_SHARE == 0


def _where(flags: Sequence[bool], value: bool) -> Tensor:
    return torch.tensor([i for i, flag in enumerate(flags) if flag == value], dtype=torch.int64)
