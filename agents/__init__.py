"""Agents by name, in ``ccrl.registry.agents``. Importing this package loads none of them: each class is imported when
it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agents.flow import METHODS as FLOW_METHODS
from agents.llm import METHODS, get_method
from ccrl import registry

if TYPE_CHECKING:
    from agents.a2c import A2C
    from agents.bac import BAC
    from agents.bpg import BPG
    from agents.bpo import BPO
    from agents.crossq import CrossQ
    from agents.dbqpg import DBQPG
    from agents.detan import DetaN
    from agents.dqn import DQN, QRDQN
    from agents.flow.flow_ppo import FlowPPO
    from agents.grouped import Grouped
    from agents.harpg import HARPG
    from agents.hdpo import HDPO
    from agents.mdpo import MDPO, OffPolicyMDPO
    from agents.npg_igt import NPGIGT
    from agents.offline.bc import BC
    from agents.offline.cdsa import CDSA
    from agents.offline.iql import IQL
    from agents.offline.pgd import PGD
    from agents.offline.rebrac import ReBRAC
    from agents.offline.td3_bc import TD3BC
    from agents.orpo import ORPO
    from agents.ppo import PPO
    from agents.sac import SAC
    from agents.subpo import SubPO
    from agents.td3 import TD3

__all__ = [
    "A2C",
    "AGENTS",
    "BAC",
    "BC",
    "BPG",
    "BPO",
    "CDSA",
    "DBQPG",
    "DQN",
    "FLOW_METHODS",
    "HARPG",
    "HDPO",
    "IQL",
    "MDPO",
    "METHODS",
    "NPGIGT",
    "ORPO",
    "PGD",
    "PPO",
    "QRDQN",
    "SAC",
    "TD3",
    "TD3BC",
    "CrossQ",
    "DetaN",
    "FlowPPO",
    "Grouped",
    "OffPolicyMDPO",
    "ReBRAC",
    "SubPO",
    "get_agent",
    "get_method",
]  # fmt: skip

AGENTS = {
    "a2c": ("agents.a2c", "A2C"),
    "bac": ("agents.bac", "BAC"),
    "bc": ("agents.offline.bc", "BC"),
    "bpg": ("agents.bpg", "BPG"),
    "bpo": ("agents.bpo", "BPO"),
    "cdsa": ("agents.offline.cdsa", "CDSA"),
    "crossq": ("agents.crossq", "CrossQ"),
    "dbqpg": ("agents.dbqpg", "DBQPG"),
    "detan": ("agents.detan", "DetaN"),
    "dqn": ("agents.dqn", "DQN"),
    "flow_ppo": ("agents.flow.flow_ppo", "FlowPPO"),
    "grouped": ("agents.grouped", "Grouped"),
    "harpg": ("agents.harpg", "HARPG"),
    "hdpo": ("agents.hdpo", "HDPO"),
    "iql": ("agents.offline.iql", "IQL"),
    "mdpo": ("agents.mdpo", "MDPO"),
    "mdpo_off_policy": ("agents.mdpo", "OffPolicyMDPO"),
    "npg_igt": ("agents.npg_igt", "NPGIGT"),
    "orpo": ("agents.orpo", "ORPO"),
    "pgd": ("agents.offline.pgd", "PGD"),
    "ppo": ("agents.ppo", "PPO"),
    "qr_dqn": ("agents.dqn", "QRDQN"),
    "rebrac": ("agents.offline.rebrac", "ReBRAC"),
    "sac": ("agents.sac", "SAC"),
    "subpo": ("agents.subpo", "SubPO"),
    "td3": ("agents.td3", "TD3"),
    "td3_bc": ("agents.offline.td3_bc", "TD3BC"),
}
"""Command-line name -> module and class; those for language models are ``agents.llm.METHODS``, those for flow policies
``FLOW_METHODS``."""


def get_agent(name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The agent class called ``name``: of ours, of a plugin, or ``module:name`` in somebody else's package (an agent
    class, or a ``Method`` for language models).

    :param settings: settings of the agent, as far as they are known: what other settings there are may depend on them
        (on grouped's ``method``).
    :raises ValueError: an unknown name, with near matches.
    """
    found = get_method(name) if name in registry.methods else registry.agents.get(name)
    if not isinstance(found, type):
        from agents.llm.agent import LLM
        from ccrl.estimators.recipe import Method

        if not isinstance(found, Method):
            raise ValueError(f"agent: expected an agent class or a Method at {name}, got {type(found).__name__}")
        return found.agent(name) if hasattr(found, "agent") else LLM.of(found, name)
    if missing := [part for part in ("name", "Config", "learn") if not hasattr(found, part)]:
        raise ValueError(f"agent: expected a subclass of agents.base.Agent with a name and a Config at {name}, got "
                         f"{found.__name__} without {', '.join(missing)}")  # fmt: skip
    method = dict(settings or {}).get("method")
    return found.of(method) if method is not None and hasattr(found, "of") else found


for _name, (_module, _class) in AGENTS.items():
    registry.agents.register(_name, f"{_module}:{_class}")
for _name, _where in FLOW_METHODS.items():
    registry.agents.register(_name, _where)
for _name, _where in METHODS.items():
    registry.agents.register(_name, _where)
    registry.methods.register(_name, _where)


def __getattr__(name: str) -> Any:
    for module, cls in AGENTS.values():
        if cls == name:
            return getattr(importlib.import_module(module), cls)
    for where in (*METHODS.values(), *FLOW_METHODS.values()):
        module, _, method = where.partition(":")
        if method == name:
            return getattr(importlib.import_module(module), method)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")
