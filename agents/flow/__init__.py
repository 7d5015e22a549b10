"""Methods for flow and diffusion policies by name, one file per paper. Importing this package loads none of them."""

from __future__ import annotations

__all__ = ["METHODS"]

METHODS = {
    "awm": "agents.flow.awm:AWM",
    "diffusion_nft": "agents.flow.diffusion_nft:DiffusionNFT",
    "diffusion_opd": "agents.flow.diffusion_opd:DiffusionOPD",
    "flow_grpo": "agents.flow.flow_grpo:FlowGRPO",
    "grpo_guard": "agents.flow.grpo_guard:GRPOGuard",
}
"""Command-line name -> ``module:name`` of the ``Method``."""
