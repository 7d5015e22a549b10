"""Flat configurations of several dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from ccrl.experiment import config as configs
from ccrl.experiment.flat import join, unpack
from ccrl.settings import Count, Nonnegative, Settings


@dataclass(frozen=True)
class Recipe(Settings):
    """A recipe."""

    clip: Nonnegative = 0.2
    """Where ratios are clipped."""


@dataclass(frozen=True)
class Own(Recipe):
    """What a method adds."""

    tau: float = 1.0
    """Temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ValueError("tau: expected > 0")


@dataclass(frozen=True)
class Network(Settings):
    """A network."""

    width: Count = 8
    """Units."""
    shape: tuple[int, ...] = ()
    """Layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width == 13:
            raise ValueError("width: expected another number")


Whole = join("Whole", (Own, Network), {"width": 16})


def test_one_list_of_names() -> None:
    assert {f.name for f in fields(Whole)} == {"clip", "tau", "width", "shape"}
    made = Whole(tau=2.0)
    assert (made.tau, made.width, made.clip) == (2.0, 16, 0.2)
    assert isinstance(made, Own)
    assert isinstance(made, Network)
    assert configs.from_dict(Whole, configs.to_dict(made)) == made
    assert configs.field_docs(Whole)["width"] == "Units."


@pytest.mark.parametrize(("name", "value"), [("clip", -1), ("tau", 0), ("width", 0), ("width", 13)])
def test_every_part_checks_its_own(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        Whole(**{name: value})


def test_names_are_in_one_part_only() -> None:
    @dataclass(frozen=True)
    class Other:
        tau: int = 0

    with pytest.raises(ValueError, match="every setting in one part, got 'tau' in Own and in Other"):
        join("Both", (Own, Other))
    with pytest.raises(ValueError, match=r"defaults of settings that there are, got \['widht'\]"):
        join("Typo", (Own, Network), {"widht": 1})


def test_parts_are_settings() -> None:
    whole = Whole(clip=0.1)
    assert unpack(Whole, whole, {"tau": 3.0}) == (whole, {"tau": 3.0})
    assert unpack(Whole, None, {"tau": 3.0}) == (None, {"tau": 3.0})
    assert unpack(Whole, Own(tau=3.0), {"width": 2, "clip": 0.3}) == (None, {"tau": 3.0, "width": 2, "clip": 0.3})
    assert unpack(Whole, 7, {}) == (7, {})
