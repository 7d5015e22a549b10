"""Settings, options, environments and command lines that are wrong; :func:`case` has the files too."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import gymnasium
import numpy as np
import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from ccrl.adapters import from_gymnasium
from ccrl.batched_env import resolve_env
from ccrl.llm.task import resolve_task
from ccrl.settings import hints_of
from scripts import benchmark, train
from scripts.fuzzing import files
from scripts.fuzzing.case import SIZES, Case

__all__ = ["case"]

# -- settings and options ---------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300, 0.5, 1.5, -0.5, 0, 1, 2, -1, 3.0, 2**63, -(2**63) - 1,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, "", "no", "1", "auto", [], [1], [-1], (0,), {}, {"a": 1}, b"x", object)

ENVS = {"hdpo": "ccrl/InventoryOneStoreLost-v0", "subpo": "ccrl/GridCoverage-v0", "sac": "Pendulum-v1",
        "td3": "Pendulum-v1", "crossq": "Pendulum-v1", "mdpo_off_policy": "Pendulum-v1"}  # fmt: skip
OFFLINE = {"bc", "td3_bc", "iql", "rebrac", "cdsa", "pgd"}


def _value(rng: random.Random, hint: Any) -> Any:
    if get_origin(hint) is Literal and rng.random() < 0.5:
        choice = str(rng.choice(get_args(hint)))
        return rng.choice([choice.upper(), choice[:-1], choice + " ", choice])
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return rng.choice(NUMBERS if bare in (int, float) and rng.random() < 0.8 else NUMBERS + OTHERS)


def _settings(rng: random.Random, folder: Path) -> Case:
    names = sorted((agents.AGENTS.keys() - OFFLINE) | agents.METHODS.keys())
    name = rng.choice(names)
    cls = agents.get_agent(name)
    text = train.is_text(cls)
    known = {f.name for f in fields(cls.Config) if f.init}
    field = rng.choice(sorted(known))
    value = _value(rng, hints_of(cls.Config)[field])
    sizes = {k: v for k, v in SIZES.items() if k in known} | {field: value}
    sizes = {k: v for k, v in sizes.items() if k == field or not _unused(name, k)}
    made: list[Any] = []

    def begin() -> None:
        env = "modsum" if text else ENVS.get(name, "CartPole-v1")
        made.append(cls(env, cls.Config(**sizes)))

    return Case(f"{name} {field}={value!r}", begin, lambda: made[0].learn(1))


def _unused(name: str, setting: str) -> bool:
    """Settings that some agents have by inheritance and refuse."""
    return (name in ("bac", "bpg") and setting == "hidden") or (name == "npg_igt" and setting == "compile")


OPTIONS: dict[str, tuple[str, ...]] = {
    "CartPole-v1": ("sutton_barto_reward", "max_episode_steps", "num_envs", "autoreset_mode", "backend", "dtype"),
    "Pendulum-v1": ("g", "max_episode_steps"),
    "MountainCar-v0": ("goal_velocity",),
    "ccrl/LQR-v0": ("horizon", "gamma"),
    "ccrl/Bandit-v0": ("kind",),
    "ccrl/RandomMDP-v0": ("states", "actions", "concentration", "gamma", "horizon", "mdp_seed"),
    "ccrl/RandomWalk-v0": ("states", "gamma"),
    "ccrl/ShipSteering-v0": ("substeps",),
    "ccrl/InventoryOneStoreLost-v0": ("lead_time", "underage", "mean", "split", "max_episode_steps"),
    "ccrl/InventoryTransshipment-v0": ("stores", "lead_time", "underage", "correlation"),
    "HalfCheetah-v5": ("ctrl_cost_weight", "frame_skip", "reset_noise_scale", "xml_file", "nthread", "unstable"),
    "Hopper-v5": ("healthy_z_range", "terminate_when_unhealthy", "healthy_reward"),
    "FrozenLake-v1": ("is_slippery", "map_name", "backend"),
    "arithmetic": ("operands", "digits", "operators", "modulus", "max_new_tokens"),
    "modsum": ("questions", "fixed_length", "symbols"),
    "dead_prompts": ("dead", "smallest", "largest", "seed"),
    "countdown": ("numbers", "largest", "target", "operators"),
    "guessing": ("numbers", "turns"),
    "sorting": ("digits",),
    "code": ("degree", "largest", "cpu_seconds", "memory"),
    "arms": ("rewards",),
}
TEXTS = {"arithmetic", "modsum", "dead_prompts", "countdown", "guessing", "sorting", "code", "arms"}


def _options(rng: random.Random, folder: Path) -> Case:
    id = rng.choice(sorted(OPTIONS))
    option = rng.choice([*OPTIONS[id], "no_such_option"])
    value = rng.choice(NUMBERS + OTHERS + ("sync", "next_step", "SameStep", (0.1, math.nan), "+-", "é"))
    made: list[Any] = []

    def begin() -> None:
        if id in TEXTS:
            made.append(resolve_task(id, **{option: value}))
        else:
            arguments: dict[str, Any] = {"num_envs": 2} | {option: value}
            made.append(resolve_env(id, **arguments))

    def go_on() -> None:
        if id in TEXTS:
            made[0].prompts(2, torch.Generator().manual_seed(0))
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

    backend = rng.choice(["sync", "sync", "async"])
    made: list[Any] = []

    def begin() -> None:
        cls = agents.get_agent("ppo")
        env = from_gymnasium(Odd, 2, asynchronous=backend == "async")
        made.append(cls(env, cls.Config(num_envs=2, n_steps=8, n_epochs=1, batch_size=8, hidden=(4,), compile="off")))

    return Case(f"{backend} {slot}={value!r}{' later' if late else ''}", begin, lambda: made[0].learn(32), (Theirs,))


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


KINDS = {
    "settings": _settings, "options": _options, "checkpoints": files.checkpoints, "jsonl": files.jsonl,
    "csv": files.csv, "gymnasium": _gymnasium, "commands": _commands,
}  # fmt: skip


def case(kind: str, rng: random.Random, folder: Path) -> Case:
    """An input of ``kind``; files that it needs are in ``folder``."""
    return KINDS[kind](rng, folder)
