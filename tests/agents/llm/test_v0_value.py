"""V0's value model: losses by hand, invariances, learning in context, how good it is, routing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.v0 import (
    Adapter,
    ContextHead,
    ContextLogistic,
    OutcomeLog,
    ValueModel,
    intra_auc,
    loss_terms,
    outcome_pairs,
    rank_loss,
    residuals,
    route,
    soft_cross_entropy,
)
from ccrl.data import Batching
from ccrl.estimators.terms import surrogate
from ccrl.learn import Cycle, DatasetLearner

F64 = torch.float64


def double(*x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


# -- losses -----------------------------------------------------------------------------------------------------------

SCORES, LABELS = double(1.2, -0.4, 0.3, 0.9), double(1.0, 0.0, 0.75, 0.25)


def test_losses_by_hand() -> None:
    """Pairs: softplus(-1.6) = 0.183901 and softplus(0.6) = 1.037488. Combined: 0.25 and 0.75 of the two."""
    assert float(rank_loss(SCORES)) == pytest.approx(0.6106943457, abs=1e-10)
    assert float(soft_cross_entropy(SCORES, LABELS)) == pytest.approx(0.6054517097, abs=1e-10)
    assert combined(SCORES) == pytest.approx(0.6067623687, abs=1e-10)


def combined(scores: Tensor) -> float:
    data = log(1).sample(Batching(size=1), torch.Generator().manual_seed(0))
    batch = type(data)({**data, "query_label": LABELS[None]}, sequence=data.sequence, scalars=data.scalars)
    total, _ = surrogate(loss_terms(0.25), {"score": scores[None, None]}, batch)
    return float(total)


def log(policies: int, **options: Any) -> OutcomeLog:
    """Prompts are numbers; each policy solves those above its own threshold."""
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for i in range(policies):
        x = torch.randn(60, 1, 2, generator=generator)
        rows[i] = (x, torch.ones(60, 1), (x[:, 0, 0] > 0.3 * (i % 3 - 1)).float())
    return OutcomeLog(rows, **{"sizes": (24,), "queries": 8} | options)


def test_an_offset_of_the_context_is_in_no_rank_loss() -> None:
    model = small().double()
    drawn = log(4).sample(Batching(size=3), torch.Generator().manual_seed(1))
    columns = {k: v.double() if v.is_floating_point() else v for k, v in ((k, drawn[k]) for k in drawn)}
    batch = type(drawn)(columns, sequence=drawn.sequence, scalars=drawn.scalars)
    slopes, values, entropies = [], [], []
    for offset in (0.0, 5.0):
        score = model(batch, frozenset({"score"}))["score"][0] + offset
        loss = rank_loss(score).mean()
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.head.parameters())[:-1])]))
        values.append(float(loss.detach()))
        entropies.append(float(soft_cross_entropy(score, batch["query_label"]).mean().detach()))
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    torch.testing.assert_close(*slopes, rtol=0.0, atol=1e-12)
    assert slopes[0].abs().max() > 1e-4
    assert abs(entropies[0] - entropies[1]) > 0.1


def test_the_shortcut_through_the_contexts_mean() -> None:
    """Policies that solve 0.2 and 0.8 of the prompts: the mean alone leaves H(0.2) = 0.7219 bits, less than 1."""
    label = torch.tensor([1.0] * 2 + [0.0] * 8, dtype=F64)
    score = torch.full((10,), math.log(0.25), dtype=F64)
    found = [soft_cross_entropy(score, label), soft_cross_entropy(-score, 1.0 - label)]
    bits = float(torch.stack(found).mean()) / math.log(2.0)
    assert bits == pytest.approx(0.7219, abs=5e-5)
    assert float(soft_cross_entropy(torch.zeros(10, dtype=F64), label)) / math.log(2.0) == pytest.approx(1.0)


# -- pairs and contexts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("high", "low"), [(3, 7), (7, 3), (1, 5), (4, 4)])
def test_pairs_use_every_outcome(high: int, low: int) -> None:
    label = torch.tensor([1.0] * high + [0.0] * low)
    pairs = outcome_pairs(label, torch.Generator().manual_seed(0))
    assert len(pairs) == 2 * max(high, low)
    assert set(pairs.tolist()) == set(range(high + low))
    assert label[pairs[0::2]].tolist() == [1.0] * max(high, low)
    assert label[pairs[1::2]].tolist() == [0.0] * max(high, low)


def test_one_outcome_makes_no_pairs() -> None:
    assert len(outcome_pairs(torch.ones(5))) == 0


def test_draws_keep_policies_apart_and_queries_out_of_the_context() -> None:
    rows = {}
    for i in range(5):
        x = torch.arange(40.0).view(40, 1, 1) + 100 * i
        rows[i] = (x, torch.ones(40, 1), (torch.arange(40) % 4 == i % 4).float())
    rows["always"] = (torch.zeros(40, 1, 1), torch.ones(40, 1), torch.ones(40))
    found = OutcomeLog(rows, sizes=(16,), queries=6)
    assert "always" not in found.rows, "one outcome alone ranks nothing"
    batch = found.sample(Batching(size=8), torch.Generator().manual_seed(0))
    assert batch["context"].shape == (8, 16, 1, 1)
    for context, query, label in zip(batch["context"][..., 0, 0], batch["query"][..., 0, 0], batch["query_label"]):
        assert len({int(x) // 100 for x in [*context, *query]}) == 1
        assert not {*context.tolist()} & {*query.tolist()}
        assert label.tolist() == [1.0, 0.0] * 3
    with pytest.raises(ValueError, match="expected policies with solved and unsolved prompts"):
        OutcomeLog({"always": rows["always"]})
    with pytest.raises(ValueError, match="queries: expected an even number"):
        OutcomeLog(rows, queries=3)


# -- the value model --------------------------------------------------------------------------------------------------


def small(**options: Any) -> ValueModel:
    torch.manual_seed(0)
    adapter = Adapter(2, queries=4, bottleneck=8, **options)
    return ValueModel(2, adapter=adapter, head=ContextHead(adapter.outputs, width=16, heads=2)).eval()


def inputs(n: int = 12, q: int = 5, length: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(n, length)
    mask[::2, 2] = 0.0
    labels = (torch.arange(n) % 3 == 0).float()
    return (
        torch.randn(n, length, 2, generator=generator), mask, labels, torch.randn(q, length, 2, generator=generator),
        torch.ones(q, length),
    )  # fmt: skip


def test_the_published_adapter() -> None:
    adapter = Adapter(1024)
    assert adapter.outputs == 168 * 6 == 1008
    assert adapter.attention.num_heads == 3
    assert adapter.generate[0].out_features == 128
    assert adapter.generate[3].p == 0.2


def test_at_the_start_queries_do_not_depend_on_the_prompt() -> None:
    states, mask, *_ = inputs()
    one, other = small().adapter, small(dynamic=False).adapter
    assert torch.equal(one(states, mask), other(states, mask))
    with torch.no_grad():
        nn.init.normal_(one.generate[-1].weight)
    assert not torch.allclose(one(states, mask), other(states, mask))


def test_masked_tokens_do_not_count() -> None:
    states, mask, *_ = inputs()
    changed = torch.where(mask.unsqueeze(-1) > 0, states, 100.0)
    adapter = small().adapter
    torch.testing.assert_close(adapter(states, mask), adapter(changed, mask))


def test_the_order_of_the_context_does_not_matter() -> None:
    states, mask, labels, *rest = inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for value in (small(), ContextLogistic()):
        found = value.predict(states, mask, labels, *rest)
        torch.testing.assert_close(found, value.predict(states[order], mask[order], labels[order], *rest))
        assert found.shape == (5,)


def test_labels_are_cut_at_one_half_in_the_context() -> None:
    states, mask, labels, *rest = inputs()
    soft = torch.where(labels > 0, 0.6, 0.4)
    model = small()
    assert torch.equal(model.predict(states, mask, labels, *rest), model.predict(states, mask, soft, *rest))


@pytest.mark.parametrize("n", [1, 6])
def test_a_context_of_one_outcome(n: int) -> None:
    states, mask, _, *rest = inputs(n)
    for right in (0.0, 1.0):
        found = small().predict(states, mask, torch.full((n,), right), *rest)
        assert found.tolist() == pytest.approx([(right * n + 1.0) / (n + 2.0)] * 5)
        fitted = ContextLogistic().predict(states, mask, torch.full((n,), right), *rest)
        assert ((fitted > 0.5) == (right > 0.5)).all()
        assert fitted.isfinite().all()


def test_a_context_of_the_same_prompt_again_and_again() -> None:
    states, mask, labels, *rest = inputs()
    same = states[:1].expand_as(states), torch.ones_like(mask)
    assert small().predict(*same, labels, *rest).isfinite().all()
    assert ContextLogistic().predict(*same, labels, *rest).isfinite().all()


class Learning(Cycle):
    """One phase on the losses of the value model."""

    def __init__(self, updater: Any) -> None:
        super().__init__()
        from ccrl.estimators.base import Phase

        self._phases = (Phase("value", loss_terms(), Batching(), updater),)

    def phases(self) -> Any:
        return self._phases


def test_it_learns_in_context() -> None:
    """On the learner of data sets; a policy is known by its context alone."""
    from ccrl.updaters import ModuleUpdater

    model = small(dropout=0.0)
    updater = ModuleUpdater(model, lambda params: torch.optim.Adam(params, lr=3e-3))
    learner = DatasetLearner(log(12), model, Learning(updater), {"value": updater}, batch_size=4, updates=30)
    learner.check()
    before = float(learner.iterate()["rank_loss"])
    for _ in range(2):
        after = float(learner.iterate()["rank_loss"])
    assert after < 0.8 * before, (before, after)
    assert learner.clock == 90


# -- how good it is ---------------------------------------------------------------------------------------------------


def test_auc_within_policies() -> None:
    """1 of 4 rows, 0.5 of 2, a policy of one outcome left out: (4 + 1) / 6. Pooled it would be less."""
    groups = [
        (double(0.1, 0.2, 0.3, 0.4), double(0, 0, 1, 1)),
        (double(0.9, 0.9), double(0, 1)),
        (double(0.9, 0.1), double(1, 1)),
    ]
    assert intra_auc(groups) == pytest.approx(5 / 6)
    assert math.isnan(intra_auc(groups[2:]))


def test_residuals() -> None:
    mean, prompt = double(0.25, 0.25, 0.75, 0.75), double(0.125, 0.5, 0.125, 0.5)
    truth = double(0.0, 1.0, 0.0, 1.0)
    assert residuals(truth + mean, truth, mean, prompt) == pytest.approx((1.0, 0.0))
    assert residuals(truth - prompt, truth, mean, prompt) == pytest.approx((0.0, -1.0))


# -- routing ----------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """Says the context's mean label, of every prompt."""

    def predict(self, context: Tensor, mask: Tensor, labels: Tensor, query: Tensor, query_mask: Tensor) -> Tensor:
        return labels.mean().expand(len(query))


