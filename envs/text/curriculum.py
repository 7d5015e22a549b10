"""A task at several levels of difficulty, of which training asks the one that is neither solved nor hopeless."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Generator, Tensor

from ccrl.llm.models import longest_prompt
from ccrl.llm.task import (
    ConversationTask,
    Prompts,
    Score,
    Split,
    TextTask,
    Vocabulary,
    pad_demonstrations,
    pad_left,
    pad_right,
)
from ccrl.packages import require
from ccrl.settings import Count, Natural, Unit, checked
from envs.text.vocabulary import CharVocabulary

__all__ = ["Curriculum"]

FAMILY = "reasoning_gym:"


class Curriculum:
    """Another task's questions, made harder and easier by the share of right completions.

    Training asks questions of the present ``level``, and an ``earlier`` share of lower ones, which are then not
    forgotten. After every ``window`` completions of the present level the share of them whose first component is at
    least 1 decides: at ``raise_at`` and above the next level comes, at ``lower_at`` and below the one before. Test
    questions are of all levels in turn, whatever the present one. The level and the counts since it moved are part of
    checkpoints.

    Args:
        task: name of a text task.
        levels: options of that task at each level, the easiest first; of a task of reasoning-gym also how many levels
            of the package's own curriculum of that data set.
        raise_at, lower_at, window, earlier: see above.
        start: the first level.
        options: of the task, at all levels.

    Raises:
        ValueError: fewer than two levels, levels that differ in what they reward or how they are told, a start or
            bounds that are none; what the task raises.
        TypeError: an option that the task does not have.
    """

    name = "curriculum"

    @checked
    def __init__(
        self,
        task: str,
        levels: Count | Sequence[Mapping[str, Any]],
        raise_at: Unit = 0.7,
        lower_at: Unit = 0.2,
        window: Count = 256,
        earlier: Unit = 0.2,
        start: Natural = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from envs.text import make_task

        if task == self.name:
            raise ValueError("task: expected another one than curriculum, whose levels would have levels")
        several = _own_levels(task, levels) if isinstance(levels, int) else [dict(level) for level in levels]
        if len(several) < 2:
            raise ValueError(f"levels: expected at least two, got {len(several)}")
        if not lower_at < raise_at:
            raise ValueError(f"lower_at: expected less than raise_at {raise_at:g}, got {lower_at:g}")
        if start >= len(several):
            raise ValueError(f"start: expected 0 to {len(several) - 1}, got {start}")
        self.raise_at, self.lower_at, self.window, self.earlier = raise_at, lower_at, window, earlier
        self.level, self.right, self.seen = start, 0, 0
        built = [make_task(task, **{**(options or {}), **level}) for level in several]
        if len({found.components for found in built}) > 1:
            raise ValueError(f"levels: expected the same components at each, got {[t.components for t in built]}")
        if any(hasattr(found, "fixed_length") for found in built):
            raise ValueError(f"task: expected a task of texts, got {task!r}, whose questions are numbers")
        self.components = built[0].components
        self.max_new_tokens = max(found.max_new_tokens for found in built)
        self._take(_in_one_vocabulary(built))

    def _take(self, tasks: list[TextTask]) -> None:
        self.tasks = tasks
        talks = [isinstance(found, ConversationTask) for found in tasks]
        if all(talks):
            turns = {cast(Any, found).turn for found in tasks}
            if len(turns) > 1:
                raise ValueError(f"levels: expected one turn token, got {sorted(turns)}")
            (self.turn,) = turns
            self.respond: Callable[..., Any] = self._respond  # here, not on the class: other tasks must not reply
        elif any(talks):
            raise ValueError("levels: expected all of them to reply, or none")

    @property
    def vocab(self) -> Vocabulary:
        """The tokens of all levels. Another one with the same tokens, such as one with more ends, is all levels'."""
        return self.tasks[0].vocab

    @vocab.setter
    def vocab(self, vocab: Vocabulary) -> None:
        levels: list[Any] = [copy.copy(each) for each in self.tasks]
        for each in levels:
            each.vocab = vocab
        self.tasks = levels

    # -- the task -----------------------------------------------------------------------------------------------------

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        """Training questions of the present level and lower ones, test questions of all levels in turn; ``index`` is
        the level's number times the number of levels, plus the level."""
        count = len(self.tasks)
        if split == "test":
            level = torch.arange(n) % count
        else:
            level = torch.full((n,), self.level)
            if self.level and self.earlier:
                lower = torch.rand(n, generator=generator) < self.earlier
                level = torch.where(lower, torch.randint(self.level, (n,), generator=generator), level)
        parts = {k: self.tasks[k].prompts(int((level == k).sum()), generator, split) for k in level.unique().tolist()}
        return self._merged(level.tolist(), parts)

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        """See :class:`ccrl.llm.task.TextTask`."""
        level = torch.tensor([prompts.truth[q][0] for q in question.tolist()], device=tokens.device)
        truths = tuple(truth for _, truth in prompts.truth)
        inner = dataclasses.replace(prompts, truth=truths)
        components = torch.zeros(len(question), len(self.components), device=tokens.device)
        answer = torch.zeros(len(question), dtype=torch.int64, device=tokens.device)
        for k in level.unique().tolist():
            some = (level == k).nonzero().squeeze(-1)
            found = self.tasks[k].score(inner, question[some], tokens[:, some], length[some])
            components[some], answer[some] = found.components.to(components), found.answer.to(answer)
        return Score(components, answer)

    def longest_prompt(self) -> tuple[int, str]:
        """Tokens of the longest prompt of all levels, as far as they know, and where it stands."""
        return max(longest_prompt(found) for found in self.tasks)

    def reencoded(self, vocab: Any) -> Self:
        """The same questions in another vocabulary, at the present level.

        Raises:
            ValueError: see the task.
        """
        found = copy.copy(self)
        found._take([cast(Any, each).reencoded(vocab) for each in self.tasks])
        return found

    def _respond(self, truth: Any, tokens: Sequence[int]) -> list[int] | None:
        level, inner = truth
        answer: list[int] | None = cast(Any, self.tasks[level]).respond(inner, tokens)
        return answer

    def _merged(self, level: list[int], parts: Mapping[int, Prompts]) -> Prompts:
        """The parts' questions in the order of ``level``, padded anew."""
        taken = dict.fromkeys(parts, 0)
        index, truth, rows = list[int](), list[Any](), list[list[int]]()
        shown, forced = list[list[int]](), list[list[int]]()
        for k in level:
            part, i = parts[k], taken[k]
            taken[k] += 1
            rows.append(part.tokens[i][part.valid[i] > 0].tolist())
            # below 2^62: numbers of questions alone may come near it
            index.append(int(part.index[i]) % (2**62 // len(self.tasks)) * len(self.tasks) + k)
            truth.append((k, part.truth[i]))
            if part.demonstration is None or part.demonstration_valid is None:
                shown.append([])
                forced.append([])
                continue
            here = part.demonstration_valid[i] > 0
            shown.append(part.demonstration[i][here].tolist())
            told = part.demonstration_forced
            forced.append([0] * len(shown[-1]) if told is None else told[i][here].long().tolist())
        tokens, valid = pad_left(rows, self.vocab.pad)
        found = Prompts(tokens, valid, torch.tensor(index), tuple(truth))
        if any(part.demonstration is not None for part in parts.values()):
            demonstration, mask = pad_demonstrations(shown, self.vocab.pad)
            told = pad_right(forced, 0, mask.shape[1]).float() if any(map(any, forced)) else None
            found = dataclasses.replace(
                found, demonstration=demonstration, demonstration_valid=mask, demonstration_forced=told
            )
        return found

    # -- the level ----------------------------------------------------------------------------------------------------

    def learned(self, index: Tensor, success: Tensor) -> dict[str, float]:
        """See :class:`ccrl.llm.task.AdaptiveTask`."""
        mine = (index % len(self.tasks) == self.level).cpu()
        right = int((success.cpu()[mine] >= 1.0).sum())
        self.seen, self.right = self.seen + int(mine.sum()), self.right + right
        said = {"rollout/level": float(self.level)}
        if mine.any():
            said["rollout/level_success"] = right / int(mine.sum())
        if self.seen >= self.window:
            rate = self.right / self.seen
            step = int(rate >= self.raise_at and self.level + 1 < len(self.tasks))
            step -= int(rate <= self.lower_at and self.level > 0)
            self.level, self.right, self.seen = self.level + step, 0, 0
        return said

    def state_dict(self) -> dict[str, Any]:
        """The level and what was counted since it moved."""
        return {"level": self.level, "right": self.right, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.level, self.right, self.seen = int(state["level"]), int(state["right"]), int(state["seen"])


def _own_levels(task: str, count: int) -> list[dict[str, Any]]:
    """The first levels of reasoning-gym's own curriculum of a data set."""
    if not task.startswith(FAMILY):
        raise ValueError(f"levels: expected options for each level of {task!r}, got the number {count}; only tasks of "
                         "reasoning-gym know their levels")  # fmt: skip
    factory = require("reasoning_gym.factory", "reasoning")
    name = task.removeprefix(FAMILY)
    if name not in factory.CURRICULA:
        raise ValueError(f"levels: reasoning-gym has no curriculum for {name!r}; give options for each level")
    curriculum, found = factory.CURRICULA[name](), list[dict[str, Any]]()
    most = max((len(attribute.levels) for attribute in curriculum.attributes.values()), default=0)
    if count > most:
        raise ValueError(f"levels: expected at most the {most} levels of {name!r}, got {count}")
    for level in range(count):
        curriculum.set_global_level(level)
        options = dataclasses.asdict(curriculum.generate_configuration())
        found.append({key: value for key, value in options.items() if key not in ("seed", "size")})
    return found


def _in_one_vocabulary(tasks: list[TextTask]) -> list[TextTask]:
    """The tasks with the characters of all of them, or as they are where they have one vocabulary."""
    first = tasks[0].vocab
    if all(found.vocab is first for found in tasks):
        return tasks
    if not all(isinstance(found.vocab, CharVocabulary) for found in tasks):
        raise ValueError("levels: expected one vocabulary, got several tokenizers")
    characters = [cast(CharVocabulary, found.vocab).chars for found in tasks]
    if len(set(characters)) == 1:
        return tasks
    vocab = CharVocabulary(sorted({character for chars in characters for character in chars}))
    return [cast(TextTask, cast(Any, found).reencoded(vocab)) for found in tasks]
