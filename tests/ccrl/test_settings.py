"""One checker of types, ranges and choices: the same in Python, from YAML and on the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from ccrl.experiment import config as configs
from ccrl.settings import (
    Above,
    ConfigError,
    Count,
    Finite,
    Natural,
    Nonnegative,
    Positive,
    Range,
    Settings,
    Unit,
    checked,
)  # fmt: skip


@dataclass(frozen=True)
class Inner(Settings):
    depth: Count = 1
    """How deep."""


@dataclass(frozen=True)
class Config(Settings):
    rate: Positive = 0.1
    """Step size."""
    gamma: Unit = 0.99
    """Discount."""
    steps: Count = 8
    """Steps."""
    skip: Natural | None = None
    """Steps left out."""
    clip: Annotated[float, Range(0, also=(math.inf,))] = math.inf
    """Clipping, infinite: none."""
    scale: Annotated[float, Above(0, 1)] = 1.0
    """Scale."""
    offset: float = 0.0
    """Any finite number."""
    mode: Literal["fast", "slow"] = "fast"
    """How."""
    squash: bool = False
    """Whether."""
    hidden: tuple[Count, ...] = (8, 8)
    """Layers."""
    folder: Path = Path("x")
    """Where."""
    inner: Inner = field(default_factory=Inner)
    """More."""


BAD: list[tuple[str, Any, str]] = [
    ("rate", 0.0, "rate: expected > 0, got 0.0"),
    ("rate", -1e-3, "rate: expected > 0, got -0.001"),
    ("rate", math.nan, "rate: expected > 0 and finite, got nan"),
    ("rate", math.inf, "rate: expected > 0 and finite, got inf"),
    ("rate", "1", "rate: expected float, got '1' (str). Write it without quotes."),
    ("rate", True, "rate: expected float, got True (bool)."),
    ("gamma", 1.0000001, "gamma: expected a number in [0, 1], got 1.0000001"),
    ("steps", 0, "steps: expected >= 1, got 0"),
    ("steps", 2.0, "steps: expected int, got 2.0 (float). Write 2."),
    ("steps", None, "steps: expected int, got None (NoneType)."),
    ("skip", -1, "skip: expected >= 0, got -1"),
    ("skip", "many", "skip: expected int >= 0 | None, got 'many' (str)."),
    ("clip", -math.inf, "clip: expected >= 0 or inf, got -inf"),
    ("clip", math.nan, "clip: expected >= 0 or inf, got nan"),
    ("scale", 0.0, "scale: expected a number in (0, 1], got 0.0"),
    ("offset", math.nan, "offset: expected a finite number, got nan"),
    ("offset", -math.inf, "offset: expected a finite number, got -inf"),
    ("mode", "fsat", "mode: expected one of 'fast', 'slow', got 'fsat'. Did you mean fast?"),
    ("squash", "no", "squash: expected bool, got 'no' (str). Write it without quotes."),
    ("squash", 1, "squash: expected bool, got 1 (int)."),
    ("hidden", (8, 0), "hidden[1]: expected >= 1, got 0"),
    ("hidden", 8, "hidden: expected tuple[int >= 1, ...], got 8 (int). Write [8]."),
    ("folder", 3, "folder: expected Path, got 3 (int)."),
    ("inner", {"depth": 2}, "inner: expected Inner, got {'depth': 2} (dict)."),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_refused_in_python_with_the_words_of_a_file(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as python:
        Config(**{name: value})
    assert str(python.value) == message
    if name != "inner":  # from a file it may be a mapping
        with pytest.raises(ConfigError) as mapping:
            configs.from_dict(Config, {name: value})
        assert str(mapping.value) == message


@pytest.mark.parametrize("flags", ["--rate nan", "--gamma -0.1", "--steps 0", "--hidden 8 -8", "--inner.depth 0"])
def test_refused_on_the_command_line(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        configs.parse(Config, flags.split())
    assert ": expected" in capsys.readouterr().err


def test_what_means_the_same_takes_one_form() -> None:
    made = Config(rate=1, steps=np.int64(4), gamma=np.float32(0.5), hidden=[16], folder="y")  # type: ignore[arg-type]
    assert made == Config(rate=1.0, steps=4, gamma=0.5, hidden=(16,), folder=Path("y"))
    assert [type(x) for x in (made.rate, made.steps, made.gamma)] == [float, int, float]
    assert configs.from_dict(Config, configs.to_dict(made)) == made
    assert configs.parse(Config, ["--rate", "1", "--clip", "inf"]).clip == math.inf


def test_a_mapping_reaches_nested_settings() -> None:
    assert configs.from_dict(Config, {"inner": {"depth": 3}}).inner.depth == 3
    with pytest.raises(ConfigError, match=r"depth: expected >= 1, got 0"):
        configs.from_dict(Config, {"inner": {"depth": 0}})


def test_help_still_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        configs.parse(Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--rate FLOAT", "Step size. (default: 0.1)", "--mode {fast,slow}", "--hidden [INT [INT ...]]"):
        assert words in shown


def test_required_settings_may_come_from_the_command_line() -> None:
    """The file is read first: what it leaves out is not yet a value that could be wrong."""

    assert configs.parse(Required, ["--steps", "3"], {"rate": 0.5}) == Required(3, 0.5)


@dataclass(frozen=True)
class Required(Settings):
    steps: Count
    """Steps."""
    rate: Positive = 1.0
    """Rate."""


def test_a_class_whose_annotations_cannot_be_found_is_checked_where_they_can() -> None:
    Hidden = Count

    @dataclass(frozen=True)
    class Local(Config):
        extra: Hidden = 1

    assert Local(extra=-1).extra == -1
    with pytest.raises(ConfigError, match="steps"):
        Local(steps=0)


def test_ranges() -> None:
    inside, outside = Range(0, 1, below=True), Range(high=3, below=True)
    assert [x in inside for x in (0, 0.5, 1, -0.1, math.nan)] == [True, True, False, False, False]
    assert [x in outside for x in (2.9, 3, -1e30, -math.inf)] == [True, False, True, False]
    assert [str(x) for x in (inside, outside, Range(), Above(2), Range(2), Range(high=1))] == [
        "a number in [0, 1)", "< 3", "a finite number", "> 2", ">= 2", "<= 1",
    ]  # fmt: skip
    assert Above(0).check("level", 0.5) == 0.5
    with pytest.raises(ConfigError, match="level: expected > 0, got -1"):
        Above(0).check("level", -1)
    with pytest.raises(ConfigError, match=r"level: expected > 0, got '1' \(str\)"):
        Above(0).check("level", "1")  # type: ignore[arg-type]


def test_arguments_of_functions() -> None:
    @checked
    def build(n: Count, *rest: Any, device: torch.device | str = "cpu", mode: Literal["a", "b"] = "a",
              level: Finite | None = None, weights: tuple[Nonnegative, ...] = (), **options: Any) -> Any:  # fmt: skip
        return n, rest, device, mode, level, weights, options

    assert build(2, 3, device=torch.device("cpu"), weights=[1], x=math.nan)[5] == (1.0,)
    for arguments, message in (
        ({"n": 0}, "n: expected >= 1, got 0"),
        ({"n": 1, "mode": "c"}, "mode: expected one of 'a', 'b', got 'c'"),
        ({"n": 1, "level": math.nan}, "level: expected a finite number, got nan"),
        ({"n": 1, "weights": (1.0, -1.0)}, r"weights\[1\]: expected >= 0, got -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**arguments)
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        build()


@pytest.mark.parametrize("value", [1e-300, 1e300, -1e39])
def test_numbers_that_float32_does_not_hold_are_refused(value: float) -> None:
    """In a network 1e-300 is 0 and 1e300 infinite: a step size of 1e-300 would do nothing, in silence."""
    with pytest.raises(ConfigError, match=r"of a size from 1\.2e-38 to 3\.4e"):
        Range().check("x", value)
    assert Range().check("x", 0.0) == 0.0
