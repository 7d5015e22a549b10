"""RPO: the loss and its gradient on numbers by hand, its limits, a toy in which DPO collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.preferences import DPO
from agents.llm.rpo import RPO, RPOConfig, RPORecipe
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import surrogate
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

F64 = torch.float64


def terms(**options: Any) -> Any:
    parts = Parts(torch.nn.Identity(), None, Request(counts=torch.ones(1, dtype=torch.int64)), 8)  # type: ignore[arg-type]
    return RPORecipe(RPOConfig(**options), parts).terms()


def batch(reference: Tensor, valid: Tensor | None = None, sign: Sequence[float] = (1.0, -1.0)) -> Data:
    """Two columns ``[T, 2]`` that are one pair."""
    columns = {"valid": torch.ones_like(reference) if valid is None else valid, "ref_log_prob": reference}
    sequence = {"group": torch.zeros(2, dtype=torch.int64), "preferred": torch.tensor(sign, dtype=F64)}
    data = Data(columns | sequence, sequence=frozenset(sequence))
    return data.epoch(Batching("group", "full"), None)[0]


def loss(log_prob: Tensor, data: Data, **options: Any) -> tuple[float, dict[str, Tensor]]:
    total, stats = surrogate(terms(**options), {"log_prob": log_prob}, data)
    return float(total.detach()), stats


NEW, REFERENCE = torch.tensor([[-12.0, -15.0]], dtype=F64), torch.tensor([[-11.0, -14.5]], dtype=F64)
"""D = (-12 + 11) - (-15 + 14.5) = -0.5."""


def test_the_loss_by_hand() -> None:
    """softplus(0.05) = 0.7184596480, and 0.1 * 0.5 * 12 = 0.6 on top."""
    found, stats = loss(NEW, batch(REFERENCE), beta=0.1, eta=0.5)
    assert found == pytest.approx(1.3184596480, abs=1e-10)
    assert float(stats["preference_loss"]) == pytest.approx(0.7184596480, abs=1e-10)
    logged = {name: float(stats[name]) for name in ("margin", "pair_accuracy", "chosen_log_prob", "rejected_log_prob")}
    assert logged == pytest.approx(
        {"margin": -0.5, "pair_accuracy": 0.0, "chosen_log_prob": -12.0, "rejected_log_prob": -15.0}
    )
    assert float(stats["chosen_reward"]) == pytest.approx(-0.1)
    assert float(stats["rejected_reward"]) == pytest.approx(-0.05)


def test_without_eta_it_is_dpo_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    new, reference = (torch.randn(4, 2, dtype=F64, generator=generator) for _ in range(2))
    parts = Parts(torch.nn.Identity(), None, Request(counts=torch.ones(1, dtype=torch.int64)), 8)  # type: ignore[arg-type]
    plain = DPO.Recipe(DPO.Config(beta=0.3), parts).phases()[0].terms
    for eta in (0.0, 9e-7):
        gradients, values = [], []
        for each in (plain, terms(beta=0.3, eta=eta)):
            leaf = new.clone().requires_grad_()
            total, _ = surrogate(each, {"log_prob": leaf}, batch(reference))
            values.append(total.detach())
            gradients.append(torch.autograd.grad(total, leaf)[0])
        assert torch.equal(*values)
        assert torch.equal(*gradients)
    assert RPOConfig(eta=1e-5).nll_coef > 0.0


def test_as_beta_vanishes_it_is_sft() -> None:
    """With eta beta = 0.5 fixed: 0.5 * 12 + log 2."""
    found, _ = loss(NEW, batch(REFERENCE), beta=1e-9, eta=0.5e9)
    assert found == pytest.approx(6.0 + math.log(2.0), abs=1e-8)


def test_the_gradient_of_a_softmax() -> None:
    """Chosen 0, rejected 1, the policy at its reference: -beta sigmoid(0) (e0 - e1) - beta eta (e0 - pi)."""
    logits = torch.tensor([0.5, 0.2, -0.3, 0.1], dtype=F64, requires_grad=True)
    log_prob = logits.log_softmax(0)[:2].unsqueeze(0)
    total, _ = surrogate(terms(beta=0.1, eta=0.5), {"log_prob": log_prob}, batch(log_prob.detach()))
    (gradient,) = torch.autograd.grad(total, logits)
    assert float(total.detach()) == pytest.approx(0.7456964295, abs=1e-10)
    assert gradient.tolist() == pytest.approx([-0.082520, 0.062949, 0.007854, 0.011717], abs=5e-7)
    e0, e1 = torch.eye(4, dtype=F64)[:2]
    closed = -0.05 * (e0 - e1) - 0.05 * (e0 - logits.detach().softmax(0))
    torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_at_the_reference_the_preference_part_is_log_2(beta: float) -> None:
    _, stats = loss(NEW, batch(NEW), beta=beta, eta=0.5)
    assert float(stats["preference_loss"]) == pytest.approx(math.log(2.0), abs=1e-12)


def test_swapping_the_pair_is_no_change_of_sign() -> None:
    """The preference part becomes softplus(-0.05) = 0.6684596480, and the likelihood is that of the other one: 0.1 *
    0.5 * 15 = 0.75."""
    found, stats = loss(NEW, batch(REFERENCE, sign=(-1.0, 1.0)), beta=0.1, eta=0.5)
    assert float(stats["preference_loss"]) == pytest.approx(0.6684596480, abs=1e-10)
    assert found == pytest.approx(0.6684596480 + 0.75, abs=1e-10)


def test_label_smoothing() -> None:
    """0.9 * 0.7184596480 + 0.1 * 0.6684596480 = 0.7134596480; the likelihood has its weight as before."""
    found, stats = loss(NEW, batch(REFERENCE), beta=0.1, eta=0.5, label_smoothing=0.1)
    assert float(stats["preference_loss"]) == pytest.approx(0.7134596480, abs=1e-10)
    assert found == pytest.approx(0.7134596480 + 0.6, abs=1e-10)


def test_doubling_every_token_doubles_the_sum_and_not_the_mean() -> None:
    once = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], dtype=F64)
    twice = once.repeat_interleave(2, 0)
    valid = torch.ones(4, 2, dtype=F64)
    valid[2:, 1] = 0.0  # the rejected one stays as it is: its rows are -2, -2 | -1, -1, of which two count
    twice[:2, 1] = once[:, 1]

    def anchor(log_prob: Tensor, data: Data, nll: str) -> float:
        _, stats = loss(log_prob, data, beta=0.1, eta=0.5, nll=nll)
        return float(stats["chosen_nll"])

    for nll, values in (("sum", (4.0, 8.0)), ("mean", (2.0, 2.0))):
        found = anchor(once, batch(once), nll), anchor(twice, batch(twice, valid), nll)
        assert found == pytest.approx(values)
    total, stats = loss(once, batch(once), beta=0.1, eta=0.5, nll="mean")
    assert total == pytest.approx(math.log(2.0) + 0.5 * 2.0), "no factor beta on the mean"
    assert float(stats["chosen_log_prob"]) == -4.0, "what is logged is the sum"


# -- the toy ----------------------------------------------------------------------------------------------------------

PHI = torch.tensor([1.0, 0.8, 3.0], dtype=F64)
"""Features of the chosen, the rejected and an unseen response."""


def slope(w: Tensor, eta: float) -> Tensor:
    """Of the loss by the weight of a softmax policy on one feature, uniform reference."""
    data = batch(torch.full((1, 2), -math.log(3.0), dtype=F64))
    log_prob = (w * PHI).log_softmax(0)[:2].unsqueeze(0)
    return torch.autograd.grad(surrogate(terms(beta=0.1, eta=eta), {"log_prob": log_prob}, data)[0], w)[0]


def test_dpo_moves_the_mass_to_what_nobody_saw() -> None:
    """100 steps of gradient descent; after 1000 it is at [.0001, .0000, .9999] (docs/llm/rpo.md)."""
    w = torch.zeros((), dtype=F64, requires_grad=True)
    for _ in range(100):
        step = slope(w, 0.0)
        with torch.no_grad():
            w -= 0.5 * step
    assert (w.detach() * PHI).softmax(0).tolist() == pytest.approx([0.217, 0.196, 0.587], abs=1e-3)


@pytest.mark.parametrize(
    ("eta", "weight", "pi"), [(0.1, 0.3708, [0.2483, 0.2305, 0.5212]), (0.5, -0.5126, [0.4054, 0.4492, 0.1454])]
)
def test_rpo_stops_where_the_two_forces_balance(eta: float, weight: float, pi: list[float]) -> None:
    """There sigmoid(-beta 0.2 w) 0.2 + eta (1 - E phi) = 0."""
    below, above = (slope(torch.tensor(weight + d, dtype=F64, requires_grad=True), eta) for d in (-2e-4, 2e-4))
    assert below < 0.0 < above, "the loss has its minimum between"
    found = (weight * PHI).softmax(0)
    assert found.tolist() == pytest.approx(pi, abs=1e-4)
    balance = 0.2 / (1.0 + math.exp(0.1 * 0.2 * weight)) + eta * (1.0 - float(found @ PHI))
    assert balance == pytest.approx(0.0, abs=1e-4)


# -- settings and contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta: expected > 0"),
        ({"eta": -0.1}, "eta: expected"),
        ({"nll": "token"}, "nll: expected one of"),
        ({"label_smoothing": 0.6}, "label_smoothing: expected"),
        ({"clip_low": 0.1}, "clip_low: expected 0.2"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RPOConfig(**settings)


def test_the_likelihoods_are_logged() -> None:
    agent = RPO(RaggedTask(), model="tabular", n_prompts=3, group_size=4)
    agent.learn(1)
    names = ("chosen_log_prob", "rejected_log_prob", "chosen_reward", "rejected_reward", "pair_accuracy", "margin")
    assert all(f"train/{name}" in agent.scalars for name in names)


class TestRPOContract(RecipeContract):
    method = RPO
    published = {"beta": 0.01, "eta": 0.005, "nll": "sum", "label_smoothing": 0.0, "pairs": "samples"}
    options = {"beta": 0.5}
    matters = (
        ({}, {"beta": 0.1}),
        ({}, {"eta": 0.5}),
        ({"eta": 0.5}, {"eta": 0.5, "nll": "mean"}),
        ({}, {"label_smoothing": 0.2}),
        ({}, {"pairs": "demonstrations"}),
    )
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}
