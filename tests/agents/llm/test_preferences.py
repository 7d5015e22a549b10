"""DPO, IPO and SFT: numbers by hand, how pairs are made, demonstrations."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.agent import LLM, LLMMethod
from agents.llm.preferences import DPO, IPO, SFT, best_and_worst, dpo, ipo, pair, per_pair
from ccrl.data import Batching, Data
from ccrl.estimators.terms import Loss, Term, surrogate
from ccrl.testing.recipe_contract import RaggedTask

F64 = torch.float64


def two(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Data]:
    """Log-probabilities ``[T, 2]`` against a reference of zeros, and the batch."""
    steps = max(len(chosen), len(rejected))
    log_prob, valid = torch.full((steps, 2), 9.0, dtype=F64), torch.zeros(steps, 2, dtype=F64)
    for i, column in enumerate((chosen, rejected)):
        log_prob[: len(column), i], valid[: len(column), i] = column, 1.0
    columns = {"valid": valid, "ref_log_prob": torch.zeros_like(valid)}
    sequence = {"group": torch.zeros(2, dtype=torch.int64), "preferred": torch.tensor([1.0, -1.0], dtype=F64)}
    data = Data(columns | sequence, sequence=frozenset(sequence))
    return log_prob.requires_grad_(), data.epoch(Batching("group", "full"), None)[0]


def loss_of(loss: Loss, log_prob: Tensor, batch: Data, mean: bool = False) -> tuple[float, Tensor]:
    term = Term("x", loss, per_pair, pair(mean), advantage=None)
    total, _ = surrogate((term,), {"log_prob": log_prob}, batch)
    (gradient,) = torch.autograd.grad(total, log_prob)
    return float(total.detach()), gradient


CHOSEN, REJECTED = torch.full((5,), 0.2, dtype=F64), torch.full((6,), -0.5 / 6, dtype=F64)
"""Sums 1 and -0.5: the pair's log-ratio is 1.5."""


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        (dpo(0.1), 0.620957, -0.046257),
        (dpo(0.5), 0.386871, -0.160411),
        (ipo(0.1), 12.25, 2 * (1.5 - 5.0)),
        (ipo(0.5), 0.25, 2 * (1.5 - 1.0)),
    ],
)
def test_losses_of_a_pair(loss: Loss, value: float, slope: float) -> None:
    log_prob, batch = two(CHOSEN, REJECTED)
    found, gradient = loss_of(loss, log_prob, batch)
    assert found == pytest.approx(value, abs=6e-7)
    sign = torch.tensor([1.0, -1.0], dtype=F64) * batch["valid"]
    torch.testing.assert_close(gradient, slope * sign, rtol=0.0, atol=6e-7)


def test_ipo_normalised_by_length() -> None:
    log_prob, batch = two(CHOSEN, REJECTED)
    found, gradient = loss_of(ipo(0.5), log_prob, batch, mean=True)
    assert found == pytest.approx(0.513611, abs=6e-7)
    slope = 2 * (0.2 + 0.5 / 6 - 1.0)
    assert gradient[0].tolist() == pytest.approx([slope / 5, -slope / 6])


def test_several_pairs_in_any_order_and_padding() -> None:
    """The mean over pairs; members need not be neighbours, and a column without valid rows is in no pair."""
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(3, 7, dtype=F64, generator=generator)
    ref = torch.randn(3, 7, dtype=F64, generator=generator)
    group = torch.tensor([2, 0, 1, 0, 2, 1, 1])
    preferred = torch.tensor([1, -1, -1, 1, -1, 1, 1], dtype=F64)
    valid = torch.ones(3, 7, dtype=F64)
    valid[:, 6] = 0.0
    sequence = {"group": group, "preferred": preferred}
    data = Data(
        {"valid": valid, "ref_log_prob": ref, "n_groups": torch.tensor(3.0, dtype=F64)} | sequence,
        sequence=frozenset(sequence), scalars=frozenset({"n_groups"}),
    )  # fmt: skip
    total = (log_prob - ref).sum(0)
    margins = torch.stack([total[3] - total[1], total[5] - total[2], total[0] - total[4]])
    expected = -torch.nn.functional.logsigmoid(0.3 * margins).mean()
    found, _ = loss_of(dpo(0.3), log_prob.clone().requires_grad_(), data)
    assert found == pytest.approx(float(expected), abs=1e-12)


