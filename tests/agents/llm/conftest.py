"""Small batches of tokens, recipes without an agent, and what must hold of every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Batching, Data, Unit
from ccrl.estimators.recipe import Parts, Recipe
from ccrl.estimators.terms import surrogate


def _rollout(old: Any, mask: Any, **columns: Any) -> Data:
    """``(B, T)`` lists as a rollout ``[T, B]`` in float64; one-dimensional ones hold one number per sequence."""
    found = {"log_prob": torch.as_tensor(old, dtype=torch.float64), "valid": torch.as_tensor(mask, dtype=torch.float64)}
    found |= {name: torch.as_tensor(value) for name, value in columns.items()}
    found.setdefault("group", torch.zeros(found["valid"].shape[0], dtype=torch.int64))
    sequence = frozenset(name for name, value in found.items() if value.dim() == 1)
    return Data({k: v if k in sequence else v.t() for k, v in found.items()}, sequence=sequence)


def _batch(old: Any, mask: Any, unit: Unit = "sequence", **columns: Any) -> Data:
    return _rollout(old, mask, **columns).epoch(Batching(unit, "full"), None)[0]


def _value_and_gradient(recipe: Recipe, log_prob: Any, batch: Data) -> tuple[float, Tensor]:
    """The surrogate of a recipe and its gradient ``(B, T)`` with respect to ``log_prob`` ``(B, T)``."""
    leaf = torch.as_tensor(log_prob, dtype=torch.float64).clone().requires_grad_()
    total, _ = surrogate(recipe.phases()[0].terms, {"log_prob": leaf.t()}, batch)
    (gradient,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), gradient


def _recipe(cls: type[Recipe], config: Any, policy: nn.Module | None = None) -> Recipe:
    parts = Parts(policy or nn.Identity(), None, Request(counts=torch.ones(1, dtype=torch.int64)), 8)  # type: ignore[arg-type]
    return cls(config, parts)


def _resumes(cls: type[Any], task: str, config: Any, path: Path) -> None:
    """Two iterations, a checkpoint, two more: the same parameters as four without one."""
    whole, part = cls(task, config, seed=3), cls(task, config, seed=3)
    size = whole.samples_per_iteration
    whole.learn(until=4 * size)
    part.learn(until=2 * size)
    part.save(path)
    part = cls.load(path)
    part.learn(until=4 * size)
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, part.policy.state_dict()[name]), name
    for name, value in whole.estimator.state_dict().items():
        assert torch.equal(value, part.estimator.state_dict()[name]), name


@pytest.fixture
def rollout() -> Callable[..., Data]:
    return _rollout


@pytest.fixture
def batch() -> Callable[..., Data]:
    return _batch


@pytest.fixture
def value_and_gradient() -> Callable[..., tuple[float, Tensor]]:
    return _value_and_gradient


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    return _recipe


@pytest.fixture
def resumes() -> Callable[..., None]:
    return _resumes
