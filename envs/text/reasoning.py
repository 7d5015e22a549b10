"""The generated tasks of reasoning-gym by name, ``reasoning_gym:chain_sum``, judged by their own scorers."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ccrl.llm.task import Vocabulary
from ccrl.packages import require
from envs.text.generated import LONGEST, TEST_SHARE, at_least, fingerprint
from envs.text.listed import ListedTask, checked_vocabulary
from envs.text.rewards import Asked, RewardFunction

__all__ = ["FAMILY", "ReasoningGym"]

FAMILY = "reasoning_gym"
"""What stands before the colon of these tasks' names."""


class ReasoningGym(ListedTask):
    """The first ``questions`` questions of one of reasoning-gym's data sets; a tenth of them, by a hash of their text,
    is the test. The reward is what the data set's scorer says of the completion, or of what stands in its last
    ``<answer>`` element; it is 1 for a right answer, and some scorers give less to what is nearly right.

    Args:
        data_set: its name in reasoning-gym.
        questions: how many.
        task_seed: of the questions.
        vocab: None: that of the model's folder where it has a tokenizer, else the characters of the questions.
        max_new_tokens: longest completion, the end token included. Longer answers are no demonstrations.
        system, chat: see :class:`envs.text.jsonl.JsonLines`.
        difficulty: settings of the data set, such as ``max_terms`` of chain_sum.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: there is no such data set, or it refuses a setting's value.
        TypeError: it has no such setting.
    """

    def __init__(
        self,
        data_set: str,
        questions: int = 500,
        task_seed: int = 0,
        vocab: Vocabulary | None = None,
        max_new_tokens: int = 64,
        system: str = "",
        chat: bool = False,
        **difficulty: Any,
    ) -> None:
        self.name = f"{FAMILY}:{data_set}"
        at_least("max_new_tokens", max_new_tokens, 1, LONGEST)
        at_least("questions", questions, 2, 10**6)
        at_least("task_seed", task_seed, 0)
        if vocab is not None:
            checked_vocabulary(vocab)
        self._data = _make(data_set, {**difficulty, "size": questions, "seed": task_seed})
        records = self._records(questions, max_new_tokens, vocab)
        is_test = [fingerprint(record["prompt"]) % TEST_SHARE == 0 for _, record in records]
        if all(is_test) or not any(is_test):
            raise ValueError(f"{self.name}: expected different questions for training and test, got {len(records)} "
                             "different ones in one of them alone; raise questions")  # fmt: skip
        scorer = RewardFunction(self._judge, ("accuracy",))
        super().__init__(
            records, is_test, [scorer], vocab=vocab, max_new_tokens=max_new_tokens, system=system, chat=chat
        )

    def _records(self, questions: int, cap: int, vocab: Vocabulary | None) -> list[Asked]:
        """Different questions, each with its entry of the data set. A demonstration has at most as many characters as
        a completion has tokens: whatever the vocabulary, it is then short enough."""
        found: dict[str, Asked] = {}
        for i in range(questions):
            entry = self._data[i]
            record: dict[str, Any] = {"prompt": entry["question"], "entry": entry}
            answer = entry.get("answer")
            if isinstance(answer, str) and answer and len(answer.encode()) < cap:
                record["demonstration"] = answer
            found.setdefault(entry["question"], (f"{self.name}[{i}]", record))
        return list(found.values())

    def _judge(self, prompt: object, completion: str, record: dict[str, Any]) -> float:
        _, opened, rest = completion.rpartition("<answer>")
        answer = rest.partition("</answer>")[0] if opened else completion
        return float(self._data.score_answer(answer.strip(), record["entry"]))


def _make(name: str, settings: dict[str, Any]) -> Any:
    factory = require("reasoning_gym.factory", "reasoning")
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, n=3)
        hint = f"did you mean {', '.join(f'{FAMILY}:{each}' for each in near)}? " if near else ""
        raise ValueError(f"reasoning-gym has no data set {name!r}; {hint}expected one of "
                         f"{', '.join(sorted(factory.DATASETS))}")  # fmt: skip
    known = [
        field.name for field in dataclasses.fields(factory.DATASETS[name][1]) if field.name not in ("seed", "size")
    ]
    for setting in settings.keys() - {"seed", "size"}:
        if setting not in known:
            near = difflib.get_close_matches(setting, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TypeError(f"{FAMILY}:{name} has no option {setting!r}; {hint}expected some of questions, task_seed, "
                            f"max_new_tokens, system, chat, {', '.join(known)}")  # fmt: skip
    try:
        return factory.create_dataset(name, **settings)
    except (AssertionError, TypeError, ValueError) as error:  # what its checks and its generators raise
        raise ValueError(f"{FAMILY}:{name}: expected settings that it accepts, got {settings}: {error}") from error
