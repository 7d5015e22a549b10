"""Every method of the registry keeps the contract of recipes, or says why not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm import METHODS
from agents.llm.baselines import GRPO
from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Stage
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.terms import Aggregate, Loss
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

BINARY = frozenset({"real"})
"""Methods that take no scores but 0 and 1."""

EQUAL = "test_equal_rewards_have_no_gradient"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "cispo": {"test_finite_differences": DETACHED},
    "copg": {EQUAL: "its reward holds the KL to the reference, which differs between sequences of one score"},
    "dcpo": {EQUAL: "right samples steer the entropy, also where all are right"},
    "hpt": {EQUAL: "a prompt without success is imitated"},
    "mhpo": {"test_finite_differences": DETACHED},
    "r2vpo": {EQUAL: "the variance of the ratio is penalised whatever the rewards"},
    "reinforce": {"test_finite_differences": DETACHED, EQUAL: KL},
    "riskpo": {"test_order_of_the_sequences_does_not_matter": "bundles are drawn by where responses stand"},
    "rloo": {"test_finite_differences": DETACHED, EQUAL: KL},
    "sft": {EQUAL: "reads no rewards"},
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


# -- the contract itself: recipes with a fault are found ------------------------------------------------------------


class ByPosition(Recipe):
    """Weighs columns by where they stand."""

    def stages(self) -> tuple[Stage, ...]:
        def weigh(data: Data) -> Data:
            return data.derive(advantage=data["advantage"] * torch.arange(data.shape[1]))

        return (*super().stages(), weigh)


class LocalCounts(Recipe):
    """Divides by the tokens of the piece at hand."""

    def aggregate(self) -> Aggregate:
        return lambda valid, batch: valid / valid.sum()


class CountsPadding(Recipe):
    """Divides by the padded length."""

    def aggregate(self) -> Aggregate:
        return lambda valid, batch: valid / (valid.shape[0] * batch["n_sequences"])


class CountsColumns(Recipe):
    """Divides by the padded width."""

    def aggregate(self) -> Aggregate:
        return lambda valid, batch: valid / valid.shape[1]


class NoBaseline(Recipe):
    """Takes the scores as advantages."""

    def stages(self) -> tuple[Stage, ...]:
        return (lambda data: data.derive(advantage=data["episode_reward"] * data["valid"]),)


class Halved(Recipe):
    """Forgets a factor."""

    def loss(self) -> Loss:
        whole = super().loss()
        return lambda *args: 0.5 * whole(*args)


class HalfDetached(Recipe):
    """Stops a gradient where there should be one."""

    def loss(self) -> Loss:
        whole = super().loss()
        return lambda level, *args: whole(
            level._replace(log_prob=level.log_prob.lerp(level.log_prob.detach(), 0.5)), *args
        )


class UnsavedState(Recipe):
    """Counts rollouts where no checkpoint looks."""

    seen = 0

    def stages(self) -> tuple[Stage, ...]:
        def weigh(data: Data) -> Data:
            self.seen += 1
            return data.derive(advantage=data["advantage"] * self.seen)

        return (*super().stages(), weigh)


class GradientsInStages(Recipe):
    """Keeps a column with a gradient to the live policy."""

    def stages(self) -> tuple[Stage, ...]:
        def keep(data: Data) -> Data:
            with torch.enable_grad():
                live: Tensor = self.parts.policy(data, frozenset({"log_prob"}))["log_prob"]
            return data.derive(live=live)

        return (*super().stages(), keep)


@pytest.mark.parametrize(
    ("recipe", "test"),
    [
        (ByPosition, "test_order_of_the_sequences_does_not_matter"),
        (LocalCounts, "test_micro_batches_add_up"),
        (CountsPadding, "test_padded_steps_change_nothing"),
        (CountsColumns, "test_padded_columns_change_nothing"),
        (NoBaseline, EQUAL),
        (Halved, "test_on_policy_gradient_is_reinforce"),
        (HalfDetached, "test_finite_differences"),
        (UnsavedState, "test_trains_and_resumes_on_a_bandit"),
        (GradientsInStages, "test_only_the_live_policy_gets_gradients"),
    ],
)
def test_faults_are_found(recipe: type[Recipe], test: str, tmp_path: Path) -> None:
    agent = type("Broken", (GRPO,), {"Recipe": recipe})
    members = {"agent": agent, "on_policy": aggregates.sequence_mean_token_mean}
    contract = type("Contract", (RecipeContract,), members)()
    arguments = (tmp_path,) if "resumes" in test else ()
    with pytest.raises(AssertionError):
        getattr(contract, test)(*arguments)
    sound = type("Sound", (RecipeContract,), members | {"agent": GRPO})()
    getattr(sound, test)(*arguments)
