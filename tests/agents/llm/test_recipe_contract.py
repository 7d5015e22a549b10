"""The contract of recipes finds recipes with a fault, and every method has one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm import METHODS
from agents.llm.agent import LLMMethod
from agents.llm.baselines import GRPO, DrGRPO
from agents.llm.preferences import SFT
from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.terms import Aggregate, LogRatio, Loss, Outputs, Term
from ccrl.settings import Positive
from ccrl.testing.recipe_contract import RecipeContract
from ccrl.updaters import Stats

EQUAL = "test_equal_rewards_have_no_gradient"


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


class UnaskedStatistics(Recipe):
    """Reads statistics that are not always taken."""

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        stats["twice"] = 2.0 * stats["approx_kl"]


@pytest.mark.parametrize(
    ("recipe", "test"),
    [
        (UnaskedStatistics, "test_trains_and_resumes_on_a_bandit"),
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
    members = {"on_policy": aggregates.sequence_mean_token_mean}
    broken, sound = (
        type("Contract", (RecipeContract,), members | {"method": method})()
        for method in (replace(GRPO, Recipe=recipe), GRPO)
    )
    arguments = (tmp_path,) if "resumes" in test else ()
    with pytest.raises(AssertionError):
        getattr(broken, test)(*arguments)
    getattr(sound, test)(*arguments)


@pytest.mark.parametrize(
    ("attributes", "test"),
    [
        ({"published": {"clip_high": 0.3}}, "test_defaults_are_the_published_ones"),
        (
            {"published": {"aggregate": "sequence_mean_token_mean", "clips": 0.3}},
            "test_defaults_are_the_published_ones",
        ),
        ({"method": DrGRPO}, "test_defaults_are_the_published_ones"),
        ({"matters": (({}, {"clip_low": 0.2}),)}, "test_other_settings_are_other_gradients"),
        ({"refused": {"trl": "anything"}}, "test_inside_other_trainers"),
        ({"method": SFT, "refused": {}}, "test_inside_other_trainers"),
    ],
)
def test_claims_are_checked(attributes: dict[str, Any], test: str) -> None:
    contract = type("Contract", (RecipeContract,), {"method": GRPO} | attributes)()
    with pytest.raises((AssertionError, ValueError)):
        getattr(contract, test)()


def test_every_method_has_a_contract() -> None:
    """In a file beside this one; whoever registers a method writes one class."""
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for where in METHODS.values():
        name = where.partition(":")[2]
        assert f"(RecipeContract):\n    method = {name}\n" in text, f"{name}: no contract tests"


# -- a method that reads hidden states -----------------------------------------------------------------------------


@dataclass(frozen=True)
class NearConfig(MethodConfig):
    """Tokens whose hidden state is large weigh less."""

    scale: Positive = 2.0
    """A token weighs exp(-|h| / scale), |h| the root mean square of its hidden state."""


class NearRecipe(Recipe):
    """A weight from the forward pass of the loss."""

    def terms(self) -> tuple[Term, ...]:
        whole, scale = self.loss(), self.config.scale

        def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            size = outputs["hidden"].detach().square().mean(-1).sqrt()
            return whole(ratio, advantage, outputs, batch) * torch.exp(-size / scale)

        return (self.policy_term(loss, want=frozenset({"log_prob", "hidden"})), *self.penalties())


NEAR = LLMMethod(
    "near", "nobody", NearConfig, NearRecipe, {"loss": "clip, weighted by hidden states"}, {"n_prompts": 5}
)


class TestNearContract(RecipeContract):
    method = NEAR
    published = {"scale": 2.0, "n_prompts": 5}
    model = "tiny"
    matters = (({}, {"scale": 0.5}),)
    refused = {"trl": "wants ['hidden']", "verl": "wants ['hidden']"}
    exceptions = {
        "test_finite_differences": "the weight is detached: the value has another slope",
        "test_trains_and_resumes_on_a_bandit": "a table has no hidden states",
    }
