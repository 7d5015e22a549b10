"""A user's reward functions, in the two forms that are common.

    def reward(prompt, completion, record) -> float            # one completion; or a dict, one number per component
    def reward(completions, prompts, **columns) -> list        # all of a rollout at once, as TRL calls them

    "path/of/a/folder"                                         # a reward model: a classifier with one output

The second form is known by its argument ``completions``. It gets what its signature names: ``prompts``,
``completion_ids`` (lists of tokens) and the fields of the lines by their names (None where a line lacks one). Prompts
and completions of chat messages are lists of messages there, as in TRL.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ccrl import registry
from ccrl.llm.reward_model import ClassifierReward

__all__ = ["Asked", "FolderReward", "Reward", "RewardFunction", "equals_answer", "find_rewards"]

Reward = Callable[..., Any]
"""See the module."""
Asked = tuple[str, dict[str, Any]]
"""Where a question stands (``file:line``) and its record."""


class RewardFunction:
    """One function of a user's.

    Args:
        function: in one of the two forms.
        components: names of what it returns: one name for numbers, several for mappings.
    """

    def __init__(self, function: Reward, components: tuple[str, ...]) -> None:
        self.function, self.components = function, components
        try:
            self._known = dict(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # some built-in functions have none
            self._known = dict[str, inspect.Parameter]()
        self.batched = "completions" in self._known
        """Whether it takes all completions at once."""
        self.silent = False
        """Whether it had nothing to say of any completion of the last call."""

    def __call__(
        self, asked: Sequence[Asked], texts: Sequence[str], tokens: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """A row of components per completion.

        Raises:
            ValueError: another number of rewards than of completions, other components, or a number that is not finite.
            TypeError: a reward is no number.
        """
        if self.batched:
            found = self.function(**self._arguments(asked, texts, tokens))
            if isinstance(found, str | Mapping) or not hasattr(found, "__len__") or len(found) != len(texts):
                got = f"{len(found)}" if hasattr(found, "__len__") else repr(found)
                raise ValueError(f"{_name(self.function)}: expected a list of {len(texts)} rewards, one per "
                                 f"completion, got {got}")  # fmt: skip
            self.silent = all(value is None for value in found)
            # None: the function has nothing to say of this one, as in TRL
            rewards: list[Any] = [0.0 if value is None else value for value in found]
        else:
            rewards = [self.function(record["prompt"], text, record) for (_, record), text in zip(asked, texts)]
        return [
            self._row(reward, f"{where}: the reward of {text!r}")
            for reward, (where, _), text in zip(rewards, asked, texts)
        ]

    def _arguments(
        self, asked: Sequence[Asked], texts: Sequence[str], tokens: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        records = [record for _, record in asked]
        names = dict.fromkeys(name for record in records for name in record if name != "prompt")
        given: dict[str, Any] = {name: [record.get(name) for record in records] for name in names}
        given |= {
            "prompts": [record["prompt"] for record in records],
            "completions": [
                text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]
                for record, text in zip(records, texts)
            ],
            "completion_ids": [list(row) for row in tokens],
        }
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._known.values()):
            return given
        return {name: value for name, value in given.items() if name in self._known}

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


def equals_answer(prompt: object, completion: str, record: dict[str, Any]) -> float:
    """1 for a completion that is the record's answer, but for white space around it."""
    return float(completion.strip() == record["answer"].strip())


class FolderReward:
    """A Hugging Face sequence classifier with one output in a local folder as a reward function of a rollout, which
    judges ``batch`` texts at a time. It reads prompt and completion as one text, chat messages in the chat template of
    its own tokenizer (without one as their contents, one below the other).

    Raises:
        ValueError: several outputs, or no pad token.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", batch: int = 64) -> None:
        self.__name__ = Path(folder).name
        self.model = ClassifierReward.from_folder(folder, None).to(device)
        self.batch = batch

    @torch.no_grad()
    def __call__(self, completions: Sequence[Any], prompts: Sequence[Any]) -> list[float]:
        read = [self._text(*both) for both in zip(prompts, completions)]
        order = sorted(range(len(read)), key=lambda i: len(read[i]))  # texts of a batch are padded to its longest
        found = [0.0] * len(read)
        for start in range(0, len(read), self.batch):
            some = order[start : start + self.batch]
            for i, value in zip(some, self.model.judge([read[i] for i in some]).tolist()):
                found[i] = value
        return found

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + str(completion)
        messages, tokenizer = [*prompt, *completion], self.model.tokenizer
        if getattr(tokenizer, "chat_template", None):
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return "\n".join(message["content"] for message in messages)


def find_rewards(
    reward: Reward | str | Sequence[Reward | str] | None,
    components: Sequence[str] | None,
    device: str = "cpu",
    batch: int = 64,
) -> list[RewardFunction]:
    """The functions that ``reward`` names.

    Args:
        reward: a function, ``"module:function"`` or a reward model's folder, or several, whose rewards are components
            side by side; None compares with the answer.
        device, batch: of reward models.
        components: names of the components; None: ``accuracy``, or the functions' names where there are several.

    Raises:
        ValueError: a name that cannot be found, or components that do not fit.
        TypeError: no function and no name of one.
    """
    if reward is None or isinstance(reward, str) or not isinstance(reward, Sequence):
        names = ("accuracy",) if components is None else checked_names(components)
        return [RewardFunction(equals_answer if reward is None else _find(reward, device, batch), names)]
    functions = [_find(each, device, batch) for each in reward]
    names = checked_names([_name(f) for f in functions] if components is None else components)
    if len(names) != len(functions):
        raise ValueError(f"components: expected one name per reward function, got {names} for {len(functions)}")
    return [RewardFunction(function, (name,)) for function, name in zip(functions, names)]


def checked_names(components: Sequence[str]) -> tuple[str, ...]:
    """``components``, checked."""
    names = () if isinstance(components, str) or not isinstance(components, Sequence) else tuple(components)
    if not names or any(not isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"components: expected a list of at least one name, none of them twice, got {components!r}")
    return names


def _name(function: Reward) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _find(reward: Reward | str, device: str, batch: int) -> Reward:
    if callable(reward):
        return reward
    if isinstance(reward, str) and Path(reward).is_dir():
        return FolderReward(reward, device, batch)
    if not isinstance(reward, str):
        raise TypeError(f"reward: expected a function or 'module:function', got {type(reward).__name__}")
    made: Reward = registry.load_function(reward, "reward", "'module:function' or the folder of a reward model")
    return made
