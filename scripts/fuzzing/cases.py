"""Settings, options, environments and command lines that are wrong; :func:`case` has the files too."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import random
import runpy
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import gymnasium
import numpy as np
import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import envs.flow
import envs.inventory
import envs.text
from ccrl.adapters import from_gymnasium
from ccrl.batched_env import resolve_env
from ccrl.flow.task import resolve_flow_task
from ccrl.llm.task import resolve_task
from ccrl.settings import hints_of
from scripts import benchmark, train, training
from scripts.fuzzing import files, uses
from scripts.fuzzing.case import SIZES, Case

__all__ = ["case", "env_for", "sizes_of"]

# -- settings and options ---------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300, 0.5, 1.5, -0.5, 0, 1, 2, -1, 3.0, 2**63, -(2**63) - 1,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, "", "no", "1", "auto", [], [1], [-1], (0,), {}, {"a": 1}, b"x", object)


def env_for(name: str, cls: Any) -> str:
    """An id or a task that the agent accepts."""
    if training.is_text(cls):
        return getattr(cls, "example_env", "modsum") if name in agents.FLOW_METHODS else "sequence_match"
    if hasattr(cls.Config, "dataset"):
        return "InvertedPendulum-v5"
    usual = "Pendulum-v1" if cls.actions == "continuous" else "CartPole-v1"
    return getattr(cls, "example_env", usual)


def _value(rng: random.Random, hint: Any) -> Any:
    if get_origin(hint) is Literal and rng.random() < 0.5:
        choice = str(rng.choice(get_args(hint)))
        return rng.choice([choice.upper(), choice[:-1], choice + " ", choice])
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return rng.choice(NUMBERS if bare in (int, float) and rng.random() < 0.8 else NUMBERS + OTHERS)


def sizes_of(name: str, cls: Any, folder: Path) -> dict[str, Any]:
    """Settings of a short training, with a data set where the agent learns from one."""
    known = {f.name for f in fields(cls.Config) if f.init}
    found = {k: v for k, v in SIZES.items() if k in known and not _unused(name, k)}
    if "dataset" in known:
        found |= {"dataset": str(files.dataset(folder)), "batch_size": 8, "hidden": (4,)}
        own: dict[str, dict[str, Any]] = {"pgd": {"real_rows": 2}, "cdsa": {"base": str(files.cloned())}}
        found |= own.get(name, {})
    return found


def _settings(rng: random.Random, folder: Path) -> Case:
    name = rng.choice(sorted(agents.AGENTS.keys() | agents.METHODS.keys() | agents.FLOW_METHODS.keys()))
    cls = agents.get_agent(name)
    field = rng.choice(sorted(f.name for f in fields(cls.Config) if f.init))
    value = _value(rng, hints_of(cls.Config)[field])
    sizes = sizes_of(name, cls, folder) | {field: value}
    made: list[Any] = []

    def begin() -> None:
        made.append(cls(env_for(name, cls), cls.Config(**sizes)))

    return Case(f"{name} {field}={value!r}", begin, lambda: made[0].learn(1))


def _unused(name: str, setting: str) -> bool:
    """Settings of ``SIZES`` that mean something else to an agent, or that it refuses."""
    return setting in {
        "bac": ("hidden",), "bpg": ("hidden", "model"), "npg_igt": ("compile",), "hdpo": ("rounds",),
        "subpo": ("batch_size", "n_epochs"), "sft": ("group_size",), "div_prec": ("group_size",),
    }.get(name, ()) or (setting == "warm_start_steps" and name not in agents.FLOW_METHODS)  # fmt: skip


COMMON = ("num_envs", "max_episode_steps", "autoreset_mode", "backend", "no_such_option")
CLASSES = {
    "Hopper-v5": ("healthy_z_range", "terminate_when_unhealthy", "healthy_reward", "reset_noise_scale", "frame_skip"),
    "HalfCheetah-v5": ("ctrl_cost_weight", "frame_skip", "reset_noise_scale", "xml_file", "nthread", "unstable"),
    "FrozenLake-v1": ("is_slippery", "map_name"),
}
TEXTS, FLOWS = set(envs.text.TASKS) - {"jsonl", "reasoning_gym"}, set(envs.flow.TASKS)


def _options_of(id: str) -> list[str]:
    """Names that the constructor behind an id takes, and some that it does not."""
    tables: tuple[Any, ...] = (envs.text.TASKS, envs.flow.TASKS, {f"ccrl/{k}": v for k, v in envs.OWN.items()},
                               {k: ("envs.classic", v) for k, v in envs.CLASSIC.items()})  # fmt: skip
    where = next((table[id] for table in tables if id in table), None)
    common = ("no_such_option",) if id in TEXTS | FLOWS else COMMON
    if where is None:
        return [*CLASSES[id], *common]
    if where[0] == "envs.inventory":
        return [*inspect.signature(envs.inventory.TASKS[where[1]]).parameters, "split", *common]
    found = inspect.signature(getattr(importlib.import_module(where[0]), where[1])).parameters
    return sorted({name for name in found if name not in ("options", "device", "self")} | set(common))


def _options(rng: random.Random, folder: Path) -> Case:
    own = [f"ccrl/{name}" for name in envs.OWN if name != "InventoryOwn-v0"]
    id = rng.choice(sorted([*own, *envs.CLASSIC, *CLASSES, *TEXTS, *FLOWS]))
    option = rng.choice(_options_of(id))
    value = rng.choice(NUMBERS + OTHERS + ("sync", "next_step", "SameStep", (0.1, math.nan), "+-", "é"))
    made: list[Any] = []

    def begin() -> None:
        if id in TEXTS:
            made.append(resolve_task(id, **{option: value}))
        elif id in FLOWS:
            made.append(resolve_flow_task(id, **{option: value}))
        else:
            arguments: dict[str, Any] = {"num_envs": 2} | {option: value}
            made.append(resolve_env(id, **arguments))

    def go_on() -> None:
        if id in TEXTS:
            made[0].prompts(2, torch.Generator().manual_seed(0))
        if id in TEXTS | FLOWS:
            return
        env = made[0]
        env.reset(seed=0)
        for _ in range(2):
            action = [env.single_action_space.sample() for _ in range(env.num_envs)]
            env.step(torch.as_tensor(np.stack(action)))

    return Case(f"{id} {option}={value!r}", begin, go_on)


# -- environments -----------------------------------------------------------------------------------------------------


class Theirs(Exception):
    """An error in somebody's environment."""


