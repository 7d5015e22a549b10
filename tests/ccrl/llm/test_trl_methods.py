"""Every method of the suite in TRL and verl: it takes one step that moves the model, or it is refused when it is built,
with what was expected, what was received and what to use instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.llm import METHODS, get_method
from ccrl.llm.trl import grpo_trainer
from ccrl.llm.verl import bridge

INSTEAD = "train it with the suite's own agent"
REFERENCE = {"kl_coef": 0.1}
WITHOUT_KL = {"kl_coef": 0.0}

REFUSED_BY_TRL: dict[str, tuple[dict[str, Any], str]] = {
    "capo": ({}, "wants \\['hidden', 'topk_index', 'topk_log_prob'\\]"),
    "copg": ({}, "compares completions of one group"),
    "copo": ({}, "no column 'answer'"),
    "d3s": ({}, "trains on a selection of the completions"),
    "dapo": ({}, "second rollout \\('on1': more completions\\)"),
    "div_prec": ({}, "trains on demonstrations, and the host samples completions"),
    "dpo": ({}, "compares completions of one group"),
    "hpt": ({}, "second rollout \\('demo': demonstrations\\)"),
    "ipo": ({}, "compares completions of one group"),
    "knapsack_rl": ({}, "divides completions among prompts that it sees first"),
    "mmr1_vas": ({}, "it chooses the prompts itself"),
    "p3o": ({}, "compares completions of one group"),
    "oblr_po": ({}, "steps by a rule of its own"),
    "pf_ppo": ({}, "trains on a selection of the completions or repeats some"),
    "polar": ({}, "second rollout \\('reference': demonstrations\\)"),
    "real": ({}, "compares completions of one group"),
    "rpo": ({}, "compares completions of one group"),
    "v0": ({}, "divides completions among prompts"),
    "sft": ({}, "trains on demonstrations, and the host samples completions"),
}
REFUSED_BY_VERL: dict[str, tuple[dict[str, Any], str]] = {
    **REFUSED_BY_TRL,
    "adora": ({}, "compares with a reference policy"),
    "copo": ({}, "compares final answers"),
    "d3s": ({}, "wants \\['entropy'\\] of the policy"),
    "dcpo": ({}, "two temperatures"),
    "epo": ({"kl_coef": 0.0}, "wants \\['entropy'\\]"),
    "etr": ({}, "reads the columns \\['range_high', 'range_low'\\]"),
    "empg": ({}, "wants \\['entropy'\\] of the policy"),
    "gbpo": ({}, "reads the columns \\['ratio_target'\\]"),
    "hpt": ({"entropy_coef": 0.0}, "second rollout \\('demo': demonstrations\\)"),
    "r2vpo": ({}, "learns between updates"),
    "riskpo": ({}, "learns between updates"),
}
"""Method -> config, and a part of the message. What is not named here is supported."""
OPTIONS: dict[str, dict[str, Any]] = {
    "oblr_po": {"snr_pieces": 0, "baseline_weight": "length"},
    "copo": {"mode": "forced"},
    "dapo": {"max_tries": 1},
    "hpt": {"gate": -1.0},
}
"""With these the host gives all that the recipe needs."""
WITH_OPTIONS = {name: OPTIONS[name] for name in ("dapo", "oblr_po")} | {"adora": WITHOUT_KL}
"""The same for verl."""


def recipe(name: str, **options: Any) -> tuple[Any, Any]:
    method = get_method(name)
    return method.Recipe, method.Config(**options)


def cases(refused: dict[str, Any], **options: dict[str, Any]) -> list[Any]:
    named = [(name, {}) for name in sorted(METHODS) if name not in refused]
    return [pytest.param(name, kept, id="-".join([name, *kept])) for name, kept in (*named, *options.items())]


def refusals(refused: dict[str, tuple[dict[str, Any], str]]) -> list[Any]:
    return [pytest.param(name, *rest, id=name) for name, rest in sorted(refused.items())]


def first_right(completions: list[str], **_: Any) -> list[float]:
    """1 or 0 by place: every group differs, whatever the model says."""
    return [float(i % 2 == 0) for i in range(len(completions))]


# -- TRL --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), cases(REFUSED_BY_TRL, **OPTIONS, grpo=REFERENCE))
def test_one_step_in_trl(make_trainer: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    beta = recipe(name, **options)[1].kl_coef
    trainer = make_trainer(
        grpo_trainer(*recipe(name, **options)), (first_right,), num_generations=4, max_completion_length=3,
        max_steps=1, prompts=2, beta=beta,
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    losses = [row["recipe/loss"] for row in trainer.state.log_history if "recipe/loss" in row]
    assert len(losses) == 1
    assert math.isfinite(losses[0])
    after = [p.detach() for p in trainer.model.parameters()]
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


@pytest.mark.parametrize(("name", "options", "match"), refusals(REFUSED_BY_TRL))
def test_refused_by_trl(make_trainer: Callable[..., Any], name: str, options: dict[str, Any], match: str) -> None:
    cls = grpo_trainer(*recipe(name, **options))
    with pytest.raises(ValueError, match=f"does not fit into TRL.*{match}.*{INSTEAD}"):
        make_trainer(cls, (first_right,), num_generations=4, max_completion_length=3, prompts=2)


def test_the_other_temperature_is_the_models(make_trainer: Callable[..., Any]) -> None:
    """DCPO's weights in TRL: log-probabilities at its temperature over those of the policy that sampled."""
    trainer = make_trainer(
        grpo_trainer(*recipe("dcpo")), (first_right,), num_generations=4, max_completion_length=3, prompts=2,
        temperature=0.7,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    data = trainer._have["on"]
    ids = torch.cat([data["prompt"], data["action"].t()], 1)
    mask = torch.cat([data["prompt_valid"], data["present"].t()], 1).long()
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -data.shape[0] - 1 : -1]

    def log_prob(temperature: float) -> Tensor:
        found = (logits / temperature).log_softmax(-1).gather(-1, data["action"].t().unsqueeze(-1))
        return found.squeeze(-1).t()

    hot = 1.2 * 0.7  # the recipe starts with entropy 0, below its target
    expected = (log_prob(hot) - log_prob(0.7)).exp()
    inside = data["valid"] > 0
    torch.testing.assert_close(data["rho"][inside].double(), expected[inside].double(), rtol=1e-4, atol=1e-5)
    assert (data["rho"][inside] - 1.0).abs().max() > 1e-2


