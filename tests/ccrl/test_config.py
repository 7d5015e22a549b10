from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from ccrl.experiment.config import (
    ConfigError,
    Options,
    field_docs,
    flatten,
    from_dict,
    load_yaml,
    parse,
    save_yaml,
    to_dict,
)


@dataclass(frozen=True)
class Adam:
    eps: float = 1e-5
    """Added to the root."""
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Base:
    seed: int = 0
    """Seed of everything."""


@dataclass(frozen=True)
class Config(Base):
    learning_rate: float = 3e-4
    """Step size of the optimiser,
    annealed to zero."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    compile: bool = True
    name: str = "a: b"
    target_kl: float | None = None
    """Stop the epoch above it."""
    adam: Adam = field(default_factory=Adam)
    """The optimiser."""
    extra: Adam | None = None
    weights: dict[str, float] = field(default_factory=dict)
    folder: Path = Path("runs")


@dataclass(frozen=True)
class Required:
    env: str
    gamma: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: expected a number in [0, 1], got {self.gamma}.")


CHANGED = Config(
    seed=3, hidden=(8,), activation="relu", compile=False, name="yes", target_kl=0.02, adam=Adam(betas=(0.5, 0.9)),
    extra=Adam(eps=1e-8), weights={"a": 1.0}, folder=Path("x/y"),
)  # fmt: skip


@pytest.mark.parametrize("config", [Config(), CHANGED])
def test_round_trips(tmp_path, config):
    assert from_dict(Config, to_dict(config)) == config
    save_yaml(config, tmp_path / "config.yaml")
    assert from_dict(Config, load_yaml(tmp_path / "config.yaml")) == config


def test_docs_become_comments(tmp_path):
    assert field_docs(Config) == {
        "seed": "Seed of everything.",
        "learning_rate": "Step size of the optimiser, annealed to zero.",
        "hidden": "Widths of the layers.",
        "target_kl": "Stop the epoch above it.",
        "adam": "The optimiser.",
    }
    save_yaml(Config(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "# Step size of the optimiser, annealed to zero.\nlearning_rate: 0.0003\n" in text
    assert "# The optimiser.\nadam:\n  # Added to the root.\n  eps: 1.0e-05\n" in text
    assert "hidden: [64, 64]\n" in text


def test_yaml_numbers_without_a_dot(tmp_path):
    weights = "weights: {a: 1.5e3, b: -2.e-1, c: +4e+0}\n"
    rest = "learning_rate: 3e-4\ntarget_kl: 1E2\nname: '1e3'\nhidden: [32]\nseed: 7\n"
    (tmp_path / "a.yaml").write_text(weights + rest)
    config = from_dict(Config, load_yaml(tmp_path / "a.yaml"))
    assert (config.learning_rate, config.target_kl, config.name, config.seed) == (3e-4, 100.0, "1e3", 7)
    assert config.weights == {"a": 1500.0, "b": -0.2, "c": 4.0}


def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    config = replace(Config(), name="1e5")  # as the abbreviated name of a commit may
    save_yaml(config, tmp_path / "config.yaml")
    assert from_dict(Config, load_yaml(tmp_path / "config.yaml")) == config


def test_overlay_order(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-3\nseed: 5\nadam:\n  eps: 1e-6\n")
    config = parse(Config, ["--learning-rate", "0.1", "--adam.betas", "0.1", "0.2"], tmp_path / "a.yaml")
    assert config == replace(Config(), learning_rate=0.1, seed=5, adam=Adam(1e-6, (0.1, 0.2)))
    assert parse(Config, []) == Config()
    assert parse(Config, [], {"seed": 2}).seed == 2
    base = replace(Config(), seed=9, adam=Adam(eps=1.0))
    assert from_dict(Config, {"adam": {"betas": [0.0, 0.0]}}, base) == replace(base, adam=Adam(1.0, (0.0, 0.0)))


def test_required_fields():
    assert parse(Required, ["--env", "A"], {"gamma": 0.5}) == Required("A", 0.5)
    assert parse(Required, [], {"env": "B"}) == Required("B")
    assert parse(Required, ["--env", "C"]) == Required("C")
    with pytest.raises(ConfigError, match=r"env: expected a value \(Required has no default"):
        from_dict(Required, {})
    with pytest.raises(SystemExit):
        parse(Required, [], {"gamma": 0.5})


def test_unknown_keys_name_near_matches():
    with pytest.raises(
        ConfigError, match=r"learning_rte: unknown key of Config. Did you mean learning_rate\?.* hidden,"
    ):
        from_dict(Config, {"learning_rte": 1.0})
    with pytest.raises(
        ConfigError, match=r"adam.epz: unknown key of Adam. Did you mean eps\? Expected some of eps, betas"
    ):
        from_dict(Config, {"adam": {"epz": 1.0}})
    with pytest.raises(ConfigError, match=r"extra.epz: unknown key of Adam"):
        from_dict(Config, {"extra": {"epz": 1.0}}, CHANGED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1.0}, r"seed: expected int, got 1.0 \(float\). Write 1."),
        ({"seed": True}, r"seed: expected int, got True \(bool\)"),
        ({"seed": "1"}, r"seed: expected int, got '1' \(str\). Write it without quotes"),
        ({"learning_rate": "x"}, r"learning_rate: expected float, got 'x'"),
        ({"learning_rate": True}, r"learning_rate: expected float, got True"),
        ({"learning_rate": None}, r"learning_rate: expected float, got None"),
        ({"compile": 1}, r"compile: expected bool, got 1"),
        ({"name": False}, r"name: expected str, got False \(bool\). Write the word in quotes: YAML takes on, off"),
        ({"name": 5}, r'name: expected str, got 5 \(int\). Write "5", in quotes'),
        ({"activation": "rélu"}, r"activation: expected one of 'tanh', 'relu', got 'rélu'. Did you mean relu\?"),
        ({"hidden": 64}, r"hidden: expected tuple\[int, \.\.\.\], got 64"),
        ({"hidden": [64, 1.5]}, r"hidden\[1\]: expected int, got 1.5"),
        ({"adam": {"betas": [0.9]}}, r"adam.betas: expected tuple\[float, float\], got \[0.9\]"),
        ({"adam": 3}, r"adam: expected Adam, got 3"),
        ({"target_kl": "x"}, r"target_kl: expected float \| None, got 'x'"),
        ({"weights": {"a": "b"}}, r"weights\['a'\]: expected float, got 'b'"),
    ],
)
def test_wrong_types(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, values)


@dataclass(frozen=True)
class Alternatives:
    number: float | int = 0.0
    rate: float = 0.0
    level: Literal["off", "on", 1, 2] = "off"
    names: dict[int, str] = field(default_factory=dict)


def test_a_value_keeps_its_type_where_several_fit():
    values = [from_dict(Alternatives, {"number": x, "rate": x}) for x in (1, 1.0)]
    assert [type(v.number) for v in values] == [int, float]
    assert [type(v.rate) for v in values] == [float, float]
    assert from_dict(Alternatives, {"level": 1}).level == 1
    for wrong in (True, 1.0):
        with pytest.raises(ConfigError, match=r"level: expected one of 'off', 'on', 1, 2, got (True|1\.0)"):
            from_dict(Alternatives, {"level": wrong})
    with pytest.raises(ConfigError, match=r"names \(a key\): expected int, got 'a'"):
        from_dict(Alternatives, {"names": {"a": "b"}})


def test_a_word_that_yaml_takes_for_a_boolean_is_told_apart(tmp_path):
    for word, boolean in (("off", "False"), ("on", "True")):
        (tmp_path / "a.yaml").write_text(f"level: {word}\n")
        with pytest.raises(ConfigError, match=f'level: .* got {boolean}. Write "{word}", in quotes: YAML takes'):
            from_dict(Alternatives, load_yaml(tmp_path / "a.yaml"))
        (tmp_path / "a.yaml").write_text(f"level: '{word}'\n")
        assert from_dict(Alternatives, load_yaml(tmp_path / "a.yaml")).level == word


def test_long_values_stay_on_their_line(tmp_path):
    config = replace(Config(), hidden=tuple(range(100)), name="word " * 60)
    save_yaml(config, tmp_path / "config.yaml")
    assert from_dict(Config, load_yaml(tmp_path / "config.yaml")) == config
    text = (tmp_path / "config.yaml").read_text()
    assert f"hidden: {list(config.hidden)}\n" in text
    assert f"name: '{config.name}'\n" in text


@dataclass(frozen=True)
class Derived(Base):
    seed: int = 1
    """Seed of the task alone."""


def test_the_docstring_of_a_field_defined_again_is_the_new_one():
    assert field_docs(Derived) == {"seed": "Seed of the task alone."}


def test_what_is_not_a_mapping(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines, got a list"):
        load_yaml(path)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="does not parse"):
        load_yaml(path)
    path.write_text("# nothing\n")
    assert load_yaml(path) == {}
    with pytest.raises(ConfigError, match="expected a dataclass instance"):
        to_dict(Config)


def test_the_config_checks_itself():
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], got 2"):
        from_dict(Required, {"env": "A", "gamma": 2})


def test_flatten():
    assert flatten(to_dict(Config()))["adam.betas"] == [0.9, 0.999]
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


@dataclass(frozen=True)
class WithOptions:
    """Options that somebody else names."""

    options: Options = field(default_factory=dict)
    """As JSON."""


def test_options_are_json_on_the_command_line_and_mappings_in_yaml():
    parsed = parse(WithOptions, ["--options", '{"digits": 1, "operators": "+-"}'])
    assert parsed.options == {"digits": 1, "operators": "+-"}
    assert from_dict(WithOptions, to_dict(parsed)) == parsed
    assert parse(WithOptions, []).options == {}


@pytest.mark.parametrize("text", ["[1]", "{1", "digits=1"])
def test_options_that_are_no_object_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(WithOptions, ["--options", text])
    assert "JSON" in capsys.readouterr().err
