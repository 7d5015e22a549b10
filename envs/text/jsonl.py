"""A user's own prompts and a user's own reward."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ccrl.llm.task import Vocabulary
from envs.text.generated import LONGEST, TEST_SHARE, at_least, fingerprint
from envs.text.listed import ListedTask, checked_vocabulary
from envs.text.rewards import Reward, find_rewards

__all__ = ["JsonLines", "Reward"]


class JsonLines(ListedTask):
    """Prompts from a file with one JSON object per line, asked in epochs: all of them before any comes again.

    Fields: ``prompt``, a text or a list of chat messages ``{"role": ..., "content": ...}``; ``answer``, what the reward
    compares with; ``demonstration``, a completion to imitate. The last two are optional and any others are left to the
    reward. ``messages`` may stand in the place of ``prompt``; if its last message is the assistant's, that one is the
    demonstration.

    Messages are written with the chat template of the model's tokenizer; without a tokenizer one below the other.

    Args:
        path: of the file.
        reward: a function, or where to find one as ``"module:function"``, or the folder of a reward model, or a list of
            them: see :mod:`envs.text.rewards` for their forms. ``None`` gives 1 for completions that equal ``answer``
            but for surrounding white space.
        components: names of what the reward returns, if it returns a mapping, or of several rewards. The first is
            success: 1 is right. ``None`` is ``accuracy``, or the names of several functions.
        vocab: a vocabulary; ``HFVocabulary(tokenizer)`` makes one of a tokenizer. ``None`` takes that of the model's
            folder where it has a tokenizer, else the characters of all prompts, answers and demonstrations.
        max_new_tokens: longest completion, the end token included.
        test_path: the test questions; the same path again tests on the training questions. ``None`` takes a tenth of
            the prompts, by a hash of their text.
        system: the first message of all conversations that bring none.
        chat: whether a prompt that is a text is the user's message of a conversation.
        judge_device: reward models are there.
        judge_batch: texts that a reward model reads at a time.

    Raises:
        ValueError: an unreadable line, a missing or mistyped field (with file and line), no training or no test
            question, a demonstration that is too long, a reward that cannot be found, messages for a tokenizer without
            a chat template.
        TypeError: a path, a vocabulary or a reward that is none.
    """

    name = "jsonl"

    def __init__(
        self,
        path: str | Path,
        reward: Reward | str | Sequence[Reward | str] | None = None,
        components: Sequence[str] | None = None,
        vocab: Vocabulary | None = None,
        max_new_tokens: int = 64,
        test_path: str | Path | None = None,
        system: str = "",
        chat: bool = False,
        judge_device: str = "cpu",
        judge_batch: int = 64,
    ) -> None:
        at_least("judge_batch", judge_batch, 1)
        at_least("max_new_tokens", max_new_tokens, 1, LONGEST)
        records = _read("path", path, reward is None)
        train = len(records)
        if test_path is not None:
            records += _read("test_path", test_path, reward is None)
        rewards = find_rewards(reward, components, judge_device, judge_batch)
        if vocab is not None:
            checked_vocabulary(vocab)
        is_test = [i >= train or (test_path is None and _is_test(r["prompt"])) for i, (_, r) in enumerate(records)]
        super().__init__(
            records, is_test, rewards, vocab=vocab, max_new_tokens=max_new_tokens, system=system, chat=chat
        )
        if all(is_test):
            raise ValueError(f"{path}: expected a training question, got {train} lines, all of them in the tenth that "
                             "is tested; give a test_path, or this path again to test on the same")  # fmt: skip
        if not any(is_test):
            raise ValueError(
                f"{path}: expected a test question, got {train} lines, none of which falls into the tenth "
                "that is tested; give a test_path, or this path again to test on the training questions"
            )


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
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:80]!r} ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if "messages" in record and "prompt" not in record:
        record = _from_messages(where, record)
    for field in ("prompt", "answer") if needs_answer else ("prompt",):
        if field not in record:
            near = difflib.get_close_matches(field, record, n=1, cutoff=0.5)
            hint = f" (did you mean {field!r} by {near[0]!r}?)" if near else ""
            fix = "; add it or give a reward function" if field == "answer" else ""
            raise ValueError(f"{where}: expected the field {field!r}, got {sorted(record)}{hint}{fix}")
    if isinstance(record["prompt"], list):
        _check_messages(where, "prompt", record["prompt"])
    for field in ("prompt", "demonstration", *(("answer",) if needs_answer else ())):
        if field in record and not isinstance(record[field], str) and not (
            field == "prompt" and isinstance(record[field], list)
        ):  # fmt: skip
            what = "a string or a list of messages" if field == "prompt" else "a string"
            raise ValueError(f"{where}: expected {what} as {field!r}, got {record[field]!r}")
        for text in _texts(record.get(field, "")):
            if not text.isascii() and not _is_text(text):
                raise ValueError(f"{where}: expected text as {field!r}, got half a surrogate pair in {text!r}")
    found: dict[str, Any] = record
    return found


def _from_messages(where: str, record: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's form: the assistant's last message, if it comes last, is what to imitate."""
    messages = record["messages"]
    _check_messages(where, "messages", messages)
    found = {**record, "prompt": messages}
    if messages[-1]["role"] == "assistant":
        found["prompt"] = messages[:-1]
        found.setdefault("demonstration", messages[-1]["content"])
    return found


def _check_messages(where: str, field: str, messages: object) -> None:
    fine = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )  # fmt: skip
    if not fine:
        raise ValueError(f"{where}: expected a list of messages as {field!r}, each with the texts 'role' and "
                         f"'content', got {messages!r}")  # fmt: skip
    if not any(m["role"] != "assistant" for m in messages):  # type: ignore[attr-defined]
        raise ValueError(f"{where}: expected a message to answer in {field!r}, got the assistant's alone")


def _texts(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [m["content"] for m in value]  # type: ignore[attr-defined]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_test(prompt: str | list[Any]) -> bool:
    return fingerprint(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)) % TEST_SHARE == 0
