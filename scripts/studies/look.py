"""How the studies' figures tell curves apart: legible at 600 pixels, with and without colours."""

from __future__ import annotations

from typing import Any

__all__ = ["COLOURS", "DASHES", "look"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
"""Okabe and Ito's, told apart with all common kinds of colour blindness; yellow is left out (too pale on white)."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (4, 1, 1, 1)), (0, (8, 2)))
"""Of a curve's line."""


def look(i: int) -> dict[str, Any]:
    """Colour and line of the ``i``-th curve: 35 differ."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