def test_the_router_weighs_success_and_cost() -> None:
    states, mask, _, *query = inputs()
    contexts = [(states, mask, torch.full((12,), r)) for r in (0.5, 0.75)]
    assert route(Mean(), *query, contexts, (0.0, 1.0)).tolist() == [1] * 5
    # 0.5 (0.5 + 1) = 0.75 and 0.5 (0.75 + 0) = 0.375
    assert route(Mean(), *query, contexts, (0.0, 1.0), beta=0.5).tolist() == [0] * 5
    for cost, beta in (((0.0,), 1.0), ((0.0, 2.0), 1.0), ((0.0, 1.0), 1.5)):
        with pytest.raises(ValueError, match="cost"):
            route(Mean(), *query, contexts, cost, beta)


def test_the_router_finds_who_can_do_it() -> None:
    """One policy solves prompts with a positive first number, the other one the rest."""
    generator = torch.Generator().manual_seed(0)
    x, query = torch.randn(200, 1, 2, generator=generator), torch.randn(50, 1, 2, generator=generator)
    ones, high = torch.ones(200, 1), (x[:, 0, 0] > 0).float()
    found = route(ContextLogistic(), query, torch.ones(50, 1), [(x, ones, high), (x, ones, 1.0 - high)], (0.0, 0.0))
    clear = query[:, 0, 0].abs() > 0.2
    assert torch.equal(found[clear], (query[clear, 0, 0] < 0).long())
