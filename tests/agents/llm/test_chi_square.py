"""Chi-square penalties to the reference in a recipe for language models: as a stage and as a term."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import envs  # noqa: F401  (registers tasks)
from agents.llm.agent import LLMMethod
from ccrl.estimators import aggregates
from ccrl.estimators.divergences import ChiSquarePenalty, reference_product, sequence_chi_square
from ccrl.estimators.recipe import MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import Term


@dataclass(frozen=True)
class Config(MethodConfig):
    weight: float = 0.0
    """The penalty has this weight."""


class Staged(Recipe):
    wants_reference = True

    def stages(self):
        return (ChiSquarePenalty(self.config.weight), GroupBaseline(reward="shaped_episode_reward"))


class Termed(Recipe):
    wants_reference = True

    def penalties(self):
        loss, weight = sequence_chi_square(), self.config.weight
        return (Term("chi2", loss, aggregates.sequence_mean, reference_product, advantage=None, coef=weight),)


@pytest.mark.parametrize("recipe", [Staged, Termed])
def test_it_keeps_a_language_model_near_its_reference(recipe):
    method = LLMMethod("near", "this test", Config, recipe, {"advantage": "penalised"}, defaults={"n_prompts": 16})
    moved = {}
    for weight in (0.0, 20.0):
        agent = method("modsum", model="tabular", learning_rate=0.1, n_epochs=2, weight=weight, seed=0)
        agent.learn(total_timesteps=8 * agent.samples_per_iteration)
        start, now = agent.ctx.bank.policy("ref").state_dict(), agent.policy.state_dict()
        moved[weight] = sum(float((now[k] - start[k]).square().sum()) for k in now if now[k].is_floating_point())
    assert moved[20.0] < 0.8 * moved[0.0]
