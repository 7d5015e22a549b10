"""Sampling completions: streams of random numbers, flags, replies, demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ccrl.collect import Request
from ccrl.data import Data, Field
from ccrl.llm import decoding
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts, Score, TextTask
from ccrl.testing.recipe_contract import RaggedTask
from envs.text import make_task

Build = Callable[..., CausalLMPolicy]


def table(task: RaggedTask, seed: int = 0, **options: float) -> TabularTokenPolicy:
    noise = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(seed))
    return TabularTokenPolicy(3, 8, 5, init=task.initial_logits() + noise, **options)


def collect(seed: int, counts: Sequence[int] = (4, 4, 4), **options: Any) -> Data:
    task = RaggedTask()
    data = TokenCollector(task, seed=seed, **options).collect(Request(counts=torch.tensor(counts)), table(task))
    return Data({k: v.clone() for k, v in data.items()}, sequence=data.sequence)  # type: ignore[union-attr]


# -- random numbers -------------------------------------------------------------------------------------------------


def test_a_seed_decides_the_samples() -> None:
    first, again, other = collect(0), collect(0), collect(1)
    assert torch.equal(first["action"], again["action"])
    assert torch.equal(first["log_prob"], again["log_prob"])
    assert first["action"].shape != other["action"].shape or not torch.equal(first["action"], other["action"])


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    collect(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["table", "llama", "gpt2"])
def test_dropping_finished_rows_changes_no_sample(
    monkeypatch: pytest.MonkeyPatch, build: Build, task: TextTask, prompts: Prompts, name: str
) -> None:
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(decoding, "COMPACT", share)
        if name == "table":
            found.append(collect(0))
            continue
        policy = build(name)
        data = TokenCollector(task, seed=1).sample(policy, prompts, torch.arange(len(prompts)).repeat_interleave(3))
        found.append(data)
    kept, dropped = found
    assert len(kept["length"].unique()) > 1
    assert torch.equal(kept["action"], dropped["action"])
    assert torch.equal(kept["present"], dropped["present"])
    torch.testing.assert_close(kept["log_prob"], dropped["log_prob"], rtol=1e-4, atol=1e-5)


def test_a_restored_collector_goes_on() -> None:
    task = RaggedTask()
    policy, request = table(task), Request(counts=torch.tensor([4, 4]))
    first, second = TokenCollector(task, seed=0), TokenCollector(task, seed=9)
    first.collect(request, policy)
    second.load_state_dict(first.state_dict())
    one, two = first.collect(request, policy), second.collect(request, policy)
    assert torch.equal(one["action"], two["action"])
    assert first.total_steps == second.total_steps == 16
    assert first.tokens == second.tokens


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(temperature: float) -> None:
    task = RaggedTask()
    policy = table(task, temperature=temperature)
    n = 20_000
    prompts = task.prompts(1, None)
    data = TokenCollector(task, seed=0).sample(policy, prompts, torch.zeros(n, dtype=torch.int64))
    for t in (0, 1):
        expected = (policy.logits[0, t] / temperature).softmax(-1).detach()
        reached = data["present"][t] > 0
        counts = torch.bincount(data["action"][t, reached], minlength=5).float()
        error = (expected * (1 - expected) / counts.sum()).sqrt()
        assert ((counts / counts.sum() - expected).abs() < 4.5 * error + 1e-6).all()


def test_most_probable_tokens() -> None:
    task = RaggedTask()
    policy = table(task)
    prompts = task.prompts(3, None)
    question = torch.arange(3)
    data = TokenCollector(task, seed=0).sample(policy, prompts, question, deterministic=True)
    best = policy.logits.argmax(-1)
    for n in range(3):
        length = int(data["length"][n])
        assert torch.equal(data["action"][:length, n], best[n, :length])
    found = TokenCollector(task, seed=5).complete(policy, prompts, deterministic=True)
    assert found == [data["action"][: int(data["length"][n]), n].tolist() for n in range(3)]


# -- columns --------------------------------------------------------------------------------------------------------


def test_ragged_counts() -> None:
    data = collect(0, counts=(1, 4, 2))
    assert data["group"].tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert data["prompt"].flatten().tolist() == data["index"].tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_facts_of_a_rollout() -> None:
    task = RaggedTask()
    data = collect(0, fields=(Field("entropy"), Field("sum_pi2")))
    policy, eos = table(task), task.vocab.eos
    steps = torch.arange(data.shape[0])[:, None]
    assert torch.equal(data["present"] > 0, steps < data["length"])
    assert torch.equal(data["valid"], data["present"])
    ends = (steps == data["length"] - 1) & (data["present"] > 0)
    assert torch.equal(data["terminated"], ends)
    assert (data["action"][ends] == eos).all()
    assert (data["action"][(data["present"] > 0) & ~ends] != eos).all()
    assert torch.equal(data["carry"] > 0, (data["present"] > 0) & ~ends)
    torch.testing.assert_close(data["reward"].sum(0), data["episode_reward"])
    assert (data["reward"][~ends] == 0).all()
    torch.testing.assert_close(data["reward_components"].sum(1), data["episode_reward"])
    assert not data["capped"].any()
    assert not data["demonstration"].any()
    out = policy(data, frozenset({"log_prob", "entropy", "sum_pi2"}))
    for name, value in out.items():
        torch.testing.assert_close(data[name], torch.where(data["valid"] > 0, value, 0.0).detach())


def test_the_length_cap(build: Build, task: TextTask, prompts: Prompts) -> None:
    policy = build("llama")
    data = TokenCollector(task, seed=1, max_new_tokens=3).sample(policy, prompts, torch.arange(8).repeat_interleave(32))
    assert data.shape[0] == 3
    ended = (data["action"] == task.vocab.eos).any(0)
    assert ended.any()
    assert not ended.all()
    assert torch.equal(data["capped"], ~ended)
    assert torch.equal(data["truncated"].any(0), ~ended)
    assert torch.equal(data["terminated"].any(0), ended)
    assert TokenCollector(task).steps == task.max_new_tokens
    with pytest.raises(ValueError, match=r"max_new_tokens: expected 1 to \d+, the longest completion .*, got 100"):
        TokenCollector(task, max_new_tokens=100)
    with pytest.raises(ValueError, match=r"all completions of task 'modsum' have \d+ tokens, got a cap of 2"):
        TokenCollector(make_task("modsum"), max_new_tokens=2)


def test_tasks_of_fixed_length_end_at_the_last_position() -> None:
    """There is nothing to cut: the last token is an end, not a truncation."""
    task = RaggedTask()
    logits = task.initial_logits()
    logits[..., task.vocab.eos] = -40.0
    policy = TabularTokenPolicy(3, 8, 5, init=logits)
    data = TokenCollector(task, seed=0).collect(Request(counts=torch.tensor([2, 2])), policy)
    assert data["length"].tolist() == [8] * 4
    assert data["terminated"].any(0).all()
    assert not data["truncated"].any()
    assert not data["capped"].any()


def test_nothing_is_left_of_the_rollout_before() -> None:
    """The buffer of a tag is used again: what is not valid is 0 there."""
    task = RaggedTask()
    collector, request = TokenCollector(task, seed=0, fields=(Field("entropy"),)), Request(counts=torch.tensor([4, 4]))
    long, short = task.initial_logits(), task.initial_logits()
    long[:, :5, task.vocab.eos], short[:, 1:, task.vocab.eos] = -40.0, 40.0
    assert collector.collect(request, TabularTokenPolicy(3, 8, 5, init=long))["length"].tolist() == [6] * 8
    noise = 4.0 * torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))
    data = collector.collect(request, TabularTokenPolicy(3, 8, 5, init=task.initial_logits() + noise))
    assert len(data["length"].unique()) > 1
    for name in ("log_prob", "entropy"):
        assert not data[name][data["valid"] == 0].any()
    shown = collector.collect(replace(request, demonstrations=True), table(task))
    assert shown["demonstration"].all()
    for name in ("log_prob", "entropy"):
        assert not shown[name].any()


def test_test_questions_are_of_the_test_split() -> None:
    class Split(RaggedTask):
        def prompts(self, n: int, generator: Any, split: Any = "train") -> Prompts:
            asked.append(split)
            return super().prompts(n, generator, split)

    asked: list[str] = []
    task = Split()
    collector = TokenCollector(task, seed=0)
    collector.test_prompts(3, 0)
    collector.collect(Request(counts=torch.tensor([2])), table(task))
    assert asked == ["test", "train"]


def test_buckets() -> None:
    data = collect(0, pad_to_multiple_of=4)
    assert data.shape[0] == 8
    assert data["length"].max() <= 6
    assert not data["valid"][int(data["length"].max()) :].any()


def test_prompts_of_another_rollout() -> None:
    task = RaggedTask()
    collector, policy = TokenCollector(task, seed=0), table(task)
    collector.collect(Request(counts=torch.tensor([2, 2])), policy)
    again = collector.collect(Request(tag="again", counts=torch.tensor([1, 3]), source="on"), policy)
    assert collector.prompts["again"] is collector.prompts["on"]
    assert again["group"].tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"request 'x': expected counts \[2\], one per prompt, got \(1,\)"):
        collector.collect(Request(tag="x", counts=torch.tensor([1]), source="on"), policy)


def test_demonstrations() -> None:
    task = RaggedTask()
    collector = TokenCollector(task, seed=0)
    data = collector.collect(Request(counts=torch.ones(3, dtype=torch.int64), demonstrations=True), table(task))
    assert data.shape == (3, 3)
    assert data["action"].t().tolist() == [[0, 1, 4], [1, 2, 4], [2, 3, 4]]
    assert data["valid"].all()
    assert data["terminated"].t().tolist() == [[False, False, True]] * 3
    assert data["demonstration"].tolist() == [1.0, 1.0, 1.0]
    assert data["reward_components"][:, 0].tolist() == [1.0, 1.0, 1.0]
    assert not data["log_prob"].any()
    assert collector.total_steps == 0


def test_a_question_without_demonstration_is_an_empty_column() -> None:
    task = RaggedTask()
    ask = task.prompts

    def partly(n: int, generator: Any, split: Any = "train") -> Prompts:
        found = ask(n, generator, split)
        assert found.demonstration_valid is not None
        found.demonstration_valid[1] = 0.0
        return found

    task.prompts = partly  # type: ignore[method-assign]
    request = Request(counts=torch.ones(3, dtype=torch.int64), demonstrations=True)
    data = TokenCollector(task, seed=0).collect(request, table(task))
    assert data["valid"].sum(0).tolist() == [3, 0, 3]
    assert data["length"].tolist() == [3, 0, 3]
    assert data["reward"][:, 1].tolist() == [0, 0, 0]
    assert not data["terminated"][:, 1].any()


def test_end_token_that_pads(build: Build, task: TextTask) -> None:
    """A tokenizer without a pad token pads with its end token: a demonstration still ends with one."""
    vocab = task.vocab
    vocab.pad = vocab.eos
    request = Request(counts=torch.ones(6, dtype=torch.int64), demonstrations=True)
    data = TokenCollector(task, seed=0).collect(request, build("llama"))
    assert data["length"].unique().tolist() == [2, 3]
    assert data["reward_components"].flatten().tolist() == [1.0] * 6


def test_a_demonstration_longer_than_the_cap_is_cut_not_ended() -> None:
    task = RaggedTask()
    prompts = task.prompts(3, None)
    collector = TokenCollector(task, seed=0)
    collector.steps = 2
    data = collector.score(collector.demonstrate(prompts, torch.arange(3)))
    assert data["length"].tolist() == [2, 2, 2]
    assert data["capped"].all()
    assert not data["terminated"].any()


@pytest.mark.parametrize("ends", [(4,), (4, 3), (4, 3, 2)])
def test_every_end_token_ends(ends: tuple[int, ...]) -> None:
    class Ends(RaggedTask):
        vocab = SimpleNamespace(size=5, pad=-1, bos=-1, eos=4, ends=ends)  # type: ignore[assignment]

    task = Ends()
    data = TokenCollector(task, seed=0).sample(
        table(task), task.prompts(3, None), torch.arange(3).repeat_interleave(40)
    )
    for column, length in zip(data["action"].t().tolist(), data["length"].tolist()):
        assert column[length - 1] in ends
        assert not set(column[: length - 1]) & set(ends)


# -- the four verbs -------------------------------------------------------------------------------------------------


def test_the_verbs_make_a_rollout() -> None:
    task = RaggedTask()
    verbs, whole = TokenCollector(task, seed=0), TokenCollector(task, seed=0)
    drawn = verbs.draw(2)
    prompts, question = verbs.plan(Request(counts=torch.tensor([1, 3])))
    assert prompts is drawn
    assert question.tolist() == [0, 1, 1, 1]
    written = verbs.generate(table(task), prompts, question)
    assert written.buffer.reward.abs().sum() == 0  # nothing is verified yet
    data, expected = verbs.score(written), whole.collect(Request(counts=torch.tensor([1, 3])), table(task))
    assert data.keys() == expected.keys()
    for name in expected:
        assert torch.equal(data[name], expected[name]), name


class Numbered(RaggedTask):
    """Prompts say how many were drawn before them."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0

    def prompts(self, n: int, generator: Any, split: Any = "train") -> Prompts:
        found = super().prompts(n, generator, split)
        index = torch.arange(self.drawn, self.drawn + n)
        self.drawn += n
        return replace(found, index=index)