# -- verl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), cases(REFUSED_BY_VERL, **WITH_OPTIONS))
def test_loss_and_gradient_in_verl(name: str, options: dict[str, Any]) -> None:
    """Rewards to advantages to loss, as verl's trainer and its actor do it: 2 prompts with 4 completions."""
    loss, advantage = bridge(*recipe(name, **options), max_length=3, group_size=4)
    length = torch.tensor([3, 1, 2, 3, 3, 2, 1, 3])
    mask = (torch.arange(3) < length.unsqueeze(1)).float()
    reward = torch.zeros(8, 3).index_put((torch.arange(8), length - 1), torch.tensor([1.0, 0.0] * 4))
    found, returns = advantage(reward, mask, index=np.array(["x", "y"] * 2 + ["y", "x"] * 2, dtype=object))
    assert found.shape == returns.shape == (8, 3)
    assert bool(found.isfinite().all())
    torch.manual_seed(0)
    old = -1.0 - torch.rand(8, 3)
    new = (old + 0.1 * torch.randn(8, 3)).requires_grad_()
    value, metrics = loss(old, new, found, mask)
    value.backward()
    assert value.shape == ()
    assert bool(value.isfinite())
    assert all(math.isfinite(x) for x in metrics.values())
    assert new.grad is not None
    assert bool(new.grad.isfinite().all())
    assert bool((new.grad[mask > 0] != 0).any())
    assert bool((new.grad[mask == 0] == 0).all())


@pytest.mark.parametrize(("name", "options", "match"), refusals(REFUSED_BY_VERL))
def test_refused_by_verl(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"does not fit into verl.*{match}.*{INSTEAD}"):
        bridge(*recipe(name, **options), max_length=3, group_size=4)
