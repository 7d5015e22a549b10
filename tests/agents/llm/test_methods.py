"""Methods as objects: by name, by module:name, called with settings, as classes of agents."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import agents
from agents.llm import METHODS, get_method
from agents.llm.agent import LLM
from agents.llm.baselines import GRPO, GRPOConfig
from agents.llm.config import GenerationConfig, ModelConfig, OptimiserConfig, RolloutConfig
from ccrl.estimators.recipe import Method, MethodConfig, Recipe
from ccrl.testing.recipe_contract import RaggedTask

MINE = Method("mine", "Doe 2026", MethodConfig, Recipe, {"advantage": "group z-score"}, {"n_prompts": 3})
"""As somebody else's package would have it."""
HERE = f"{__name__}:MINE"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_name_is_a_method_and_every_setting_has_one_home(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, Method)
    assert method.name == name
    parts = (method.Config, GenerationConfig, ModelConfig, OptimiserConfig, RolloutConfig)
    names = [f.name for part in parts for f in fields(part)]
    assert len(names) == len(set(names))
    assert method.defaults.keys() <= {f.name for part in parts[1:] for f in fields(part)}
    cls = agents.get_agent(name)
    assert cls is agents.get_agent(name) is LLM.of(method)
    assert (cls.name, cls.paper, cls.slots()) == (name, method.paper, dict(method.slots))
    assert {f.name for f in fields(cls.Config)} == set(names)
    assert all(getattr(cls.Config(), key) == value for key, value in method.defaults.items())


def test_a_method_is_called_with_settings() -> None:
    agent = GRPO(RaggedTask(), group_size=5, model="tabular", n_prompts=3, seed=4)
    assert (agent.config.group_size, agent.config.model, agent.seed) == (5, "tabular", 4)
    same = GRPO(RaggedTask(), GRPOConfig(group_size=5), model="tabular", n_prompts=3)
    assert same.config == GRPO(RaggedTask(), GRPO.Settings(group_size=5, model="tabular", n_prompts=3)).config
    assert same.config == agent.config
    with pytest.raises(TypeError, match=r"grpo has no setting 'group_sise'; did you mean .*group_size"):
        GRPO(RaggedTask(), group_sise=5)
    with pytest.raises(TypeError, match="config: expected GRPOSettings, got dict"):
        GRPO(RaggedTask(), {"group_size": 5})


def test_a_method_of_somebody_else(tmp_path: Path) -> None:
    """By the string that the caller wrote, which is also what checkpoints call it."""
    import sys

    sys.modules.setdefault("somewhere", sys.modules[__name__])
    cls = agents.get_agent("somewhere:MINE")
    assert cls is LLM.of(MINE, "somewhere:MINE")
    agent = cls(RaggedTask(), model="tabular")
    assert agent.config.n_prompts == 3
    agent.learn(1)
    agent.save(tmp_path / "agent.pt")
    loaded = cls.load(tmp_path / "agent.pt", env=RaggedTask())
    assert loaded.iteration == 1
    with pytest.raises(ValueError, match="expected a checkpoint of mine, got one of 'somewhere:MINE'"):
        LLM.of(MINE).load(tmp_path / "agent.pt", env=RaggedTask())


@pytest.mark.parametrize("name", ["copg", "dpo", "ipo", "mhpo", "real", "sft", "hpt"])
def test_settings_that_would_do_nothing_are_refused(name: str) -> None:
    config = get_method(name).Config
    with pytest.raises(ValueError, match=r"clip_low.*: expected 0\.2 .*got 0\.1"):
        config(clip_low=0.1)
    assert config(clip_low=0.2).clip_high == 0.2


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("grop", "no method 'grop'; did you mean grpo"),
        ("agents.llm.baselines:GRPOConfig", "expected a Method at agents.llm.baselines:GRPOConfig, got type"),
    ],
)
def test_names_that_are_no_methods(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        get_method(name)


def test_what_is_neither_agent_nor_method() -> None:
    with pytest.raises(ValueError, match=r"expected an agent class or a Method at agents\.llm:METHODS, got dict"):
        agents.get_agent("agents.llm:METHODS")
