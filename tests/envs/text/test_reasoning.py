"""reasoning-gym's data sets as text tasks: against a stand-in of the package, and against the package where it is."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.llm.baselines import GRPO
from ccrl.llm.task import TextTask, pad_right
from ccrl.testing.text_contract import TextTaskContract
from envs.text import make_task


@dataclass
class SumConfig:
    max_terms: int = 2
    seed: int | None = None
    size: int = 500


class Sum:
    """With the members of reasoning-gym's procedural data sets that are used here."""

    def __init__(self, config: SumConfig) -> None:
        assert config.max_terms > 0, "max_terms must be positive"
        self.config = config

    def __getitem__(self, i: int) -> dict[str, Any]:
        numbers = random.Random(f"{self.config.seed} {i}").choices(range(10), k=self.config.max_terms)
        return {"question": f"What is {' + '.join(map(str, numbers))}?", "answer": str(sum(numbers)), "metadata": {}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return 1.0 if answer == entry["answer"] else 0.01 if answer else 0.0


class SumCurriculum:
    """With the members of reasoning-gym's curricula that are used here: three levels of one setting."""

    attributes = {"terms": types.SimpleNamespace(levels=[2, 3, 4])}

    def set_global_level(self, level: int) -> None:
        self.level = level

    def generate_configuration(self) -> SumConfig:
        return SumConfig(max_terms=self.attributes["terms"].levels[self.level])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """reasoning-gym with one data set."""
    package, factory = types.ModuleType("reasoning_gym"), types.ModuleType("reasoning_gym.factory")
    factory.DATASETS = {"chain_sum": (Sum, SumConfig)}  # type: ignore[attr-defined]
    factory.create_dataset = lambda name, **settings: Sum(SumConfig(**settings))  # type: ignore[attr-defined]
    factory.CURRICULA = {"chain_sum": SumCurriculum}  # type: ignore[attr-defined]
    package.factory = factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def judged(task: TextTask, texts: list[str]) -> list[float]:
    """Rewards of completions of the first training question."""
    prompts = task.ask(torch.zeros(1, dtype=torch.int64), "train")  # type: ignore[attr-defined]
    rows = [[*task.vocab.encode(text), task.vocab.eos] for text in texts]
    tokens, length = pad_right(rows, task.vocab.pad).t(), torch.tensor([len(row) for row in rows])
    found: list[float] = task.score(prompts, torch.zeros(len(texts), dtype=torch.int64), tokens, length).components[
        :, 0
    ]
    return [round(float(value), 4) for value in found]


@pytest.mark.usefixtures("fake")
class TestContract(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("reasoning_gym:chain_sum", max_terms=3, max_new_tokens=32)


@pytest.mark.usefixtures("fake")
def test_questions_scorer_and_demonstrations() -> None:
    task: Any = make_task("reasoning_gym:chain_sum")
    assert task.name == "reasoning_gym:chain_sum"
    # 100 different questions of two digits at most, each asked once, in one of the splits
    prompts = [record["prompt"] for _, record in task.records]
    assert len(set(prompts)) == len(prompts) == task.count("train") + task.count("test") <= 100
    entry = task.records[int(task.ask(torch.zeros(1, dtype=torch.int64), "train").index[0])][1]["entry"]
    right = entry["answer"]
    # the scorer of the stand-in gives .01 to a wrong answer and 0 to none; a right one is not all of a line of words
    assert judged(task, [right, f" {right} ", f"{right}?", ""]) == [1.0, 1.0, 0.01, 0.0]
    shown = task.ask(torch.zeros(1, dtype=torch.int64), "train")
    assert task.vocab.decode(shown.demonstration[0].tolist()) == right


@pytest.mark.usefixtures("fake")
def test_what_stands_in_an_answer_element_counts() -> None:
    from ccrl.llm.task import Vocabulary
    from envs.text.vocabulary import CharVocabulary

    vocab: Vocabulary = CharVocabulary(map(chr, range(32, 127)))
    task: Any = make_task("reasoning_gym:chain_sum", vocab=vocab)
    right = task.records[int(task.ask(torch.zeros(1, dtype=torch.int64), "train").index[0])][1]["entry"]["answer"]
    texts = [f"so <answer>{right}</answer>.", f"<answer>x</answer> <answer> {right}", f"<answer>x</answer> {right}"]
    assert judged(task, texts) == [1.0, 1.0, 0.01]


@pytest.mark.usefixtures("fake")
def test_errors() -> None:
    with pytest.raises(ValueError, match="no data set 'chain_sums'; did you mean reasoning_gym:chain_sum"):
        make_task("reasoning_gym:chain_sums")
    with pytest.raises(TypeError, match="reasoning_gym:chain_sum has no option 'max_term'; did you mean max_terms"):
        make_task("reasoning_gym:chain_sum", max_term=3)
    with pytest.raises(ValueError, match=r"expected settings that it accepts, got .* max_terms must be positive"):
        make_task("reasoning_gym:chain_sum", max_terms=0)
    with pytest.raises(ValueError, match="questions: expected a whole number >= 2"):
        make_task("reasoning_gym:chain_sum", questions=1)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match="reasoning"):
        make_task("reasoning_gym:chain_sum")


@pytest.mark.usefixtures("fake")
def test_trains_and_a_checkpoint_may_name_it(tmp_path: Path) -> None:
    """The name has a colon and is no module: a file may name it without being trusted."""
    pytest.importorskip("transformers")
    agent = GRPO(
        "reasoning_gym:chain_sum", n_prompts=2, group_size=2, model_layers=1, model_width=16, model_heads=2,
        max_new_tokens=4, env_kwargs={"max_terms": 2}, warm_start_steps=2,
    )  # fmt: skip
    agent.learn(4)
    agent.save(tmp_path / "a.pt")
    again = GRPO.load(tmp_path / "a.pt")
    assert again.task.name == "reasoning_gym:chain_sum"
    assert again.num_timesteps == 4


@pytest.mark.parametrize("name", ["chain_sum", "countdown", "letter_counting", "basic_arithmetic"])
def test_the_package_itself(name: str) -> None:
    """Every demonstration is right by its own scorer."""
    pytest.importorskip("reasoning_gym")
    task: Any = make_task(f"reasoning_gym:{name}", questions=60, max_new_tokens=64)
    prompts = task.prompts(task.count("train"), torch.Generator().manual_seed(0))
    shown, mask = prompts.demonstration, prompts.demonstration_valid
    has = mask.sum(1) > 0
    assert has.any()
    score = task.score(prompts, torch.arange(len(prompts)), shown.t(), mask.sum(1).long())
    assert (score.components[has, 0] == 1.0).all()


def test_difficulty_of_the_package() -> None:
    pytest.importorskip("reasoning_gym")
    task: Any = make_task(
        "reasoning_gym:chain_sum", questions=100, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    assert {record["entry"]["metadata"]["num_terms"] for _, record in task.records} == {2}
    with pytest.raises(ValueError, match="expected settings that it accepts"):
        make_task("reasoning_gym:chain_sum", min_terms=5, max_terms=2)


def test_levels_of_its_own_curriculum(fake: None) -> None:
    task: Any = make_task("curriculum", task="reasoning_gym:chain_sum", levels=3, options={"questions": 40}, start=2,
                          earlier=0.0)  # fmt: skip
    prompts = task.prompts(4, torch.Generator().manual_seed(0))
    assert all(task.vocab.decode(row.tolist()).count("+") == 3 for row in prompts.tokens)
    with pytest.raises(ValueError, match="expected at most the 3 levels"):
        make_task("curriculum", task="reasoning_gym:chain_sum", levels=4)
