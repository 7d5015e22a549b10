"""A user's own prompts and a user's own reward."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ccrl import registry
from ccrl.llm.task import Prompts, Score, Split, Vocabulary, pad_demonstrations, pad_left
from ccrl.llm.vocabulary import encode_prompt
from envs.text.generated import LONGEST, TEST_SHARE, at_least, columns, fingerprint
from envs.text.vocabulary import CharVocabulary

__all__ = ["JsonLines", "Reward"]

Reward = Callable[[str, str, dict[str, Any]], "float | Mapping[str, float]"]
"""``(prompt, completion, record)`` to a number, or to one number per component. ``record`` is the line's object."""
FIELDS = ("prompt", "answer", "demonstration")


class JsonLines:
    """Prompts from a file with one JSON object per line, asked in epochs: all of them before any comes again.

    Fields: ``prompt``; ``answer``, what the reward compares with; ``demonstration``, a completion to imitate. The last
    two are optional and any others are left to the reward.

    Args:
        path: of the file.
        reward: a function, or where to find one as ``"module:function"``. ``None`` gives 1 for completions that equal
            ``answer`` but for surrounding white space.
        components: names of what the reward returns, if it returns a mapping. The first is success: 1 is right.
        vocab: a vocabulary; ``HFVocabulary(tokenizer)`` makes one of a tokenizer. ``None`` takes that of the model's
            folder where it has a tokenizer, else the characters of all prompts, answers and demonstrations.
        max_new_tokens: longest completion, the end token included.
        test_path: the test questions; the same path again tests on the training questions. ``None`` takes a tenth of
            the prompts, by a hash of their text.

    Raises:
        ValueError: an unreadable line, a missing or mistyped field (with file and line), no training or no test
            question, a demonstration that is too long, a reward that cannot be found.
        TypeError: a path, a vocabulary or a reward that is none.
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
        self.components = _names(components)
        self.max_new_tokens = at_least("max_new_tokens", max_new_tokens, 1, LONGEST)
        self.records = _read("path", path, reward is None)
        train = len(self.records)
        if test_path is not None:
            self.records += _read("test_path", test_path, reward is None)
        self.reward = _equals_answer if reward is None else _find(reward)
        self._given = vocab is not None
        self.vocab = _characters(self.records) if vocab is None else _checked(vocab)
        self._tokens = self._encoded()
        is_test = [i >= train or (test_path is None and _is_test(r["prompt"])) for i, (_, r) in enumerate(self.records)]
        self._questions = {"train": _where(is_test, False), "test": _where(is_test, True)}
        if not len(self._questions["train"]):
            raise ValueError(f"{path}: expected a training question, got {train} lines, all of them test questions")
        if not len(self._questions["test"]):
            raise ValueError(
                f"{path}: expected a test question, got {train} lines, none of which falls into the tenth "
                "that is tested; give a test_path, or this path again to test on the training questions"
            )

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """``n`` questions, none twice before all came once; ``index`` counts the lines with a record."""
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
        shown, mask = pad_demonstrations(demonstrations, self.vocab.pad) if any(demonstrations) else (None, None)
        return Prompts(tokens, valid, index, tuple(self.records[i] for i in index.tolist()), shown, mask)

    def reencoded(self, vocab: Vocabulary) -> JsonLines:
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

    def _encoded(self) -> list[tuple[list[int], list[int]]]:
        return [self._encode(where, record) for where, record in self.records]

    def _encode(self, where: str, record: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the demonstration with its end token; none without one."""
        vocab = self.vocab
        try:
            prompt = encode_prompt(vocab, record["prompt"])
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


def _names(components: Sequence[str]) -> tuple[str, ...]:
    names = () if isinstance(components, str) or not isinstance(components, Sequence) else tuple(components)
    if not names or any(not isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"components: expected a list of at least one name, none of them twice, got {components!r}")
    return names


def _read(option: str, path: str | Path, needs_answer: bool) -> list[tuple[str, dict[str, Any]]]:
    """Where each record stands (``file:line``), and the record."""
    if not isinstance(path, str | Path):
        raise TypeError(f"{option}: expected the path of a JSONL file, got {path!r}")
    if not Path(path).is_file():
        kind = "a folder" if Path(path).is_dir() else "no file"
        raise FileNotFoundError(f"{option}: expected the path of a JSONL file, got {str(path)!r}, which is {kind}")
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: expected text in UTF-8, got the byte {line[error.start]:#04x} in column "
                f"{error.start + 1}; save the file as UTF-8"
            ) from None
        if text.strip():
            records.append((where, _record(where, text, needs_answer)))
    if not records:
        raise ValueError(f"{path}: expected one JSON object per line, got an empty file")
    return records


def _record(where: str, line: str, needs_answer: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
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
        if field in record and not record[field].isascii() and not _is_text(record[field]):
            raise ValueError(f"{where}: expected text as {field!r}, got half a surrogate pair in {record[field]!r}")
    return record


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
