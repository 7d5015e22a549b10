"""The environment protocol of the suite: many copies of one task, torch in, torch out.

Everything that collects data speaks to a ``BatchedEnv``. It is duck-typed: a class with these members *is* one, no
inheritance needed. Adapters for Gymnasium, SB3 and others are in ``ccrl.adapters``; native ones are in ``envs``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import gymnasium
import torch
from gymnasium import Space
from gymnasium.vector import AutoresetMode
from torch import Tensor

from ccrl import registry

__all__ = [
    "AutoresetMode",
    "BatchedEnv",
    "StepResult",
    "StepRows",
    "Tree",
    "as_autoreset_mode",
    "check_device",
    "evaluation_env",
    "resolve_env",
    "resume_note",
    "stepper",
    "task_name",
]

Tree = Tensor | dict[str, Tensor]
"""An observation: one tensor ``[N, ...]`` or a flat dict of them."""


class StepResult(NamedTuple):
    """What one step of ``num_envs`` environments returns. The tensors may be the environment's own persistent
    buffers (Isaac Lab does that): whoever keeps them copies them before the next ``step``."""

    obs: Tree
    """``[N, ...]``. SAME_STEP: after a finished episode already the first observation of the next one.
    NEXT_STEP and DISABLED: the true successor, also where the episode ended."""
    reward: Tensor
    """``[N]`` float32."""
    terminated: Tensor
    """``[N]`` bool: the task ended (no value after this state). Wins where both flags are set."""
    truncated: Tensor
    """``[N]`` bool: the time limit cut the episode (the state after it still has a value)."""
    final_obs: Tree | None = None
    """SAME_STEP only: ``[N, ...]``, the true successor; read only the rows where an episode ended."""
    log: dict[str, Any] = {}  # noqa: RUF012  (read-only default of a tuple field)
    """Scalars for the logger, under their own names; 0-d tensors stay on the device."""


class StepRows:
    """Where one step goes: rows of a rollout buffer, named as the fields of a ``StepResult``.

    ``step_into(action, rows)`` writes every entry of ``obs``, ``reward``, ``terminated`` and ``truncated``, cast to
    their types, and with SAME_STEP and a ``final_obs`` at least the copies of it where an episode ended.
    """

    __slots__ = ("arrays", "final_obs", "obs", "reward", "terminated", "truncated")

    def __init__(
        self, obs: Tree, reward: Tensor, terminated: Tensor, truncated: Tensor, final_obs: Tree | None = None
    ) -> None:
        self.obs, self.reward, self.terminated, self.truncated = obs, reward, terminated, truncated
        self.final_obs = final_obs
        leaf = reward.device.type == "cpu" and isinstance(obs, Tensor)
        self.arrays = tuple(x.numpy() for x in (obs, reward, terminated, truncated)) if leaf else None  # type: ignore[union-attr]
        """NumPy views of the first four where they are on the host and the observation is no dict: a call of NumPy on a
        few rows takes a third of one of torch. None elsewhere."""

    def write(self, result: StepResult) -> None:
        """Copy what a step returned."""
        target = [self.reward, self.terminated, self.truncated, *_leaves(self.obs, self.obs)]
        source = [result.reward, result.terminated, result.truncated, *_leaves(result.obs, self.obs)]
        if self.final_obs is not None and result.final_obs is not None:
            target += _leaves(self.final_obs, self.final_obs)
            source += _leaves(result.final_obs, self.final_obs)
        # one call for all: calls of copy_ took three times as long as the copies
        torch._foreach_copy_(target, source)


def _leaves(tree: Tree, like: Tree) -> list[Tensor]:
    return [tree[key] for key in like] if isinstance(tree, dict) else [tree]


@runtime_checkable
class BatchedEnv(Protocol):
    """``N = num_envs`` copies of one task.

    Autoreset modes (the enum of Gymnasium):

    * ``SAME_STEP``: ``step`` resets finished copies at once; ``final_obs`` holds the true successor.
    * ``NEXT_STEP``: the step after an episode's end ignores the action and returns the reset observation with
      reward 0 and both flags False. The collector marks that row invalid.
    * ``DISABLED``: finished copies stay finished until ``reset(mask=...)``; the collector does that.
    """

    num_envs: int
    device: torch.device
    single_observation_space: Space[Any]
    single_action_space: Space[Any]
    autoreset_mode: AutoresetMode
    provides_final_obs: bool

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """Start new episodes in every copy, or only where ``mask`` ``[N]`` bool is set (the other rows of the
        returned ``[N, ...]`` observation are their current ones). ``seed=None`` continues the random stream."""
        ...

    def step(self, action: Tensor) -> StepResult:
        """Advance every copy by one step. ``action`` ``[N, *action_shape]`` on ``device`` (Discrete: int64 ``[N]``)."""
        ...

    def close(self) -> None:
        """Release simulators, threads and processes."""
        ...

    # Optional: ``step_into(action, rows: StepRows) -> dict``, which writes what ``step(action)`` would return into the
    # tensors of ``rows`` and returns the log (see ``StepRows``). It saves the copies, and is used only where the class
    # that defines it defines ``step`` too or inherits it: a subclass with another ``step`` alone keeps that one.
    #
    # Optional: ``state_dict() -> dict`` and ``load_state_dict(dict)`` (tensors, numbers, strings, nested dicts and
    # lists of them). With both, a resumed run continues bit for bit; without, it starts fresh episodes. Where that
    # depends on what is inside, the attribute ``resume_note`` says why the state cannot be had (``None``: it can).


def stepper(env: Any) -> Callable[[Tensor, StepRows], dict[str, Any]]:
    """What writes a step of ``env`` into rows and returns its log: ``step_into`` where it has one that belongs to its
    ``step``, else ``step`` and copies."""
    for cls in type(env).__mro__ if "step" not in vars(env) else ():
        if "step_into" in vars(cls):
            found: Callable[[Tensor, StepRows], dict[str, Any]] = env.step_into
            return found
        if "step" in vars(cls):
            break

    def step(action: Tensor, rows: StepRows) -> dict[str, Any]:
        result = env.step(action)
        rows.write(result)
        log: dict[str, Any] = result.log
        return log

    return step


def as_autoreset_mode(mode: AutoresetMode | str, *, where: str) -> AutoresetMode:
    """``mode`` as the enum, from itself, its value (``"NextStep"``) or its name (``"next_step"``).

    :raises ValueError: another one.
    """
    for known in AutoresetMode:
        if mode == known or (isinstance(mode, str) and mode.lower() in (known.value.lower(), known.name.lower())):
            return known
    names = ", ".join(repr(known.value) for known in AutoresetMode)
    raise ValueError(f"{where}: expected an AutoresetMode or one of {names} as autoreset_mode, got {mode!r}")


def resume_note(env: Any) -> str | None:
    """Why a run with ``env`` cannot be resumed bit for bit, as a sentence; ``None`` where it can."""
    if not (hasattr(env, "state_dict") and hasattr(env, "load_state_dict")):
        return f"{type(env).__name__} has no state_dict"
    note: str | None = getattr(env, "resume_note", None)
    return note


def task_name(env: Any) -> str:
    """What ``env`` plays, which tells environments of one class and of equal shapes apart: its ``id``, the class of its
    ``task``, or its own class, with what it wraps in brackets."""
    name = getattr(env, "id", "") or type(getattr(env, "task", env)).__name__
    inner = getattr(env, "env", None) or next(iter(getattr(env, "parts", ())), None)
    return f"{name} ({task_name(inner)})" if isinstance(inner, BatchedEnv) else str(name)


def check_device(device: torch.device | str) -> torch.device:
    """``device`` as an object.

    :raises ValueError: PyTorch knows no such device, or it is a GPU that this machine or this PyTorch does not have.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one of PyTorch's ('cpu', 'cuda', 'cuda:1'), got {device!r}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one that is here, got {str(device)!r}, but PyTorch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA GPUs; use 'cpu', or check nvidia-smi and that PyTorch is built for CUDA"
        )
    return found