def test_a_member_without_partner_is_no_pair() -> None:
    log_prob, batch = two(CHOSEN, REJECTED)
    alone = Data({**batch, "preferred": torch.tensor([1.0, 0.0])}, sequence=batch.sequence, scalars=batch.scalars)
    found, gradient = loss_of(dpo(0.1), log_prob, alone)
    assert found == 0.0
    assert not gradient.any()


def test_best_and_worst_of_groups() -> None:
    score = torch.tensor([0.0, 3.0, 1.0, 5.0, 5.0, 2.0, 2.0, 7.0])
    group = torch.tensor([4, 4, 4, 1, 1, 0, 0, 9])
    best, worst = best_and_worst(score, group)
    assert best.tolist() == [1]
    assert worst.tolist() == [0]


# -- how pairs are made ---------------------------------------------------------------------------------------------


def prepared(agent: LLM) -> dict[str, Data]:
    agent.ctx.bank.refresh("ref")
    have: dict[str, Data] = {}
    while requests := agent.estimator.plan({}, have, agent.ctx):
        for request in requests:
            have[request.tag] = agent.collector.collect(request, agent.policy)
    return agent.estimator.prepare(have, agent.ctx)


def test_pairs_of_samples() -> None:
    agent = DPO(RaggedTask(), DPO.Settings(model="tabular", n_prompts=3, group_size=6), seed=0)
    data = prepared(agent)
    on, sampled = data["on"], data["sampled"]
    assert on["preferred"].tolist() == [1.0, -1.0] * 3
    for g in range(3):
        scores = sampled["episode_reward"][sampled["group"] == g]
        pair_scores = on["episode_reward"][on["group"] == g]
        assert pair_scores.tolist() == [scores.max(), scores.min()]


class Partly(RaggedTask):
    """The second question has no demonstration."""

    def prompts(self, n: int, generator: Any, split: Any = "train") -> Any:
        found = super().prompts(n, generator, split)
        found.demonstration_valid[found.index == 1] = 0.0
        return found


def test_pairs_with_demonstrations() -> None:
    task = Partly(graded=False)
    agent = IPO(task, IPO.Settings(model="tabular", n_prompts=3, group_size=8, pairs="demonstrations"), seed=0)
    data = prepared(agent)
    on = data["on"]
    assert on["group"].tolist() == [0, 0, 2, 2]
    assert on["demonstration"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert on["episode_reward"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert data["sampled"].shape[1] == 24


def test_tasks_without_demonstrations_say_so() -> None:
    with pytest.raises(ValueError, match="has no demonstrations"):
        SFT("modsum", SFT.Settings(model="tabular", n_prompts=2)).learn(until=1)


def test_without_pairs_nothing_moves() -> None:
    class Dull(RaggedTask):
        def score(self, *args: Any) -> Any:
            found = super().score(*args)
            return found._replace(components=torch.zeros_like(found.components))

    agent = DPO(Dull(), DPO.Settings(model="tabular", n_prompts=2, group_size=2), seed=0)
    before = agent.policy.logits.detach().clone()
    agent.learn(until=1)
    assert torch.equal(agent.policy.logits, before)


def test_the_length_normalised_recipe_is_another() -> None:
    grads = []
    for normalised in (False, True):
        config = IPO.Settings(model="tabular", n_prompts=3, group_size=4, length_normalised=normalised)
        agent = IPO(RaggedTask(), config, seed=0)
        batch = prepared(agent)["on"].epoch(Batching("group", "full"), None)[0]
        grads.append(agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, batch).mean.clone())
    assert grads[1].norm() < grads[0].norm()


@pytest.mark.parametrize(
    ("agent", "settings", "message"),
    [
        (DPO, {"beta": 0.0}, "beta: expected > 0, got 0.0"),
        (IPO, {"tau": -1.0}, "tau: expected > 0, got -1.0"),
        (DPO, {"pairs": "humans"}, "pairs: expected one of"),
        (DPO, {"microbatch": 3}, r"microbatch: expected an even number \(pairs stay together\), got 3"),
        (IPO, {"group_size": 1}, "group_size: expected >= 2"),
        (SFT, {"group_size": 2}, "group_size: expected 1"),
    ],
)
def test_bad_settings(agent: LLMMethod, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent.Config(**settings)


@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        (DPO, {"beta": 0.5}),
        (IPO, {}),
        (DPO, {"beta": 0.5, "pairs": "demonstrations"}),
        (SFT, {"group_size": 1, "n_prompts": 16}),
    ],
)
def test_learns_a_bandit(agent: LLMMethod, settings: dict[str, Any]) -> None:
    config = agent.Settings(**{"model": "tabular", "n_prompts": 8, "group_size": 4, "learning_rate": 0.1} | settings)
    learner = agent("sequence_match", config, seed=0, env_kwargs={"questions": 2, "fixed_length": 3, "symbols": 4})
    before = learner.pass_at([1], questions=2, samples=64)["episode_reward"]
    learner.learn(until=40 * learner.samples_per_iteration)
    assert learner.iteration == 40
    assert before < 0.45
    assert learner.pass_at([1], questions=2, samples=64)["episode_reward"] > 0.7


