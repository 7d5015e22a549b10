"""Reward models as stages: what they derive, what they must not touch, micro-batches, devices, state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.stages import GroupBaseline
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.reward_model import ClassifierReward, ModelReward, TextReward, texts
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import TextTask
from ccrl.packages import require
from ccrl.testing.recipe_contract import RaggedTask

Build = Callable[..., CausalLMPolicy]


def rollout() -> Data:
    task = RaggedTask()
    policy = TabularTokenPolicy(3, 8, 5, init=task.initial_logits())
    return TokenCollector(task, seed=0).collect(Request(counts=torch.tensor([4, 3, 4])), policy)


class Counts(nn.Module):
    """A reward of 2 per token present; counts how it is called."""

    def __init__(self, per_token: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.per_token, self.widths = per_token, list[int]()

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def forward(self, batch: Data) -> Tensor:
        self.widths.append(batch.shape[1])
        assert not torch.is_grad_enabled()
        # what lies beyond a completion is no business of the stage's reader
        return self.scale.expand(batch.shape) if self.per_token else self.scale * batch["present"].sum(0)


def test_a_column_of_its_own() -> None:
    data = rollout()
    facts = {name: data[name].clone() for name in ("reward", "episode_reward", "reward_components")}
    out = ModelReward(Counts(), "judged", base="episode_reward", weight=0.5)(data)
    torch.testing.assert_close(out["judged"], data["length"].float() + data["episode_reward"])
    assert "judged" in out.sequence
    assert all(torch.equal(out[name], fact) for name, fact in facts.items())
    advantage = GroupBaseline("judged", scale="none")(out)["advantage"]
    other = GroupBaseline("episode_reward", scale="none")(out)["advantage"]
    assert not torch.equal(advantage, other)


def test_rewards_of_tokens() -> None:
    data = rollout()
    out = ModelReward(Counts(per_token=True), "shaped_reward")(data)
    assert torch.equal(out["shaped_reward"], 2.0 * data["present"])
    assert "shaped_reward" not in out.sequence
    added = ModelReward(Counts(per_token=True), "shaped_reward", base="reward")(data)["shaped_reward"]
    assert torch.equal(added, 2.0 * data["present"] + data["reward"])
    with pytest.raises(ValueError, match=r"base: expected a column \[6, 11\], .* got 'episode_reward' \[11\]"):
        ModelReward(Counts(per_token=True), "shaped_reward", base="episode_reward")(data)


@pytest.mark.parametrize("per_token", [False, True])
def test_micro_batches_are_the_whole(per_token: bool) -> None:
    data, model = rollout(), Counts(per_token)
    whole = ModelReward(model, "judged")(data)["judged"]
    pieces = ModelReward(model, "judged", microbatch=4)(data)["judged"]
    assert torch.equal(whole, pieces)
    assert model.widths == [11, 4, 4, 3]


def test_its_state_is_saved() -> None:
    model, other = Counts(), Counts()
    with torch.no_grad():
        model.scale.fill_(7.0)
    ModelReward(other).load_state_dict(ModelReward(model).state_dict())
    assert float(other.scale.detach()) == 7.0


def test_micro_batches_go_to_the_models_device() -> None:
    class Elsewhere(Counts):
        @property
        def device(self) -> torch.device:
            return torch.device("meta")

        def forward(self, batch: Data) -> Tensor:
            assert batch["action"].device.type == "meta"
            assert batch["prompt"].device.type == "meta"
            return torch.zeros(batch.shape[1])

    assert ModelReward(Elsewhere())(rollout())["shaped_episode_reward"].tolist() == [0.0] * 11


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"column": "reward"}, ValueError, "expected a name of its own, got the fact 'reward'"),
        ({"column": "episode_reward"}, ValueError, "got the fact 'episode_reward'"),
        ({"weight": 0.0}, ValueError, "weight: expected a finite number other than 0"),
        ({"weight": float("nan")}, ValueError, "weight: expected a finite number"),
        ({"microbatch": 0}, ValueError, "microbatch: expected None or >= 1, got 0"),
        ({"model": lambda batch: 0}, TypeError, r"expected a torch\.nn\.Module"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelReward(**{"model": Counts()} | options)


def test_bad_rewards() -> None:
    data, vocab = rollout(), RaggedTask.vocab
    with pytest.raises(FloatingPointError, match="TextReward: the reward of completion 2 is not finite"):
        ModelReward(TextReward(lambda p, c: [0.0, 0.0, float("nan")] + [0.0] * 8, vocab))(data)
    with pytest.raises(ValueError, match=r"reward function: expected 11 numbers, got \(1,\)"):
        ModelReward(TextReward(lambda p, c: [0.0], vocab))(data)
    wrong = Counts()
    wrong.forward = lambda batch: torch.zeros(3)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Counts: expected rewards \[11\] of completions or \[6, 11\] of tokens"):
        ModelReward(wrong)(data)


def test_a_function_of_many_texts() -> None:
    data, asked = rollout(), list[tuple[list[str], list[str]]]()

    def lengths(prompts: list[str], completions: list[str]) -> list[float]:
        asked.append((prompts, completions))
        return [float(len(text)) for text in completions]

    out = ModelReward(TextReward(lengths, RaggedTask.vocab), microbatch=6)(data)
    ended = (data["action"] == 4) & (data["present"] > 0)  # the end token is no text
    expected = data["length"] - ended.sum(0)
    assert out["shaped_episode_reward"].tolist() == expected.tolist()
    assert [len(prompts) for prompts, _ in asked] == [6, 5]
    assert [p for prompts, _ in asked for p in prompts] == [str(i) for i in data["index"].tolist()]


@pytest.fixture
def classifier(transformers: Any, task: TextTask) -> Callable[..., ClassifierReward]:
    tokenizers = require("tokenizers", "llm")
    names = {c: i for i, c in enumerate(["<pad>", *"=%+*-0123456789"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")

    def make(labels: int = 1, positions: int = 64, pad: int | None = 0) -> ClassifierReward:
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(
                vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, max_position_embeddings=positions, pad_token_id=pad, num_labels=labels,
            )
        )  # fmt: skip
        return ClassifierReward(model, tokenizer, task.vocab)

    return make


def test_a_classifier_judges_each_text_as_alone(
    build: Build, task: TextTask, classifier: Callable[..., ClassifierReward], tmp_path: Path
) -> None:
    data = TokenCollector(task, seed=1).collect(Request(counts=torch.full((6,), 2)), build("llama"))
    judge = classifier()
    found = ModelReward(judge, microbatch=5)(data)["shaped_episode_reward"]
    prompts, completions = texts(data, task.vocab)
    assert len({len(p + c) for p, c in zip(prompts, completions)}) > 1
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        ids = torch.tensor([judge.tokenizer.encode(prompt + completion)])
        with torch.no_grad():
            alone = judge.model(input_ids=ids).logits[0, 0]
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
    judge.model.save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    again = ClassifierReward.from_folder(tmp_path, task.vocab)
    torch.testing.assert_close(ModelReward(again)(data)["shaped_episode_reward"], found, rtol=1e-4, atol=1e-5)


def test_classifiers_that_do_not_fit(build: Build, task: TextTask, classifier: Callable[..., ClassifierReward]) -> None:
    with pytest.raises(ValueError, match="expected a classifier with one output, the reward, got 2"):
        classifier(labels=2)
    with pytest.raises(ValueError, match="expected one with a pad token"):
        classifier(pad=None)
    data = TokenCollector(task, seed=1).collect(Request(counts=torch.full((6,), 2)), build("llama"))
    with pytest.raises(ValueError, match=r"reward model: expected at least \d+ positions for the longest text, got 4"):
        ModelReward(classifier(positions=4))(data)
