"""Which seeds a setting may be chosen on, and which it is reported on (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

__all__ = ["SEEDS", "Purpose", "check_seeds"]

Purpose = Literal["tune", "test"]

SEEDS: dict[Purpose, range] = {"test": range(100, 1000), "tune": range(1000, 2000)}
"""Disjoint, and both apart from 0, 1, 2, ..., which everybody tries first: a setting that was chosen on a reported
seed is partly that seed's luck."""


def check_seeds(purpose: Purpose, seeds: Iterable[int]) -> None:
    """Raises ``ValueError`` for seeds outside the range of their purpose, or given twice."""
    seeds = list(seeds)
    allowed = SEEDS[purpose]
    if outside := sorted(set(seeds) - set(allowed)):
        raise ValueError(
            f"seeds: expected from {allowed.start} to {allowed.stop - 1} where the purpose is {purpose!r}, got "
            f"{outside}; settings are chosen on other seeds than those that are reported"
        )
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected each once, got {seeds}; a run that counts twice makes an interval too short")
