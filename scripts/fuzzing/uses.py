"""Calls from Python that are wrong: what is learnt for, shown, saved, loaded, called back and asked for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from ccrl.batched_env import resolve_env
from ccrl.collect import Collector, Request
from ccrl.experiment.callbacks import CheckpointCallback, EvalCallback
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.replay import ReplayBuffer
from scripts.fuzzing.case import SIZES, Case

__all__ = ["uses"]

NUMBERS: tuple[Any, ...] = (
    math.nan, math.inf, -1, 0, 1, 0.5, -0.5, 2**63, 2**70, None, "3", True, [], "", np.int64(3), np.float32(2.0), 2j,
)  # fmt: skip
ENVS = {"ppo": "CartPole-v1", "a2c": "Pendulum-v1", "sac": "Pendulum-v1", "dqn": "CartPole-v1", "grpo": "modsum"}


def _agent(name: str, **more: Any) -> Any:
    cls = agents.get_agent(name)
    known = {f.name for f in fields(cls.Config) if f.init}
    return cls(ENVS[name], cls.Config(**{k: v for k, v in SIZES.items() if k in known}), **more)


@cache
def _trained(name: str) -> Any:
    return _agent(name).learn(1)


def uses(rng: random.Random, folder: Path) -> Case:
    """One wrong call."""
    name, number = rng.choice(sorted(ENVS)), rng.choice(NUMBERS)
    calls = {
        "learn": _learn, "shown": _shown, "saved": _saved, "loaded": _loaded, "called back": _called, "built": _built,
        "evaluated": _evaluated, "asked for": _asked, "remembered": _remembered,
    }  # fmt: skip
    kind = rng.choice(sorted(calls))
    what, begin = calls[kind](rng, folder, name, number)
    return Case(f"{kind}: {what}", begin)


Made = tuple[str, Callable[[], Any]]


def _learn(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    how = rng.choice(["learn", "until"])
    # a clock that is far away would train for ever, as asked
    number = rng.choice([x for x in NUMBERS if not isinstance(x, int) or isinstance(x, bool) or x < 1000])
    call = {"learn": lambda: _agent(name).learn(number), "until": lambda: _agent(name).learn(until=number)}[how]
    return f"{name} {how} {number!r}", call


def _shown(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    shown = rng.choice([
        None, number, np.zeros(3), np.zeros((2, 7)), np.full((1, 4), math.nan), "x", [0.0] * 4, {"a": 1},
        torch.zeros(4), np.zeros((2, 4), np.float64), np.zeros((2, 4), int), np.zeros((0, 4)), ["a", 3], "\u00e9",
        np.zeros((1, 3), object),
    ])  # fmt: skip
    return f"{name} predict({shown!r})", lambda: _trained(name).predict(shown)


def _saved(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    (folder / "file").write_text("x")
    path = rng.choice(
        [folder, "", folder / "file" / "x.pt", "/proc/x.pt", "\0", "x" * 300, number, folder / "a" / "b.pt"]
    )
    path = str(folder / "x.pt") if path in ("3", True) else path
    return f"{name} save({path!r})", lambda: _trained(name).save(path)


def _loaded(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    path, other = folder / "x.pt", rng.choice(sorted(ENVS))
    how: dict[str, Any] = rng.choice([
        {"env": number}, {"env": "CartPole-v1"}, {"env": "Hopper-v5"}, {"env": "evilmod:X"}, {"device": "gpu"},
        {"device": "cuda:7"}, {"policy": number}, {"trust": number}, {"trust": ("a:b",)}, {}, {"restore_rng": number},
    ])  # fmt: skip

    def call() -> None:
        _trained(name).save(path)
        agents.get_agent(other).load(path, **how).learn(1)

    return f"{other} load({name}, {how})", call


def _called(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    def fails(agent: Any) -> None:
        raise ValueError("expected better")

    def begin() -> None:
        agent = _agent(name)
        env: Any = None if name == "grpo" else agent.env
        other: Any = None if name == "grpo" else resolve_env(ENVS[name], 2)
        made: dict[str, Callable[[], Any]] = {
            "number": lambda: number, "fails": lambda: fails, "list": lambda: [number, fails],
            "every": lambda: CheckpointCallback(folder / "c", number),
            "keep": lambda: CheckpointCallback(folder, 1, number),
            "training": lambda: EvalCallback(env, folder / "e", 1, 2),
            "evaluation": lambda: EvalCallback(other, folder / "e", number, 2),
            "episodes": lambda: EvalCallback(other, folder / "e", 1, number),
        }  # fmt: skip
        agent.learn(1, callback=made[how]())
        if how == "used":
            _agent(name).learn(1, callback=CheckpointCallback(folder / "c", 1))

    how = rng.choice(["number", "fails", "list", "every", "keep", "training", "evaluation", "episodes"])
    return f"{name} {how} {number!r}", begin


def _built(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    cls = agents.get_agent(name)
    how = rng.choice(["env", "seed", "device", "env_kwargs", "policy", "config", "copies", "setting"])
    value = rng.choice([number, "no", {}, {"a": 1}, lambda: None, object()])

    def call() -> None:
        if how == "env":
            cls(value)
        elif how == "copies":
            cls(resolve_env("CartPole-v1", 3), num_envs=2)
        elif how == "config":
            cls(ENVS[name], value)
        elif how == "setting":
            cls(ENVS[name], nosuch=value)
        else:
            _agent(name, **{how: value})

    return f"{name} {how} {value!r}".replace(hex(id(value)), ""), call


def _evaluated(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    how = rng.choice(["episodes", "seed", "env"])
    values = {"episodes": 2, "seed": 0, "env": None if name == "grpo" else resolve_env(ENVS[name], 2)} | {how: number}
    if values["episodes"] in (2**63, 2**70):  # as many as asked
        values["episodes"] = 0

    def call() -> None:
        evaluate_agent(_trained(name), values["env"], values["episodes"], values["seed"])

    return f"{name} {how} {values[how]!r}", call


def _asked(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    options: dict[str, Any] = {}
    for key in rng.sample(["steps", "episodes", "horizon", "groups", "counts", "params", "tag"], rng.randint(1, 3)):
        options[key] = rng.choice([x for x in NUMBERS if not isinstance(x, int) or isinstance(x, bool) or x < 1000])

    def call() -> None:
        env = resolve_env("CartPole-v1", 2)
        collector = Collector(env, make_env=lambda n: resolve_env("CartPole-v1", n))
        collector.collect(Request(**options), _trained("ppo").policy)

    return f"Request({options})", call


def _remembered(rng: random.Random, folder: Path, name: str, number: Any) -> Made:
    column = rng.choice(["obs", "action", "reward", "terminated", "capacity"])
    value: Any = rng.choice([number, np.zeros(2), np.zeros((3, 1)), "x", None])

    def call() -> None:
        if column == "capacity":
            env = resolve_env("CartPole-v1", 2)
            ReplayBuffer(number, env.single_observation_space, env.single_action_space)
            return
        rows: dict[str, Any] = {"obs": np.zeros((3, 2)), "action": np.zeros((3, 1)), "reward": np.zeros(3),
                                "next_obs": np.zeros((3, 2)), "terminated": np.zeros(3, bool)}  # fmt: skip
        ReplayBuffer.from_arrays(rows | {column: value})

    return f"{column} {number if column == 'capacity' else value!r}", call
