"""Layers computed again, bfloat16, truncated sampling, step sizes of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ccrl.collect import Request
from ccrl.llm.decoding import truncate
from ccrl.llm.memory import checkpoint_layers
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import TextTask
from ccrl.updaters.schedules import rate_factor

WANT = frozenset({"log_prob"})
Build = Callable[..., CausalLMPolicy]


def rollout(policy: CausalLMPolicy, task: TextTask, **options: Any) -> Any:
    return TokenCollector(task, seed=0, **options).collect(Request(counts=torch.full((4,), 16)), policy)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
def test_layers_computed_again_give_the_same_gradient(build: Build, task: TextTask, name: str) -> None:
    """64 completions of 4 prompts: without it prompts are shared, with it they are not. A copy of the policy computes
    its own layers."""
    plain, again = build(name).double(), copy.deepcopy(build(name, gradient_checkpointing=True)).double()
    data = rollout(plain, task)
    gradients = []
    for policy in (plain, again):
        (policy(data, WANT)["log_prob"] * data["valid"]).sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)  # norms round to float32
    with torch.no_grad():
        torch.testing.assert_close(rollout(again, task)["log_prob"], data["log_prob"])


def test_layers_are_computed_twice(build: Build, task: TextTask) -> None:
    policy = build("llama", gradient_checkpointing=True)
    data, calls = rollout(policy, task), list[int]()
    policy.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, index]
    loss = policy(data, WANT)["log_prob"].sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


def test_a_model_without_layers_is_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="gradient_checkpointing: expected a model whose layers"):
        checkpoint_layers(torch.nn.Linear(2, 2))


def test_bfloat16(build: Build, task: TextTask) -> None:
    """Weights, gradients and log-probabilities stay float32; scores are near those of float32 and are not them."""
    exact, half = build("llama"), build("llama", dtype=torch.bfloat16)
    data = rollout(half, task)
    ours, theirs = half(data, WANT)["log_prob"], exact(data, WANT)["log_prob"]
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, theirs)
    inside = data["valid"] > 0
    assert float((ours - theirs).detach()[inside].abs().mean()) < 0.1
    assert float((ours.detach() - data["log_prob"])[inside].abs().mean()) < 0.1
    ours.sum().backward()
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}


P = torch.tensor([[0.1, 0.4, 0.3, 0.2]])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 2}, [0, 1, 1, 0]),
        ({"top_k": 9}, [1, 1, 1, 1]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),  # the first token always
        ({"top_p": 0.6}, [0, 1, 1, 0]),  # .4 < .6 <= .7
        ({"top_p": 0.8}, [0, 1, 1, 1]),
        ({"top_p": 0.5, "top_k": 2}, [0, 1, 0, 0]),  # of .4 + .3 the first is .571
    ],
)
def test_truncate(options: dict[str, Any], kept: list[int]) -> None:
    assert truncate(P.log(), **options).isfinite().int().tolist() == [kept]


def test_samples_are_truncated_and_scores_are_not(build: Build, task: TextTask) -> None:
    policy = build("llama")
    data = rollout(policy, task, top_k=1)
    greedy = TokenCollector(task, seed=0).sample(
        policy, task.prompts(4, torch.Generator().manual_seed(0)).select(torch.arange(4)), torch.arange(4),
        deterministic=True,
    )  # fmt: skip
    assert greedy["action"].shape[1] == 4
    first = data["action"][:, ::16]
    assert torch.equal(data["action"], first.repeat_interleave(16, 1))  # one completion per prompt
    inside = data["valid"] > 0
    torch.testing.assert_close(data["log_prob"][inside], policy(data, WANT)["log_prob"][inside], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="top_p, top_k"):
        TokenCollector(task, top_p=0.0)


def factors(**options: Any) -> list[float]:
    quarter = torch.tensor(0.25, dtype=torch.float64)
    return [float(rate_factor(i * quarter, quarter, **options)) for i in range(4)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shape": "constant", "warmup": 0.0}, [1, 1, 1, 1]),
        ({"shape": "linear", "warmup": 0.0}, [1, 0.75, 0.5, 0.25]),
        ({"shape": "cosine", "warmup": 0.0}, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ({"shape": "constant", "warmup": 0.5}, [0.5, 1, 1, 1]),
        ({"shape": "linear", "warmup": 0.5}, [0.5, 1, 1, 0.5]),
        ({"shape": "linear", "warmup": 0.1}, [1, 1 - 0.15 / 0.9, 1 - 0.4 / 0.9, 1 - 0.65 / 0.9]),
    ],
)
def test_step_sizes(options: dict[str, Any], expected: list[float]) -> None:
    found: list[float] = factors(**options)
    assert found == pytest.approx(expected)
    assert isinstance(rate_factor(torch.zeros(()), torch.ones(()), **options), Tensor)
