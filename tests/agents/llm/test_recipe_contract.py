"""Every method of the registry keeps the contract of recipes, or says why not."""

from __future__ import annotations

import importlib
from typing import Any

from agents.llm import METHODS
from ccrl.estimators import aggregates
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

OPTIONS: dict[str, dict[str, Any]] = {
    "reinforce": {"kl_coef": 0.1},
    "rloo": {"kl_coef": 0.1},
    "sft": {"group_size": 1, "n_prompts": 6},
}
"""Settings that make a method show what it does. ``kl_coef`` keeps a reference."""

DETACHED = "its loss holds a factor constant that moves with the parameters: the value has another slope"
KL = "k1 in the reward differs between sequences of one score"

ON_POLICY = {
    "cispo": aggregates.mean,
    "dapo": aggregates.mean,
    "grpo": aggregates.sequence_mean_token_mean,
    "gspo": aggregates.sequence_mean_token_mean,
    "dr_grpo": aggregates.length_constant(RaggedTask.fixed_length),
    "ppo_llm": aggregates.mean,
    "reinforce": aggregates.sequence_mean,
    "rloo": aggregates.sequence_mean,
    "sapo": aggregates.sequence_mean_token_mean,
}
"""Methods whose gradient on the policy that sampled is REINFORCE's, and the aggregation with which it is."""

BINARY: frozenset[str] = frozenset()
"""Methods that take no scores but 0 and 1."""

EXCEPTIONS: dict[str, dict[str, str]] = {
    "cispo": {"test_finite_differences": DETACHED},
    "reinforce": {"test_finite_differences": DETACHED, "test_equal_rewards_have_no_gradient": KL},
    "riskpo": {"test_order_of_the_sequences_does_not_matter": "draws bundles of responses at random"},
    "rloo": {"test_finite_differences": DETACHED, "test_equal_rewards_have_no_gradient": KL},
    "sft": {
        "test_equal_rewards_have_no_gradient": "reads no rewards",
    },
}
"""Method -> test -> why it does not hold."""


def _contract(method: str) -> type[RecipeContract]:
    module, name = METHODS[method]
    members = {
        "agent": getattr(importlib.import_module(module), name),
        "options": OPTIONS.get(method, {}),
        "graded": method not in BINARY,
        "on_policy": ON_POLICY.get(method),
        "exceptions": EXCEPTIONS.get(method, {}),
    }
    return type(f"Test_{method}", (RecipeContract,), members)


for _method in METHODS:
    globals()[f"Test_{_method}"] = _contract(_method)


def test_lists_name_methods_that_there_are() -> None:
    assert not (OPTIONS.keys() | ON_POLICY.keys() | EXCEPTIONS.keys() | BINARY) - METHODS.keys()
