"""Methods for language models by name, one file per paper. Importing this package loads none of them."""

from __future__ import annotations

__all__ = ["METHODS"]

METHODS = {
    "bnpo": ("agents.llm.bnpo", "BNPO"),
    "grpo": ("agents.llm.baselines", "GRPO"),
    "mhpo": ("agents.llm.mhpo", "MHPO"),
}
"""Command-line name -> module and class."""
