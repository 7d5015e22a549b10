"""Methods for language models by name, one file per paper. Importing this package loads none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccrl import registry

if TYPE_CHECKING:
    from ccrl.estimators.recipe import Method

__all__ = ["METHODS", "get_method"]

METHODS = {
    "adora": "agents.llm.adora:ADORA",
    "bnpo": "agents.llm.bnpo:BNPO",
    "capo": "agents.llm.capo:CAPO",
    "cispo": "agents.llm.baselines:CISPO",
    "copg": "agents.llm.copg:CoPG",
    "copo": "agents.llm.copo:COPO",
    "d3s": "agents.llm.d3s:D3S",
    "dapo": "agents.llm.baselines:DAPO",
    "dcpo": "agents.llm.dcpo:DCPO",
    "div_prec": "agents.llm.div_prec:DivPrec",
    "dpo": "agents.llm.preferences:DPO",
    "dr_grpo": "agents.llm.baselines:DrGRPO",
    "empg": "agents.llm.empg:EMPG",
    "epo": "agents.llm.epo:EPO",
    "etr": "agents.llm.etr:ETR",
    "g2rpo": "agents.llm.g2rpo:G2RPO",
    "gbpo": "agents.llm.gbpo:GBPO",
    "gdpo": "agents.llm.gdpo:GDPO",
    "grpo": "agents.llm.baselines:GRPO",
    "gspo": "agents.llm.baselines:GSPO",
    "hpt": "agents.llm.hpt:HPT",
    "ipo": "agents.llm.preferences:IPO",
    "knapsack_rl": "agents.llm.knapsack_rl:KnapsackRL",
    "mhpo": "agents.llm.mhpo:MHPO",
    "oblr_po": "agents.llm.oblr_po:OBLRPO",
    "mmr1_vas": "agents.llm.mmr1_vas:MMR1",
    "p3o": "agents.llm.p3o:P3O",
    "pf_ppo": "agents.llm.pf_ppo:PFPPO",
    "polar": "agents.llm.polar:POLAR",
    "ppo_llm": "agents.llm.reinforce:PPO",
    "r2vpo": "agents.llm.r2vpo:R2VPO",
    "real": "agents.llm.real:REAL",
    "reinforce": "agents.llm.reinforce:REINFORCE",
    "riskpo": "agents.llm.riskpo:RiskPO",
    "rloo": "agents.llm.reinforce:RLOO",
    "rpo": "agents.llm.rpo:RPO",
    "sapo": "agents.llm.baselines:SAPO",
    "sft": "agents.llm.preferences:SFT",
    "v0": "agents.llm.v0:V0",
}
"""Command-line name -> ``module:name`` of the ``Method``."""


def get_method(name: str) -> Method:
    """The method called ``name``: of ours, of a plugin, or ``module:name`` in somebody else's package.

    :raises ValueError: an unknown name, with near matches, or an object that is no method.
    """
    from ccrl.estimators.recipe import Method

    found = registry.methods.get(name)
    if not isinstance(found, Method):
        raise ValueError(f"method: expected a Method at {name}, got {type(found).__name__}")
    return found
