"""The contract of :class:`ccrl.llm.task.TextTask` as a test class."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ccrl.llm.task import ConversationTask, FiniteTask, Prompts, Split, TextTask
from ccrl.llm.vocabulary import end_tokens

__all__ = ["TextTaskContract"]


class TextTaskContract:
    """What every ``TextTask`` promises, as tests. Subclass it, name the class ``Test...``, define ``make_task``."""

    splits: tuple[Split, ...] = ("train", "test")
    """The splits the task has questions in."""
    disjoint = True
    """Whether no question is in both splits."""
    garbage_scores: float | None = 0.0
    """What a completion of a single pad token scores in every component; ``None`` does not test it."""
    several = True
    """Whether there are enough questions for two draws to differ."""
    prompt_tells = True
    """Whether different questions have different prompts; in a conversation only the replies may tell."""
    n = 12

    def make_task(self) -> TextTask:
        """A new task."""
        raise NotImplementedError

    def test_members(self) -> None:
        task = self.make_task()
        assert isinstance(task, TextTask)
        assert task.name
        assert len(task.components) >= 1
        assert task.max_new_tokens >= 1
        assert -1 <= task.vocab.eos < task.vocab.size
        ends = end_tokens(task.vocab)
        assert (task.vocab.eos in ends) == (task.vocab.eos >= 0)
        assert all(token < task.vocab.size for token in ends)

    def test_prompts_are_left_padded(self) -> None:
        for task, prompts in self._draws():
            q, p = prompts.tokens.shape
            assert q == len(prompts) == len(prompts.truth) == self.n
            assert prompts.tokens.dtype == prompts.index.dtype == torch.int64
            assert prompts.valid.dtype == torch.float32
            assert prompts.valid.shape == (q, p)
            assert prompts.index.shape == (q,)
            assert set(prompts.valid.flatten().tolist()) <= {0.0, 1.0}
            assert (prompts.valid.diff(dim=1) >= 0).all(), "padding to the right of a prompt"
            assert (prompts.valid[:, -1] == 1).all(), "an empty prompt"
            assert (prompts.tokens[prompts.valid == 0] == task.vocab.pad).all()
            assert (prompts.tokens >= 0).all()

    def test_prompts_are_tokens_of_the_vocabulary(self) -> None:
        for task, prompts in self._draws():
            if task.vocab.eos >= 0:  # else a prompt holds the number of a question
                assert (prompts.tokens < task.vocab.size).all()

    def test_generator_decides_the_prompts(self) -> None:
        for split in self.splits:
            first, again, other = (
                self.make_task().prompts(self.n, Generator().manual_seed(seed), split) for seed in (3, 3, 4)
            )
            torch.manual_seed(1)
            assert first.tokens.equal(again.tokens)
            assert first.index.equal(again.index)
            assert first.truth == again.truth
            assert first.index.equal(other.index) != self.several

    def test_generator_moves_on_and_nothing_else_does(self) -> None:
        task, generator, before = self.make_task(), Generator().manual_seed(0), torch.get_rng_state()
        for split in self.splits:
            first, second = task.prompts(self.n, generator, split), task.prompts(self.n, generator, split)
            assert first.index.equal(second.index) != self.several
        assert torch.get_rng_state().equal(before)

    def test_number_of_a_question(self) -> None:
        """Equal numbers are equal prompts, and different prompts have different numbers."""
        prompts = self.make_task().prompts(300, Generator().manual_seed(0), self.splits[0])
        texts = [tuple(row[valid > 0].tolist()) for row, valid in zip(prompts.tokens, prompts.valid)]
        numbers, both = set(prompts.index.tolist()), set(zip(texts, prompts.index.tolist()))
        assert len(numbers) == len(both)
        if self.prompt_tells:
            assert len(set(texts)) == len(both)

    def test_splits_are_disjoint(self) -> None:
        if not self.disjoint:
            return
        task = self.make_task()
        train, test = (set(task.prompts(500, Generator().manual_seed(0), s).index.tolist()) for s in self.splits)
        assert not train & test

    def test_a_list_of_questions(self) -> None:
        """Of a task with one: all numbers are questions, different and of their split, and a draw repeats none before
        it has to."""
        task = self.make_task()
        if not isinstance(task, FiniteTask):
            return
        for split in self.splits:
            count = task.count(split)
            assert count >= 1
            found = task.ask(torch.arange(count), split)
            assert len(set(found.index.tolist())) == len(found) == count
            drawn = task.prompts(count, Generator().manual_seed(0), split)
            assert sorted(drawn.index.tolist()) == sorted(found.index.tolist())

    def test_demonstrations_are_right(self) -> None:
        for task, prompts in self._draws():
            if prompts.demonstration is None:
                continue
            assert prompts.demonstration_valid is not None
            assert (prompts.demonstration_valid.diff(dim=1) <= 0).all(), "padding to the left of a demonstration"
            length = demonstration_length(prompts)
            assert (length <= task.max_new_tokens).all()
            if end_tokens(task.vocab) and not isinstance(task, ConversationTask):
                written = (length > 0).nonzero().flatten()
                last = prompts.demonstration[written, length[written] - 1].tolist()
                assert set(last) <= set(end_tokens(task.vocab)), "a demonstration without its end token"
            shown = (length > 0).nonzero().flatten()
            score = task.score(prompts, shown, prompts.demonstration[shown].t(), length[shown])
            assert (score.components[:, 0] == 1).all()
            assert (score.answer >= 0).all()

    def test_scores(self) -> None:
        for task, prompts in self._draws():
            tokens = torch.randint(task.vocab.size, (task.max_new_tokens, 4 * self.n), generator=Generator())
            length = torch.randint(1, task.max_new_tokens + 1, (4 * self.n,), generator=Generator())
            question = torch.arange(4 * self.n) % self.n
            score = task.score(prompts, question, tokens, length)
            assert score.components.shape == (4 * self.n, len(task.components))
            assert score.components.dtype == torch.float32
            assert score.components.isfinite().all()
            assert score.answer.shape == (4 * self.n,)
            assert score.answer.dtype == torch.int64
            assert (score.answer >= -1).all()
            assert (score.components[:, 0] <= 1).all()

    def test_one_question_and_one_completion_keep_their_axis(self) -> None:
        task = self.make_task()
        for split in self.splits:
            prompts = task.prompts(1, Generator().manual_seed(0), split)
            assert len(prompts) == prompts.tokens.shape[0] == 1
            tokens = torch.randint(task.vocab.size, (1, 1), generator=Generator().manual_seed(0))
            score = task.score(prompts, torch.zeros(1, dtype=torch.int64), tokens, torch.ones(1, dtype=torch.int64))
            assert score.components.shape == (1, len(task.components))
            assert score.answer.shape == (1,)

    def test_scoring_writes_nothing(self) -> None:
        """Completions and prompts are the rollout that is trained on afterwards."""
        for task, prompts in self._draws():
            shown, length = self._completions(task, prompts)
            question = torch.arange(self.n)
            given = (prompts.tokens, prompts.valid, prompts.index, question, shown, length)
            before = [x.clone() for x in given]
            first = task.score(prompts, question, shown, length)
            assert all(x.equal(y) for x, y in zip(given, before))
            again = task.score(prompts, question, shown, length)
            assert first.components.equal(again.components), "the same completions score differently the second time"
            assert first.answer.equal(again.answer)

    def test_garbage_is_wrong(self) -> None:
        for task, prompts in self._draws():
            tokens = torch.full((task.max_new_tokens, self.n), max(task.vocab.pad, 0))
            length = torch.ones(self.n, dtype=torch.int64)
            score = task.score(prompts, torch.arange(self.n), tokens, length)
            if self.garbage_scores is not None:
                assert (score.components == self.garbage_scores).all()

    def test_only_the_length_counts(self) -> None:
        for task, prompts in self._draws():
            shown, length = self._completions(task, prompts)
            other = shown.clone()
            beyond = torch.arange(shown.shape[0])[:, None] >= length
            noise = torch.randint(task.vocab.size, shown.shape, generator=Generator().manual_seed(1))
            other[beyond] = noise[beyond]
            first, second = (task.score(prompts, torch.arange(self.n), t, length) for t in (shown, other))
            assert first.components.equal(second.components)
            assert first.answer.equal(second.answer)

    def test_completions_are_judged_apart(self) -> None:
        """Reversing the order of the completions reverses the scores."""
        for task, prompts in self._draws():
            shown, length = self._completions(task, prompts)
            question = torch.arange(self.n)
            first = task.score(prompts, question, shown, length)
            second = task.score(prompts, question.flip(0), shown.flip(1), length.flip(0))
            assert first.components.equal(second.components.flip(0))

    def test_select(self) -> None:
        for task, prompts in self._draws():
            shown, length = self._completions(task, prompts)
            picked = torch.tensor([4, 1, 1])
            part = task.score(prompts.select(picked), torch.arange(3), shown[:, picked], length[picked])
            assert part.components.equal(task.score(prompts, picked, shown[:, picked], length[picked]).components)

    def _draws(self) -> list[tuple[TextTask, Prompts]]:
        task = self.make_task()
        return [(task, task.prompts(self.n, Generator().manual_seed(7), split)) for split in self.splits]

    def _completions(self, task: TextTask, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """``[T, n]`` demonstrations, random tokens where there are none; every third is cut short."""
        tokens = torch.randint(task.vocab.size, (task.max_new_tokens, self.n), generator=Generator().manual_seed(0))
        length = torch.full((self.n,), task.max_new_tokens)
        if prompts.demonstration is not None:
            known = demonstration_length(prompts)
            tokens[: prompts.demonstration.shape[1], known > 0] = prompts.demonstration.t()[:, known > 0]
            length = torch.where(known > 0, known, length)
        length[::3] -= 1
        return tokens, length.clamp(min=1)


def demonstration_length(prompts: Prompts) -> Tensor:
    """``[Q]`` int64: tokens of each demonstration, its end token included; 0 where there is none."""
    assert prompts.demonstration_valid is not None
    return prompts.demonstration_valid.sum(1).long()
