"""Judgements, what a head learns from them, and how good it is said to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.terms import surrogate
from ccrl.llm.judged import Judged, read_jsonl
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.reward_head import CausalReward, Scored, pair_terms, verdict_terms
from ccrl.llm.reward_metrics import auc, calibration_error, evaluate_reward, r_squared, rewards_of
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import TextTask
from ccrl.testing.recipe_contract import RaggedTask

Build = Callable[..., CausalLMPolicy]
F64 = torch.float64


class Table(nn.Module):
    """Column ``i`` of the rows is worth ``value[number of its first token]``."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values, dtype=F64))

    @property
    def device(self) -> torch.device:
        return self.value.device

    def forward(self, batch: Data) -> Tensor:
        return self.value[batch["action"][0]]


def texts(*rows: tuple[str, str, str]) -> Judged:
    names = ("prompt", "chosen", "rejected")
    return Judged.pairs([dict(zip(names, row)) for row in rows], RaggedTask.vocab)


def verdicts(*rows: tuple[str, str, float]) -> Judged:
    names = ("prompt", "completion", "verdict")
    return Judged.verdicts([dict(zip(names, row)) for row in rows], RaggedTask.vocab)


def test_pairs_from_texts() -> None:
    found = texts(("0", "12", "3"), ("12", "2", "2"), ("1", "0", "11"))
    assert len(found) == 2, "equal completions are no pair"
    data = found.data
    assert data["group"].tolist() == [0, 0, 1, 1]
    assert data["preferred"].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert data["action"].t().tolist() == [[1, 2, 4], [3, 4, -1], [0, 4, -1], [1, 1, 4]]  # 4 ends
    assert data["present"].sum(0).tolist() == [3.0, 2.0, 2.0, 3.0]
    cut = Judged.pairs([{"prompt": "0", "chosen": "123", "rejected": "1"}], RaggedTask.vocab, max_tokens=2)
    assert cut.data["action"].t().tolist() == [[1, 2], [1, 4]]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in (("0", "121", "123"), ("0", "1", "11"))]
    equal = Judged.pairs(rows, RaggedTask.vocab, max_tokens=2)
    assert equal.data["action"].t().tolist() == [[1, 4], [1, 1]], "the cut leaves nothing to tell them apart"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: texts(), "expected at least one prompt"),
        (lambda: texts(("0", "1", "1")), "expected at least one prompt"),
        (lambda: Judged.pairs([{"prompt": "0", "chosen": "1"}], RaggedTask.vocab), "row 0: rejected: expected a text"),
        (lambda: verdicts(("0", "1", float("nan"))), "row 0: verdict: expected a finite number, got nan"),
        (lambda: texts(("0", "1", "2")).split(0.1), "split: expected a share of 1 pairs"),
    ],
)
def test_judgements_that_are_none(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_file_of_judgements(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "0", "chosen": "1", "rejected": "2"}) + "\n\n")
    assert len(Judged.pairs(read_jsonl(path), RaggedTask.vocab)) == 1
    # separators of lines and paragraphs are characters like others; the mark of some editors is not part of the JSON
    told = {"prompt": "one\u2028two\x85three"}
    path.write_text("\ufeff" + json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [told]
    path.write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: expected a JSON object, got list"):
        read_jsonl(path)


def test_draws_are_whole_pairs_with_their_counts() -> None:
    found = texts(*((str(i % 4), "12", "3") for i in range(6)))
    batch = found.sample(Batching(size=5), torch.Generator().manual_seed(0))
    assert batch.shape[1] == 10
    assert float(batch["n_groups"]) == 5.0
    assert batch["preferred"].tolist() == [1.0, -1.0] * 5
    assert torch.equal(batch["prompt"][0::2], batch["prompt"][1::2])
    first, rest = found.split(0.5)
    assert (len(first), len(rest)) == (3, 3)


def rollout(counts: list[int]) -> Data:
    task = RaggedTask()
    policy = TabularTokenPolicy(3, 8, 5, init=task.initial_logits())
    return TokenCollector(task, seed=0).collect(Request(counts=torch.tensor(counts)), policy)


def test_pairs_of_a_rollout() -> None:
    data = rollout([5, 4, 1])
    score = data["episode_reward"]
    found = Judged.pairs_of(data, score, torch.Generator().manual_seed(0))
    worth = Judged.verdicts_of(data, score)
    assert len(worth) == 10
    assert 1 <= len(found) <= 4  # two in each of the first groups, none of a lone completion

    def row(rows: Data, i: int) -> list[int]:
        return [int(t) for t in rows["action"][rows["present"][:, i] > 0, i]]

    known = {(int(data["prompt"][i, 0]), *row(data, i)): float(score[i]) for i in range(10)}
    scores = [known[int(found.data["prompt"][i, 0]), *row(found.data, i)] for i in range(2 * len(found))]
    assert all(best > worst for best, worst in zip(scores[0::2], scores[1::2]))


def test_noisy_pairs_follow_bradley_terry() -> None:
    """Scores 1 and 0 with a noise of 0.5: the better one is preferred in sigmoid(2) = 0.8808 of the pairs."""
    n = 4000
    columns = {"action": torch.arange(2 * n)[None] % 2, "present": torch.ones(1, 2 * n), "valid": torch.ones(1, 2 * n)}
    prompt = {"prompt": torch.zeros(2 * n, 1, dtype=torch.int64), "prompt_valid": torch.ones(2 * n, 1)}
    group = {"group": torch.arange(n).repeat_interleave(2)}
    data = Data(columns | prompt | group, sequence=frozenset({*prompt, *group}))
    found = Judged.pairs_of(data, data["action"][0].double(), torch.Generator().manual_seed(0), noise=0.5)
    assert len(found) == n
    assert float(found.data["action"][0, 0::2].double().mean()) == pytest.approx(0.8808, abs=0.02)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand() -> None:
    """Margins 2 and -1: softplus(-2) = 0.126928, softplus(1) = 1.313262; their mean is 0.720095. Slopes: -sigmoid(-2)
    / 2 = -0.059601 by the first chosen one, sigmoid(1) / 2 = 0.365529 by the second rejected one."""
    model = Scored(Table(2.0, 0.0, -1.0, 0.0))
    batch = texts(("0", "0", "1"), ("1", "2", "3")).whole()
    loss, stats = surrogate(pair_terms(), model(batch, frozenset({"score"})), batch)
    (slope,) = torch.autograd.grad(loss, model.model.value)
    assert float(loss.detach()) == pytest.approx(0.720095, abs=1e-6)
    assert slope.tolist() == pytest.approx([-0.059601, 0.059601, -0.365529, 0.365529], abs=1e-6)
    assert float(stats["margin"]) == pytest.approx(0.5)
    assert float(stats["pair_accuracy"]) == 0.5
    # centred: 0.1 * (2^2 + (-1)^2) / 2 = 0.25
    centred, _ = surrogate(pair_terms(0.1), model(batch, frozenset({"score"})), batch)
    assert float((centred - loss).detach()) == pytest.approx(0.25)


def test_only_differences_matter_to_pairs() -> None:
    batch = texts(("0", "0", "1"), ("1", "2", "3")).whole()
    values = [Scored(Table(*(x + c for x in (2.0, 0.0, -1.0, 0.0)))) for c in (0.0, 7.0)]
    losses = [float(surrogate(pair_terms(), m(batch, frozenset({"score"})), batch)[0]) for m in values]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_verdicts_by_hand() -> None:
    """Logits 2 and 0, verdicts 1 and 0.25: softplus(-2) = 0.126928 and log 2 = 0.693147, mean 0.410038. Squared errors
    1 and 0.0625, mean 0.53125."""
    model = Scored(Table(2.0, 0.0))
    batch = verdicts(("0", "0", 1.0), ("0", "1", 0.25)).whole()
    found = [
        float(surrogate(verdict_terms(kind), model(batch, frozenset({"score"})), batch)[0])
        for kind in ("probability", "score")
    ]
    assert found == pytest.approx([0.410038, 0.53125], abs=1e-6)


def test_pieces_add_up() -> None:
    model = Scored(Table(2.0, 0.0, -1.0, 0.5))
    for judged, terms in (
        (texts(("0", "0", "1"), ("1", "2", "3"), ("2", "3", "0")), pair_terms(0.1)),
        (verdicts(("0", "0", 1.0), ("0", "1", 0.25), ("1", "3", 0.0)), verdict_terms("probability")),
    ):
        sums = []
        for batch in (judged.whole(), judged.whole(2)):
            pieces = batch.microbatches(batch.microbatch)
            rows = [surrogate(terms, model(piece, frozenset({"score"})), piece)[0] for piece in pieces]
            sums.append(torch.stack(rows).sum())
            assert (len(pieces) > 1) is (batch.microbatch is not None)
        torch.testing.assert_close(sums[0], sums[1])


def test_a_model_of_tokens_is_refused() -> None:
    class PerToken(Table):
        def forward(self, batch: Data) -> Tensor:
            return torch.zeros(batch.shape)

    batch = texts(("0", "0", "1")).whole()
    with pytest.raises(ValueError, match=r"expected a number per completion, \[2\], got \[2, 2\]"):
        Scored(PerToken(0.0))(batch, frozenset({"score"}))


# -- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_head_reads_the_last_token_and_no_padding(build: Build, task: TextTask, name: str) -> None:
    policy = build(name)
    data = TokenCollector(task, seed=1).collect(Request(counts=torch.full((6,), 2)), policy)
    judge = CausalReward(policy.model)
    assert data["length"].unique().numel() > 1
    with torch.no_grad():
        found = judge(data)
        for i in range(data.shape[1]):
            ids = [*data["prompt"][i, data["prompt_valid"][i] > 0], *data["action"][data["present"][:, i] > 0, i]]
            hidden = judge.body(input_ids=torch.stack(ids)[None], use_cache=False).last_hidden_state
            torch.testing.assert_close(found[i], judge.head(hidden[0, -1])[0], rtol=1e-4, atol=1e-5)
    judge(data).sum().backward()
    assert all(p.grad is not None for p in judge.parameters()), "the whole model learns"
    assert judge.train() is judge
    assert not judge.body.training


def test_a_text_longer_than_the_model(build: Build, task: TextTask) -> None:
    data = TokenCollector(task, seed=1).collect(Request(counts=torch.full((6,), 2)), build("gpt2"))
    judge = CausalReward(build("gpt2").model)
    judge.positions = 4
    with pytest.raises(ValueError, match="expected at least"):
        judge(data)


def test_a_long_prompt_and_a_long_completion_are_two_texts(build: Build) -> None:
    """Texts of 5 + 1 and 1 + 5 tokens, side by side 10 columns wide, are for a model with 6 positions."""
    prompt = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 0, 0, 3]])
    action = torch.tensor([[4, 4], [0, 5], [0, 6], [0, 7], [0, 8]])
    columns = {"prompt": prompt, "prompt_valid": (prompt > 0).float(), "action": action,
               "present": (action > 0).float(), "valid": (action > 0).float()}  # fmt: skip
    data = Data(columns, sequence=frozenset({"prompt", "prompt_valid"}))
    judge = CausalReward(build("gpt2").model)
    judge.positions = 6
    assert judge(data).shape == (2,)
    judge.positions = 5
    with pytest.raises(ValueError, match="expected at least 6 positions"):
        judge(data)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_pairs_by_hand() -> None:
    """Margins 2, -1 and 0: right 1, 0 and half. Confidences 0.8808, 0.7311, 0.5; one pair in a bin each, so that the
    error is (0.1192 + 0.7311 + 0) / 3 = 0.2834."""
    model = Table(2.0, 0.0, -1.0, 0.0)
    found = evaluate_reward(model, texts(("0", "0", "1"), ("1", "2", "3"), ("1", "1", "3")), microbatch=2)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["margin"] == pytest.approx(1.0 / 3.0)
    assert found["loss"] == pytest.approx((0.126928 + 1.313262 + 0.693147) / 3, abs=1e-6)
    assert found["calibration_error"] == pytest.approx(0.283419, abs=1e-5)