def resolve_env(env: Any, num_envs: int, *, device: torch.device | str = "cpu", **env_kwargs: Any) -> BatchedEnv:
    """A ``BatchedEnv`` from one (returned as it is) or from an id.

    Ids are those of ``ccrl.registry.environments``: what plugins registered, or ``module:name``, a class called with
    ``(num_envs, device=device, **env_kwargs)``, or a Gymnasium environment's, of which ``num_envs`` copies are made
    with ``**env_kwargs``. A program that brings its own environments loads no plugin.

    :raises TypeError: if ``env`` is neither a string nor has the members of the protocol, or an id makes something that
        has not.
    :raises ValueError: an unknown id or device, or options for an environment that is already made.
    """
    if isinstance(env, str):
        make = registry.environments.get(env)
        if isinstance(make, type) and issubclass(make, gymnasium.Env):
            from ccrl.adapters import from_gymnasium  # late: it knows this module

            return from_gymnasium(functools.partial(make, **env_kwargs), num_envs, device=device)
        if not callable(make):
            raise TypeError(f"env: expected a class or function at {env!r}, got {type(make).__name__}")
        made = make(num_envs, device=device, **env_kwargs)
        return _checked(made, f"env: expected {env!r} to make a BatchedEnv")
    if env_kwargs:
        raise ValueError(
            f"env_kwargs: options go with an id, got {sorted(env_kwargs)} with an environment that is made"
        )
    return _checked(env, "env: expected an id or a BatchedEnv")


def evaluation_env(
    id: str, num_envs: int, split: Literal["dev", "test"], /, *, device: torch.device | str = "cpu", **env_kwargs: Any
) -> BatchedEnv:
    """``resolve_env``, and where its environment plays recorded data (``held_out(split)``), not the part that agents
    train on: ``dev`` chooses among checkpoints and settings, ``test`` judges what was chosen. A ``split`` among the
    options stays."""
    env: Any = resolve_env(id, num_envs, device=device, **env_kwargs)
    if "split" in env_kwargs or not hasattr(env, "held_out"):
        return env  # type: ignore[no-any-return]
    found: BatchedEnv = env.held_out(split)
    return found


def _checked(env: Any, expected: str) -> BatchedEnv:
    missing = [m for m in ("num_envs", "device", "reset", "step", "autoreset_mode") if not hasattr(env, m)]
    if missing:
        raise TypeError(f"{expected}, got {type(env).__name__} without {missing}; {_how_to_wrap(env)}")
    found: BatchedEnv = env
    return found


def _how_to_wrap(env: Any) -> str:
    if isinstance(env, gymnasium.Env):
        return "use ccrl.adapters.from_gymnasium(lambda: make_it(), num_envs), with a function that makes one copy"
    if isinstance(env, gymnasium.vector.VectorEnv):
        return "use ccrl.adapters.GymnasiumEnv(env)"
    if hasattr(env, "step_wait"):
        return "use ccrl.adapters.SB3Env(env)"
    return "ccrl.adapters wraps environments of Gymnasium and of SB3"