def test_who_asks_gets_the_drawn_prompts_first_and_then_more() -> None:
    """A budget sees the prompts, a probe takes some of them, a refill new ones of the same source."""
    task = Numbered()
    collector, policy = TokenCollector(task, seed=0), table(task)
    drawn = collector.draw(3)
    assert collector.collect(Request(counts=torch.tensor([1, 0, 2])), policy)["index"].tolist() == [0, 2, 2]
    probe = Request(tag="probe", prompts=drawn.select(torch.tensor([2])), counts=torch.tensor([2]))
    assert collector.collect(probe, policy)["index"].tolist() == [2, 2]
    assert collector.collect(Request(tag="refill", counts=torch.tensor([1, 1])), policy)["index"].tolist() == [3, 4]
    collector.draw(3)
    named = Request(prompts=drawn, counts=torch.tensor([1, 1, 1]))
    assert collector.collect(named, policy)["index"].tolist() == [0, 1, 2]
    # named prompts stand for the drawn ones, which come to nobody else
    assert collector.collect(Request(counts=torch.tensor([1])), policy)["index"].tolist() == [8]


def test_requests_that_do_not_fit_their_prompts() -> None:
    task = RaggedTask()
    collector = TokenCollector(task, seed=0)
    collector.draw(3)
    with pytest.raises(ValueError, match=r"expected counts \[3\], one per prompt, got \(2,\); name the prompts"):
        collector.plan(Request(counts=torch.tensor([1, 1])))
    with pytest.raises(ValueError, match="expected at least one completion, got counts of 0 alone"):
        collector.plan(Request(counts=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"expected a source among \[\], got 'on'"):
        collector.plan(Request(counts=torch.ones(3), source="on"))
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        collector.draw(0)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_bad_requests() -> None:
    task = RaggedTask()
    with pytest.raises(ValueError, match=r"fields: expected names among \['entropy', 'sum_pi2'\], got \['value'\]"):
        TokenCollector(task, fields=(Field("value"),))
    with pytest.raises(ValueError, match="pad_to_multiple_of: expected >= 1, got 0"):
        TokenCollector(task, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="expected a request with counts"):
        TokenCollector(task).collect(Request(steps=3), table(task))


def test_scores_must_be_finite() -> None:
    class Broken(RaggedTask):
        def score(self, *args: Any) -> Score:
            found = super().score(*args)
            found.components[2, 1] = torch.nan
            return found

    task = Broken()
    with pytest.raises(FloatingPointError, match="task 'ragged': the score of completion 2 is not finite"):
        TokenCollector(task).collect(Request(counts=torch.tensor([4])), table(task))


def test_one_buffer_per_tag() -> None:
    """Requests of ever other sizes do not fill the memory; what an earlier one gave stays as it was."""
    task = make_task("modsum")
    collector, policy = TokenCollector(task, seed=0), TabularTokenPolicy(10, 4, 10)
    kept = []
    for n in (1, 2, 3):
        prompts = task.prompts(n, torch.Generator().manual_seed(0))
        kept.append(collector.sample(policy, prompts, torch.arange(n)))
    assert len(collector._buffers) == 1
    assert [data.shape for data in kept] == [(4, 1), (4, 2), (4, 3)]
