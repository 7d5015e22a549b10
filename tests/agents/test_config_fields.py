"""Every field of every agent's configuration refuses what it cannot use, and explains itself."""

from __future__ import annotations

import pytest

from agents import AGENTS, get_agent
from ccrl.testing.settings_contract import settings_faults

NOT_YET = {"grouped"}


@pytest.mark.parametrize("name", sorted(AGENTS.keys() - NOT_YET))
def test_fields(name: str) -> None:
    assert settings_faults(get_agent(name).Config(), texts={"base", "dataset"}) == []