def test_metrics_of_verdicts() -> None:
    model, told = Table(2.0, 0.0), verdicts(("0", "0", 1.0), ("0", "1", 0.25), ("1", "0", 1.0), ("1", "1", 0.25))
    found = evaluate_reward(model, told)
    said = torch.tensor([2.0, 0.0], dtype=F64).sigmoid()
    # mean 0.625, spread 4 * 0.375^2 = 0.5625
    error = 2 * ((1 - said[0]) ** 2 + (0.25 - said[1]) ** 2)
    assert found["r2"] == pytest.approx(float(1 - error / 0.5625))
    assert found["r2_fitted"] == pytest.approx(1.0)
    assert found["auc"] == 1.0
    assert found["accuracy"] == 0.5  # a probability of 0.5 counts as right
    assert found["brier"] == pytest.approx(float(error / 4))
    scored = evaluate_reward(Table(1.0, 0.25), told, probability=False)
    assert scored["r2"] == 1.0
    assert "brier" not in scored
    assert rewards_of(model, told).tolist() == [2.0, 0.0, 2.0, 0.0]


def test_auc_counts_ties_half() -> None:
    said, positive = torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert auc(said, positive) == pytest.approx(3.5 / 4)  # 3 > 1, 3 > 0, 1 = 1, 1 > 0
    assert auc(said, torch.ones(4)) != auc(said, torch.ones(4)), "NaN without both classes"
    # many ties, against all pairs
    generator = torch.Generator().manual_seed(0)
    said = torch.randint(5, (60,), generator=generator).double()
    positive = torch.randint(2, (60,), generator=generator).double()
    high, low = said[positive > 0][:, None], said[positive < 1][None]
    expected = ((high > low).double() + 0.5 * (high == low).double()).mean()
    assert auc(said, positive) == pytest.approx(float(expected))


def test_calibration() -> None:
    """Of ten predictions of 0.75 eight come true: an error of 0.05; with ten of 0.25 of which none does, the mean of
    0.05 and 0.25."""
    probability = torch.tensor([0.75] * 10)
    outcome = torch.tensor([1.0] * 8 + [0.0] * 2)
    assert calibration_error(probability, outcome) == pytest.approx(0.05, abs=1e-6)
    both = torch.cat([probability, torch.full((10,), 0.25)]), torch.cat([outcome, torch.zeros(10)])
    assert calibration_error(*both) == pytest.approx(0.15, abs=1e-6)
    with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\], got 0.2 to 1.5"):
        calibration_error(torch.tensor([0.2, 1.5]), torch.zeros(2))


def test_r_squared() -> None:
    truth = torch.tensor([0.0, 1.0, 2.0])
    assert r_squared(truth, truth) == 1.0
    assert r_squared(torch.ones(3), truth) == 0.0
    assert r_squared(10.0 - 3.0 * truth, truth, fitted=True) == pytest.approx(1.0)
    assert r_squared(torch.ones(3), truth, fitted=True) == 0.0
    assert r_squared(truth, torch.ones(3)) != r_squared(truth, torch.ones(3)), "NaN for a constant truth"
