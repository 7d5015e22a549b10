"""Every field of every agent's configuration refuses what it cannot use, and explains itself."""

from __future__ import annotations

from typing import Any

import pytest

from agents import AGENTS, get_agent
from agents.llm.config import GenerationConfig, ModelConfig, OptimiserConfig, RolloutConfig
from ccrl.testing.settings_contract import settings_faults

TEXTS = {"base", "clone_from", "dataset", "method", "reference"}
"""Settings that may hold any text. Those of methods are in their contracts."""


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_fields(name: str) -> None:
    assert settings_faults(get_agent(name).Config(), TEXTS) == []


@pytest.mark.parametrize("part", [GenerationConfig, ModelConfig, OptimiserConfig, RolloutConfig])
def test_fields_beside_a_method(part: Any) -> None:
    free = ("model", "generation", "generation_model", "generation_weights")
    assert settings_faults(part(), free) == []
