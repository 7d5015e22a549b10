"""Every setting reaches what it is for: another value gives another gradient on the same rollout."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm import METHODS
from ccrl.testing.recipe_contract import RecipeContract

LENGTHS, ENTROPIES = ((2.0, 3.0, 4.0, 6.0),), ((0.0, 0.5),)
SHOWN = {"length_bounds": LENGTHS}
CORRIDOR = {"entropy_bounds": ENTROPIES}
RELEASED = {"form": "released", "bundle": 2}
LUFFY = {"mixture": "luffy"}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # what all recipes share
    ("grpo", {}, {"clip_low": 0.01}),
    ("grpo", {}, {"clip_high": 0.01}),
    ("grpo", {}, {"entropy_coef": 0.1}),
    ("grpo", {"kl_coef": 0.1}, {"kl_coef": 0.2}),
    ("grpo", {}, {"aggregate": "token_mean"}),
    ("grpo", {}, {"aggregate": "sequence_mean"}),
    ("grpo", {}, {"aggregate": "fixed"}),
    ("grpo", {}, {"temperature": 2.0}),
    # baselines
    ("reinforce", {}, {"baseline": "none"}),
    ("rloo", {}, {"form": "sequence_clip"}),
    ("rloo", {}, {"normalise": True}),
    ("ppo_llm", {}, {"baseline": "none", "whiten": False}),
    ("ppo_llm", {}, {"whiten": False}),
    ("ppo_llm", {}, {"dual_clip": 1.01}),
    ("dapo", {"max_tries": 1}, {"max_tries": 1, "overlong_share": 0.6}),
    ("gspo", {"clip_low": 0.2}, {"clip_low": 0.01}),
    ("cispo", {}, {"bound": "cap"}),
    ("cispo", {"bound": "cap"}, {"bound": "cap", "cap": 1.1}),
    ("sapo", {}, {"tau_positive": 2.0}),
    ("sapo", {}, {"tau_negative": 2.0}),
    ("dpo", {}, {"beta": 0.5}),
    ("dpo", {}, {"pairs": "demonstrations"}),
    ("ipo", {}, {"tau": 0.5}),
    ("ipo", {}, {"length_normalised": True}),
    # papers
    ("bnpo", {}, {"reward_min": -1.0}),
    ("bnpo", {}, {"reward_max": 3.0}),
    ("bnpo", {}, {"max_weight": 0.1}),
    ("bnpo", {}, {"decompose": False}),
    ("bnpo", {}, {"dual_clip": 1.01}),
    ("copg", {}, {"beta": 0.1}),
    ("copg", {}, {"behaviours": ("live", "ref")}),
    ("d3s", {}, {"rollouts_init": 1.0}),
    ("d3s", {}, {"batch_share": 1.0}),
    ("d3s", {}, {"tokens_init": 0.9}),
    ("d3s", {"tokens_init": 0.5}, {"tokens_init": 0.5, "token_pool": "response"}),
    ("d3s", {}, {"base": "gspo"}),
    ("dcpo", {}, {"entropy_target": 0.05}),
    ("dcpo", {}, {"hot": 2.0}),
    ("dcpo", {}, {"gap_cap": 0.4}),
    ("dcpo", {}, {"correct_above": 1.0}),
    ("dcpo", {}, {"dual_clip": 1.01}),
    ("empg", {"step": "token"}, {"step": "token", "scale": 0.1}),
    ("empg", {"step": "token"}, {"step": "token", "clarity": 3.0}),
    ("empg", {"step": "token"}, {"step": "token", "zeta": 1.0}),
    ("empg", {}, {"step": "token"}),
    ("empg", {}, {"step": "delimiter", "delimiter": 2}),
    ("g2rpo", {}, {"pool": "kind"}),
    ("g2rpo", {}, {"tie": 0.5}),
    ("g2rpo", {"group_size": 2}, {"group_size": 2, "drop_unanimous": False}),
    ("g2rpo", {}, SHOWN),
    ("g2rpo", SHOWN, SHOWN | {"length_coef": 0.01}),
    ("g2rpo", {}, CORRIDOR),
    ("g2rpo", CORRIDOR, CORRIDOR | {"corridor_coef": 1.0}),
    ("g2rpo", CORRIDOR, CORRIDOR | {"entropy_estimate": "sampled"}),
    ("gbpo", {}, {"target_temperature": 1.0}),
    ("gbpo", {"clip_high": 0.4}, {"clip_high": 0.4, "threshold": "median"}),
    ("gdpo", {}, {"weights": (1.0, 0.25)}),
    ("gdpo", {}, {"conditioned": ("grade",), "condition": "accuracy"}),
    (
        "gdpo",
        {"conditioned": ("accuracy",), "condition": "grade"},
        {"conditioned": ("accuracy",), "condition": "grade", "threshold": 0.1},
    ),
    ("gdpo", {}, {"batch_norm": "token"}),
    ("gdpo", {}, {"batch_norm": "none"}),
    ("gdpo", {}, {"group_eps": 0.5}),
    ("gdpo", {}, {"batch_eps": 0.5}),
    ("gdpo", {"group_size": 1}, {"group_size": 1, "single": "keep"}),
    ("hpt", {}, {"gate": 0.5}),
    ("hpt", {"gate": 0.5}, {"gate": 0.5, "mixture": "switch_off"}),
    ("hpt", {}, {"mixture": "soft"}),
    ("hpt", {}, {"mixture": "fixed"}),
    ("hpt", {}, LUFFY),
    ("hpt", {}, {"mixture": "srft"}),
    ("hpt", {"mixture": "fixed"}, {"mixture": "fixed", "rl_share": 0.9}),
    ("hpt", {}, {"rl_norm": "token_mean"}),
    ("hpt", {"rl_norm": "token_mean"}, {"rl_norm": "seq_mean"}),
    ("hpt", {"gate": 0.5}, {"gate": 0.5, "sft_coef": 0.3}),
    ("hpt", {}, {"std": True}),
    ("hpt", {}, {"clip": True, "clip_low": 0.01, "clip_high": 0.01}),
    ("hpt", LUFFY, LUFFY | {"shape": 1.0}),
    ("hpt", {}, {"entropy_coef": 0.0}),
    ("mhpo", {}, {"bound": 0.5}),
    ("mhpo", {}, {"shape_up": 3.0}),
    ("mhpo", {}, {"scale_up": 2.0}),
    ("mhpo", {}, {"shape_down": 3.0}),
    ("mhpo", {}, {"scale_down": 2.0}),
    ("mhpo", {}, {"normalise_at_one": True}),
    ("r2vpo", {}, {"dual_init": 5.0}),
    ("real", {}, {"tau": 1.0}),
    ("real", {}, {"comparison": "bce"}),
    ("real", {}, {"comparison": "product"}),
    ("riskpo", {}, {"alpha": 0.5}),
    ("riskpo", {}, {"beta": 0.5}),
    ("riskpo", {}, {"omega": 3.0}),
    ("riskpo", {}, {"bundle": 1}),
    ("riskpo", {"bundle": 1}, {"bundle": 1, "quantiles": "bundle"}),
    ("riskpo", {}, {"level": "token"}),
    ("riskpo", {}, {"form": "released"}),
    ("riskpo", RELEASED, RELEASED | {"band_weight": 5.0}),
    ("riskpo", RELEASED, RELEASED | {"natural": True}),
    ("riskpo", {}, {"standardise": True}),
    ("riskpo", {}, {"credit": "std"}),
    ("riskpo", {}, {"credit": "sum_mean"}),
    ("riskpo", {}, {"credit": "score"}),
]


def gradients(method: str, settings: dict[str, Any]) -> Tensor:
    """Of all phases, on a rollout that the seed decides, after the policy has moved."""
    module, name = METHODS[method]
    agent = getattr(importlib.import_module(module), name)
    members = {"agent": agent, "options": settings, "graded": method != "real"}
    contract: RecipeContract = type("Contract", (RecipeContract,), members)()
    made = contract.made()
    return torch.cat(contract.gradients(made, contract.collected(made)))


@pytest.mark.parametrize(("method", "usual", "other"), CASES, ids=lambda x: x if isinstance(x, str) else str(x)[:60])
def test_another_value_is_another_gradient(method: str, usual: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = gradients(method, usual), gradients(method, other)
    assert second.isfinite().all()
    assert (first - second).abs().max() > 1e-6