class FewShown(RaggedTask):
    """Only question 0 has a demonstration. :param batches: two questions of each batch that is asked for."""

    def __init__(self, *batches: tuple[int, int]) -> None:
        super().__init__()
        self.batches = list(batches)

    def prompts(self, n: int, *args: Any) -> Any:
        asked = torch.tensor(self.batches.pop(0) if n == 2 else [0])  # one alone is asked for when an agent is built
        found = super().prompts(3, *args).select(asked)
        assert found.demonstration_valid is not None
        shown = found.demonstration_valid * (found.index == 0).unsqueeze(1)
        return dataclasses.replace(found, demonstration_valid=shown)


def test_prompts_without_a_demonstration_count_nowhere_and_move_nothing() -> None:
    options: dict[str, Any] = {"model": "tabular", "n_prompts": 2, "aggregate": "sequence_mean", "seed": 0}
    agent = SFT(FewShown((0, 1), (1, 2), (0, 2)), **options)
    start = agent.policy.logits.detach().clone()
    tokens = start[0, :3].log_softmax(-1)[torch.arange(3), torch.tensor([0, 1, 4])]
    agent.learn(until=2)
    # of one sequence, not of two
    assert float(agent.scalars["train/sft_loss"]) == pytest.approx(-float(tokens.sum()), rel=1e-5)
    moved = agent.policy.logits.detach().clone()
    assert not torch.equal(moved, start)
    agent.learn(until=4)
    assert torch.equal(agent.policy.logits, moved), "Adam's moments go on without a gradient"
    agent.learn(until=6)
    assert not torch.equal(agent.policy.logits, moved)


def test_a_supervised_step_without_demonstrations_moves_nothing() -> None:
    policies = []
    for batches in ([(0, 0)], [(0, 0), (1, 2)]):
        agent = DPO(FewShown(*batches), model="tabular", n_prompts=2, group_size=2, warm_start_batch=2, seed=0)
        start = agent.policy.logits.detach().clone()
        agent.warm_start(len(batches))
        policies.append(agent.policy.logits.detach())
        assert not torch.equal(policies[-1], start)
    assert torch.equal(*policies)


def test_sft_counts_demonstrations() -> None:
    learner = SFT("sequence_match", SFT.Settings(model="tabular", n_prompts=6), seed=0)
    learner.learn(until=18)
    assert learner.num_timesteps == 18
    assert learner.iteration == 3
    assert not [name for name in learner.scalars if name.startswith("rollout/")]
