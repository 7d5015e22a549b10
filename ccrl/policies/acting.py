"""Acting with a policy outside of training: evaluation, videos, ``predict``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from numpy.typing import NDArray
from torch import Tensor

from ccrl.adapters.spaces import numpy_act
from ccrl.batched_env import Tree
from ccrl.data import tree_map

__all__ = ["Acting", "has_memory", "predict"]

State = tuple[NDArray[Any], ...] | None


def has_memory(policy: Any) -> bool:
    """Whether the policy's actions depend on a state that somebody must keep."""
    start = getattr(policy, "initial_state", None)
    return start is not None and start(1) is not None


class Acting:
    """``(obs [N, ...], deterministic) -> action [N, ...]``, with the policy's state kept between calls.

    Whoever steps the environment calls ``restart``: at the beginning, and with the rows whose next observation begins
    an episode. Training's state is another one.
    """

    def __init__(self, policy: Any, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.state: Tensor | None = None
        self.first: Tensor | None = None

    def restart(self, first: Tensor | None = None) -> None:
        """``first`` ``[N]`` bool; None: fresh episodes everywhere."""
        self.first = first
        if first is None:
            self.state = None

    @torch.no_grad()
    def __call__(self, obs: Tree, deterministic: bool = False) -> Tensor:
        # in training the buffer casts float64
        obs = tree_map(lambda x: x.float() if x.is_floating_point() else x, obs)
        rows = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        noise = None if deterministic else self.policy.draw_noise(rows, None, self.device)
        out = self.policy.act(obs, noise, self.state, self.first)
        self.state, self.first = out.get("state"), None
        action: Tensor = self.policy.to_env(out["action"])
        return action


def predict(
    policy: Any,
    space: Space[Any],
    observation: NDArray[Any] | dict[str, NDArray[Any]],
    state: State,
    episode_start: NDArray[Any] | None,
    deterministic: bool,
    device: torch.device,
) -> tuple[NDArray[Any], State]:
    """SB3's ``predict``: one observation or a batch in NumPy -> actions of the same kind and the next state.

    A policy without a memory hands ``state`` back. With one, ``state`` is a tuple of one array ``[N, S]`` (None:
    episodes begin), and rows with ``episode_start`` forget it.

    Of a Dict observation only the keys that are read for it are asked for (without a memory the actor's).

    :raises ValueError: for observations, states or starts of another shape.
    """
    acting = Acting(policy, device)
    empty = policy.initial_state(1)
    reads: frozenset[str] | None = getattr(policy, "reads", None)
    if isinstance(space, spaces.Dict) and reads is not None:
        read = reads if empty is not None else policy.observed("actor")
        space = spaces.Dict({key: leaf for key, leaf in space.items() if key in read})
    if empty is not None and state is not None:
        size = empty.shape[1]
        if not isinstance(state, tuple) or len(state) != 1 or np.shape(state[0])[1:] != (size,):
            raise ValueError(f"state: expected what predict returned, a tuple of one array [N, {size}], got {state!r}")
        acting.state = torch.as_tensor(state[0], device=device, dtype=empty.dtype)
        if episode_start is not None:
            acting.first = torch.as_tensor(np.atleast_1d(episode_start), device=device, dtype=torch.bool)

    def act(obs: Tree) -> Tensor:
        rows = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        for name, x in (("state", acting.state), ("episode_start", acting.first)):
            if x is not None and len(x) != rows:
                raise ValueError(f"{name}: expected {rows} rows, as many as observations, got {len(x)}")
        return acting(obs, deterministic)

    action = numpy_act(act, space, observation, device)
    return action, state if acting.state is None else (acting.state.cpu().numpy(),)
