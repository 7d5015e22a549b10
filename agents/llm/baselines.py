"""The policy-gradient baselines for language models (sheet ``llm_baselines``): each fills one or two slots."""

from __future__ import annotations

from dataclasses import dataclass

from agents.llm.base import LLM, LLMConfig
from agents.llm.recipe import Recipe

__all__ = ["GRPO"]


@dataclass(frozen=True)
class GRPOConfig(LLMConfig):
    """GRPO as published: sequence means of token means, k3 to the reference (the coefficient is later work's)."""

    aggregate: str = "sequence_mean_token_mean"


class GRPO(LLM):
    """Group Relative Policy Optimization (Shao et al. 2024): group z-score, clipped token ratio."""

    name = "grpo"
    paper = "Shao et al. 2024, arXiv 2402.03300"
    Config = GRPOConfig
    Recipe = Recipe

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"advantage": "group z-score", "ratio": "token", "loss": "clip (+ k3)", "aggregate": "sequence means"}
