"""Agents in checkpoints: what is written, and what a file has to be before an agent is built from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ccrl import registry, segments
from ccrl.experiment import checkpoint
from ccrl.experiment import config as configs

__all__ = [
    "SavedAgent",
    "check_options",
    "load_agent",
    "prune_segments",
    "save_agent",
    "save_segmented",
    "save_without_memory",
]

A = TypeVar("A")


def check_options(env_kwargs: dict[str, Any]) -> None:
    """``TypeError`` for options that a checkpoint cannot hold, named; said when the agent is built and not at its first
    checkpoint, hours later. An environment that is built elsewhere and handed over takes any options."""
    for name, value in env_kwargs.items():
        if callable(value):
            raise TypeError(
                f"env_kwargs[{name!r}]: expected plain data, which a checkpoint can hold, got {value!r}; write "
                "'module:function' where the option takes one, or make the environment or task with it and give the "
                "agent that in place of its name"
            )
    checkpoint.portable(env_kwargs, "env_kwargs")


def save_agent(agent: Any, path: str | Path) -> None:
    """Write the agent's configuration, environment id and whole state as one atomic checkpoint.

    Raises:
        WriteError: the disk does not take it.
    """
    header = {
        "agent": agent.name, "config": configs.to_dict(agent.config), "env": agent.env_id, "seed": agent.seed,
        "env_kwargs": agent.env_kwargs, "policy": _name_of(agent.own_policy),
    }  # fmt: skip
    checkpoint.save(path, {**header, "state": agent.state_dict()})


def save_segmented(agent: Any, path: Path) -> None:
    """``agent.save``, with rows of replay memories in segments beside the file, each written once."""
    with segments.into(path.parent / checkpoint.REPLAY):
        agent.save(path)


def save_without_memory(agent: Any, path: Path) -> None:
    """``agent.save`` without the rows of replay memories: a file that acts, on its own and as small as the networks.
    Training that goes on from it fills the memory first."""
    with segments.leaving_out():
        agent.save(path)


def prune_segments(folder: Path) -> None:
    """Delete the segments that no checkpoint in ``folder`` needs."""
    if not (folder / checkpoint.REPLAY).is_dir():
        return
    needed: set[str] = set()
    for path in folder.glob("*.pt"):
        with suppress(checkpoint.CheckpointError):  # damaged: it needs nothing any more
            needed |= checkpoint.segment_names(checkpoint.load(path))
    segments.prune(folder / checkpoint.REPLAY, needed)


def _name_of(policy: Any) -> str | None:
    if policy is None:
        return None
    made = policy
    while isinstance(made, partial):
        made = made.func
    if not hasattr(made, "__qualname__"):  # a module, or an object that is called
        made = type(made)
    return f"{made.__module__}:{made.__qualname__}"


HEADER: dict[str, Any] = {
    "agent": str, "config": dict, "env": str | None, "seed": int, "env_kwargs": dict, "policy": str | None,
    "state": dict,
}  # fmt: skip


@dataclass(frozen=True)
class SavedAgent:
    """A checkpoint of an agent, read and checked; nothing that it names is built yet."""

    path: Path
    config: Any
    env: Any
    env_kwargs: dict[str, Any]
    seed: int
    state: dict[str, Any]
    fresh: bool
    """Its environments begin fresh episodes: they are others than those it was trained on."""


def read_agent(
    cls: type[Any], path: str | Path, env: Any, device: torch.device | str, policy: Any = None
) -> SavedAgent:
    """The checkpoint ``path``, for an agent of ``cls`` on ``env`` (None: the one that it names).

    Raises:
        ValueError: it is another agent's, or names no environment and none is given.
        CheckpointError: it lacks settings, or has others than this version.
    """
    saved = checkpoint.load(path, map_location=device)
    if saved.get("agent") != cls.name:
        raise ValueError(f"{path}: expected a checkpoint of {cls.name}, got one of {saved.get('agent')!r}")
    checkpoint.check_keys(saved, HEADER, f"{path}")
    for name, kinds in HEADER.items():
        if not isinstance(saved[name], kinds):
            raise checkpoint.CheckpointError(f"{path}: {name}: expected {kinds}, got {saved[name]!r}; it is damaged")
    checkpoint.check_keys(saved["config"], {f.name: None for f in dataclasses.fields(cls.Config)}, f"{path}: config")
    config = configs.from_dict(cls.Config, saved["config"])
    other = isinstance(env, str) and env.removeprefix("ccrl/") != (saved["env"] or "").removeprefix("ccrl/")
    here = saved["env"] if env is None else env
    if here is None:
        raise ValueError(f"{path} was trained on an environment object; pass env=")
    if saved["policy"] is not None and policy is None:
        # a name in a file is never imported: whoever loads it says what the policy is
        raise ValueError(f"{path} was trained with a policy of its own, {saved['policy']}; pass policy=")
    copies = getattr(here, "num_envs", None)
    if copies is not None and copies != getattr(config, "num_envs", copies):
        if "num_envs" not in {f.name for f in dataclasses.fields(config) if f.init}:
            raise ValueError(f"{path}: expected an environment of {config.num_envs} copies, got {copies}")
        config, other = dataclasses.replace(config, num_envs=copies), True
    kwargs = saved["env_kwargs"] if isinstance(here, str) and not (other and isinstance(env, str)) else {}
    state = segments.resolve(saved["state"], Path(path).parent / checkpoint.REPLAY)
    return SavedAgent(Path(path), config, here, kwargs, saved["seed"], state, other)


@contextmanager
def _names_of(path: str | Path, trust: Collection[str], env: Any) -> Iterator[None]:
    own = [env] if isinstance(env, str) else []  # the caller wrote it
    with registry.stored(str(path), [*trust, *own]):
        yield


@contextmanager
def _fitting(path: str | Path) -> Iterator[None]:
    """What does not fit into an object is said of the file, whatever the object says."""
    try:
        yield
    except checkpoint.CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(
            f"{path}: expected the state of this agent, got one that does not fit: {type(error).__name__}: {error}"
        ) from error


def load_agent(
    cls: type[A],
    path: str | Path,
    env: Any = None,
    device: torch.device | str = "cpu",
    *,
    policy: Any = None,
    trust: Collection[str] = (),
    restore_rng: bool = False,
) -> A:
    """The agent in a checkpoint, on ``env`` or on the environment that the checkpoint names.

    Another id, or an environment with another number of copies, begins with fresh episodes.

    Args:
        policy: the caller's own, for an agent that was trained with one.
        trust: names ``module:name`` in the file that may import; all others are refused.
        restore_rng: put the global generators where they were when it was saved, as a run needs that goes on bit for
            bit; otherwise the caller's are left alone.

    Raises:
        ValueError: a checkpoint of another agent, of other spaces, or without an environment.
        CheckpointError: a damaged file, one of another version, or one that lacks a part.
        UntrustedError: the file names a module that ``trust`` does not repeat.
    """
    saved = read_agent(cls, path, env, device, policy)
    with checkpoint.preserved_rng():
        with _names_of(path, trust, env):
            agent: Any = cls(  # type: ignore[call-arg]
                saved.env, saved.config, seed=saved.seed, device=device, env_kwargs=saved.env_kwargs, policy=policy,
                **cls.restored_with(saved.state),  # type: ignore[attr-defined]
            )  # fmt: skip
        own, state = agent.state_dict(), saved.state
        checkpoint.check_keys(state, own, f"{path}: state")
        mine, theirs = own["learner"], state["learner"]
        checkpoint.check_keys(theirs, mine, f"{path}: learner")
        with _fitting(path):
            different = checkpoint.different_shapes(theirs["policy"], agent.policy.state_dict())
        if different:
            raise ValueError(
                f"{path}: expected an environment with the spaces it was trained on, got {agent.spaces}; the policy's "
                f"shapes (here, in the checkpoint): {different}"
            )
        for part in theirs:
            if part == "estimator" or part.startswith("updaters/"):
                checkpoint.check_keys(theirs[part], mine[part], f"{path}: {part}")
        if saved.fresh:
            # shapes do not tell tasks apart: HalfCheetah's state fits Walker2d
            theirs.get("collector", {}).pop("env", None)
            for name, value in mine.get("estimator", {}).items():
                # what spans episodes is kept per copy of the environment
                if getattr(value, "shape", None) != getattr(theirs["estimator"][name], "shape", None):
                    theirs["estimator"][name] = value
        with _fitting(path):
            agent.load_state_dict(state)
    if restore_rng:
        with _fitting(path):
            checkpoint.set_rng_state(state["rng"])
    agent.last_checkpoint = Path(path)
    made: A = agent
    return made
