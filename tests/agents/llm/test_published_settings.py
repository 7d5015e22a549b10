"""Defaults are the numbers of the papers and released codes, or stated choices where these give none."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import pytest

from agents.llm import METHODS
from agents.llm.base import LLMConfig

CLIP = {"clip_low": 0.2, "clip_high": 0.2}
SEQUENCES, TOKENS = {"aggregate": "sequence_mean_token_mean"}, {"aggregate": "token_mean"}

EXPECTED: dict[str, dict[str, Any]] = {
    # baselines
    "reinforce": {"baseline": "batch", "aggregate": "sequence_mean"},
    "rloo": {"form": "score", "normalise": False, "aggregate": "sequence_mean", **CLIP},
    "ppo_llm": {"baseline": "group", "whiten": True, "dual_clip": 0.0, "n_epochs": 2, **CLIP, **TOKENS},
    "grpo": {**CLIP, **SEQUENCES},
    "dr_grpo": {**CLIP, "aggregate": "fixed"},
    "dapo": {
        "clip_low": 0.2, "clip_high": 0.28, "overlong_share": 0.2, "overlong_floor": True, "max_tries": 4, **TOKENS
    },
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "level": "sequence"},
    "cispo": {"clip_low": 0.2, "clip_high": 0.28, "bound": "band", "cap": 5.0, **TOKENS},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.05, **SEQUENCES},
    "dpo": {"beta": 0.1, "pairs": "samples"},
    "ipo": {"tau": 0.1, "pairs": "samples", "length_normalised": False},
    "sft": {"group_size": 1, "n_prompts": 128, **TOKENS},
    # papers
    "bnpo": {
        "reward_min": 0.0, "reward_max": 1.0, "max_weight": 1e6, "decompose": True, "dual_clip": 10.0,
        "clip_low": 0.2, "clip_high": 0.28, "aggregate": "sequence_mean",
    },
    "copg": {"group_size": 4, "beta": 0.5, "form": "square", "behaviours": ("live",)},
    "d3s": {
        "group_size": 16, "rollouts_init": 0.25, "rollouts_final": 0.5, "batch_share": 0.5, "tokens_init": 0.2,
        "tokens_final": 1.0, "token_pool": "batch", "base": "grpo", **CLIP, **TOKENS,
    },
    "dcpo": {
        "entropy_target": 0.5, "hot": 1.2, "cold": 0.8, "gap_cap": 0.1, "correct_above": 0.05, "dual_clip": 3.0,
        **CLIP, **TOKENS,
    },
    "empg": {"scale": 1.0, "clarity": 1.0, "zeta": 0.1, "step": "turn", "delimiter": -1, **CLIP, **SEQUENCES},
    "g2rpo": {
        "pool": "group", "tie": 1e-6, "drop_unanimous": True, "length_bounds": (), "length_coef": 1.0,
        "entropy_bounds": (), "corridor_coef": 0.01, "entropy_estimate": "full", **SEQUENCES,
    },
    "gbpo": {"target_temperature": 1e-4, "threshold": "quantile", **CLIP, **TOKENS},
    "gdpo": {
        "weights": (), "conditioned": (), "condition": "", "threshold": 1.0, "batch_norm": "sample", "group_eps": 1e-4,
        "batch_eps": 1e-4, "single": "zero", **CLIP, **SEQUENCES,
    },
    "hpt": {
        "mixture": "switch", "gate": 0.0, "rl_share": 0.5, "rl_norm": "len_const", "sft_coef": 1.0, "std": False,
        "clip": False, "shape": 0.1, "skip_grad_norm": 80.0, "group_size": 8, "max_grad_norm": 1.0,
        "entropy_coef": 0.001, **CLIP,
    },
    "mhpo": {
        "bound": 1.5, "shape_up": 1.5, "scale_up": 1.0, "shape_down": 2.0, "scale_down": 0.8,
        "normalise_at_one": False, **SEQUENCES,
    },
    "r2vpo": {
        "variance_budget": 0.04, "dual_init": 0.5, "dual_rate": 5.0, "dual_max": 100.0, "dual_every": "rollout",
        "replay": 0, **TOKENS,
    },
    "real": {"tau": 0.5, "comparison": "anchored", "labels": "binary", "group_size": 8},
    "riskpo": {
        "n_prompts": 20, "alpha": 0.2, "beta": 0.8, "omega": 0.5, "bundle": 5, "quantiles": "track",
        "quantile_lr": 0.1, "form": "paper", "band_weight": 1.5, "natural": False, "standardise": False,
        "credit": "uniform", "level": "sequence", **CLIP,
    },
}  # fmt: skip


def config_of(method: str) -> type[LLMConfig]:
    module, name = METHODS[method]
    found: type[LLMConfig] = getattr(importlib.import_module(module), name).Config
    return found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults(method: str) -> None:
    config = config_of(method)()
    assert {name: getattr(config, name) for name in EXPECTED[method]} == EXPECTED[method]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_setting_of_its_own_is_listed(method: str) -> None:
    """A new setting says here where its default comes from."""
    own = {field.name for field in fields(config_of(method))} - {field.name for field in fields(LLMConfig)}
    assert own <= EXPECTED[method].keys()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_reference_no_entropy_bonus_and_one_temperature(method: str) -> None:
    config = config_of(method)()
    assert config.kl_coef == 0.0
    assert config.entropy_coef == (0.001 if method == "hpt" else 0.0)
    assert config.temperature == 1.0
    assert config.n_epochs == (2 if method == "ppo_llm" else 1)