def _gymnasium(rng: random.Random, folder: Path) -> Case:
    spaces = gymnasium.spaces
    box = spaces.Box(-1.0, 1.0, (2,), np.float32)
    wrong_obs = [None, np.zeros(3), np.full(2, math.nan), "x", [0.0, 0.0], np.zeros((2, 1)), {"a": 1}, np.zeros(2, int)]
    wrong_spaces = [
        None, box, spaces.Text(3), spaces.Sequence(box), spaces.Dict({"a.b": box}), spaces.Dict({}),
        spaces.Tuple((box,)), spaces.Box(0, 255, (2, 9, 9), np.uint8), spaces.Discrete(2, start=1),
        spaces.MultiBinary(2), spaces.Box(-1, 1, (0,)), spaces.Box(-np.inf, np.inf, (2,)),
    ]  # fmt: skip
    slot = rng.choice(["reset", "obs", "reward", "terminated", "truncated", "step", "obs_space", "act_space", "raise"])
    values: dict[str, list[Any]] = {
        "reset": [np.zeros(2, np.float32), (np.zeros(2),), None, (np.zeros(2), {}, 1), *wrong_obs],
        "obs": wrong_obs, "reward": [None, "1.0", math.nan, math.inf, [1.0], np.zeros(1), np.float16(1), True],
        "terminated": ["False", None, 2, 1.0, [True], np.bool_(False)], "truncated": ["False", None, 2, [True]],
        "step": [(np.zeros(2), 1.0, False, {}), None, (), (np.zeros(2), 1.0, False, False, None), 3],
        "obs_space": wrong_spaces, "act_space": wrong_spaces, "raise": [Theirs("mine")],
    }  # fmt: skip
    value = rng.choice(values[slot])
    late = rng.random() < 0.5

    class Odd(gymnasium.Env[Any, Any]):  # type: ignore[misc]
        observation_space = value if slot == "obs_space" else box
        action_space = value if slot == "act_space" else spaces.Discrete(2)
        n = 0

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            made = observation() if slot == "obs_space" else np.zeros(2, np.float32)
            return value if slot == "reset" else (made, {})

        def step(self, action: Any) -> Any:
            self.n += 1
            wrong = slot if not late or self.n > 3 else ""
            if wrong == "raise":
                raise value
            if wrong == "step":
                return value
            obs = value if wrong == "obs" else observation() if slot == "obs_space" else np.zeros(2, np.float32)
            return (obs, value if wrong == "reward" else 1.0, value if wrong == "terminated" else False,
                    value if wrong == "truncated" else self.n % 5 == 0, {})  # fmt: skip

    def observation() -> Any:
        return value.sample() if value is not None else np.zeros(2, np.float32)

    backend, name = rng.choice(["sync", "sync", "async"]), rng.choice(["ppo", "ppo", "a2c", "dqn"])
    made: list[Any] = []

    def begin() -> None:
        cls = agents.get_agent(name)
        env = from_gymnasium(Odd, 2, asynchronous=backend == "async")
        made.append(cls(env, cls.Config(**sizes_of(name, cls, folder))))

    return Case(
        f"{name} {backend} {slot}={value!r}{' later' if late else ''}", begin, lambda: made[0].learn(32), (Theirs,)
    )


# -- command lines ----------------------------------------------------------------------------------------------------


def _commands(rng: random.Random, folder: Path) -> Case:
    good = ["ppo", "--env", "CartPole-v1", "--total-timesteps", "16", "--num-envs", "2", "--n-steps", "8", "--n-epochs",
            "1", "--compile", "off", "--hidden", "4", "--eval-every", "0"]  # fmt: skip
    words = [
        "--resume", "--config", "--method", "--task", "--trust", "llm", "mdpo", "no_such", "a:b", "evilmod:X", "", "--",
        "-1", "nan", "1e9999", "--env", "--seed", "--gamma", "--no-such-flag", "--help=1", "é", "{}", "--env-kwargs",
        "--device", "cuda:7", "gpu", "--run-root", "/proc/no", "--learning-rate", "--hidden", "CartPole-v9", "3",
    ]  # fmt: skip
    argv = list(good)
    for _ in range(rng.randint(1, 3)):
        how, at = rng.choice(["put", "replace", "drop", "swap"]), rng.randrange(len(argv))
        if how == "put":
            argv.insert(at, rng.choice(words))
        elif how == "replace":
            argv[at] = rng.choice(words)
        elif how == "drop" and len(argv) > 1:
            argv.pop(at)
        else:
            other = rng.randrange(len(argv))
            argv[at], argv[other] = argv[other], argv[at]
    if "--total-timesteps" not in argv:
        argv += ["--total-timesteps", "16"]
    argv += ["--run-root", str(folder / "runs"), "--no-tensorboard", "--no-progress"]
    made: list[Any] = []
    if rng.random() < 0.2:
        flags = {
            "agents": [rng.choice(["ppo", "no", "a:b", "sb3:no"])],
            "envs": [rng.choice(["CartPole-v1", "no", ""])],
            "seeds": rng.choice([[0], [-1], [0, 0], ["x"]]),
            "total_timesteps": rng.choice([16, 0, -1, "x", None]),
        }
        study = folder / "study.yaml"
        study.write_text(json.dumps({"entries": [flags]} if rng.random() < 0.8 else rng.choice([[], 3, {"x": 1}])))
        options = benchmark.Options(out=folder, study=study)
        return Case(f"benchmark {study.read_text()}", lambda: benchmark.load(options).specs())
    return Case(" ".join(argv[: len(argv) - 4]), lambda: made.append(train.prepare(argv)), lambda: made[0]())


# every line is a whole command that works: of words that are refused anyway a change says nothing
SCRIPTS: dict[str, list[str]] = {
    "evaluate": ["RUN", "--episodes", "2"],
    "plot": ["RUN", "--out", "OUT"],
    "export": ["RUN", "--out", "OUT/x.onnx"],
    "tune": [
        "a2c",
        "--env",
        "CartPole-v1",
        "--total-timesteps",
        "160",
        "--trials",
        "1",
        "--only",
        "gamma",
        "--out",
        "OUT",
    ],
    "make_dataset": ["agent", "--env", "Pendulum-v1", "--steps", "400", "--num-envs", "2", "--out", "OUT/x.npz"],
    "methods": ["--format", "plain"],
    "gradient_lab": ["--env", "bandit-linear", "--estimators", "mc", "--samples", "4", "--repetitions", "2"],
    "inventory_network": ["ccrl/InventoryOneStoreLost-v0", "--out", "OUT"],
    "reproduce": ["--papers", "bnpo", "--page-only", "--results", "OUT"],
}
WRONG = [
    "--no-such", "", "nan", "-1", "0", "x", "/none", "--help=1", "é", "--trust", "evilmod:X", "--checkpoint", "best",
    "--episodes", "--seed", "--device", "cuda:9", "[]", "{}", "1e9999", "--out", "/proc/no/x", "--video",
]  # fmt: skip


def _scripts(rng: random.Random, folder: Path) -> Case:
    name = rng.choice(sorted(SCRIPTS))
    argv = list(SCRIPTS[name])
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(argv))
        how = rng.choice(["put", "replace", "replace", "drop"])
        if how == "drop":
            argv.pop(at)
        else:
            argv[at : at + (how == "replace")] = [rng.choice(WRONG)]
        argv = argv or ["x"]
    filled = [x.replace("RUN", str(folder / "run")).replace("OUT", str(folder / "out")) for x in argv]
    shutil.copytree(files.trained(rng.choice(["ppo", "sac", "grpo"])), folder / "run")
    path = Path(__file__).parents[1] / f"{name}.py"

    def begin() -> None:
        before, where = sys.argv, os.getcwd()
        sys.argv = [str(path), *filled]
        os.chdir(folder)  # a path without a folder is written here
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv = before
            os.chdir(where)

    return Case(f"{name} {' '.join(map(repr, argv))}", begin)


KINDS = {
    "settings": _settings, "options": _options, "checkpoints": files.checkpoints, "jsonl": files.jsonl,
    "csv": files.csv, "gymnasium": _gymnasium, "commands": _commands, "scripts": _scripts, "uses": uses.uses,
}  # fmt: skip


def case(kind: str, rng: random.Random, folder: Path) -> Case:
    """An input of ``kind``; files that it needs are in ``folder``."""
    return KINDS[kind](rng, folder)
