"""Rewards that are a function of the SET of visited states (Prajapat et al. 2024, arXiv 2307.13372)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ccrl.batched_env import BatchedEnv, Tree
from ccrl.wrappers.reward_wrapper import RewardWrapper, where_rows

__all__ = ["SetFunction", "SetReward", "SetState"]

SetState = dict[str, Tensor]
"""What a set function remembers of ``N`` sets, each tensor ``[N, ...]``."""


class SetFunction(Protocol):
    """``F`` on subsets of a ground set ``0 .. n - 1``, for many sets at once; ``F(empty) = 0``. Pure: no method writes
    into its arguments."""

    n: int
    """Elements of the ground set."""
    capacity: int | None
    """Most elements (revisits counted) that a set can hold; ``None``: any number."""

    def initial(self, count: int) -> SetState:
        """``count`` empty sets."""
        ...

    def gain(self, state: SetState, element: Tensor) -> Tensor:
        """``F(s | A) = F(A + s) - F(A)`` ``[N]`` of an element ``[N]`` int64 per set."""
        ...

    def insert(self, state: SetState, element: Tensor) -> SetState:
        """The sets with one more element each."""
        ...


class SetReward(RewardWrapper):
    """Pays marginal gains: step ``h`` gets ``F(s_{h+1} | s_0 .. s_h)``, so that a return is ``F(tau) - F({s_0})``.

    The first state of an episode is in the set before the first step; no action is paid for it. ``log`` of a step has
    ``rollout/set_value``, the mean of ``F(tau)`` over the episodes that ended in it (NaN: none did).

    Args:
        env: what is wrapped; its own reward is dropped.
        function: the set function, on the environment's device.
        element: observations ``[N, ...]`` -> elements ``[N]`` int64; ``None``: the environment's method ``element``.
        paid: ``gain``, or ``modular``: ``F({s_{h+1}})`` at every visit, whatever was visited before (the additive
            reward of the baseline ModPO); ``set_value`` is then still ``F``.
        scale: rewards are multiplied by it; ``set_value`` is not.

    Raises:
        ValueError: episodes longer than the function's capacity, or a scale that is not positive.
    """

    def __init__(
        self,
        env: BatchedEnv,
        function: SetFunction,
        element: Callable[[Tree], Tensor] | None = None,
        *,
        paid: Literal["gain", "modular"] = "gain",
        scale: float = 1.0,
    ) -> None:
        super().__init__(env)
        if paid not in ("gain", "modular"):
            raise ValueError(f"SetReward: expected paid 'gain' or 'modular', got {paid!r}")
        if not 0.0 < scale < float("inf"):
            raise ValueError(f"SetReward: expected a positive scale, got {scale}")
        states = None if self.max_episode_steps is None else self.max_episode_steps + 1
        if function.capacity is not None and (states is None or states > function.capacity):
            raise ValueError(
                f"SetReward: expected episodes of at most {function.capacity} states, the capacity of the set "
                f"function, got a time limit of {self.max_episode_steps} steps ({states} states); raise the capacity"
            )
        self.function, self.paid, self.scale = function, paid, scale
        self.element: Callable[[Tree], Tensor] = env.element if element is None else element  # type: ignore[attr-defined]

    def begin(self, obs: Tree, where: Tensor) -> None:
        empty, first = self.function.initial(self.num_envs), self.element(obs)
        fresh = self.function.insert(empty, first) | {"set_value": self.function.gain(empty, first)}
        if not self.memory:
            self.memory = fresh
            return
        kept = {name: self.memory[name] for name in fresh}
        chosen = where_rows(where, fresh, kept)
        assert isinstance(chosen, dict)
        self.memory |= chosen

    def pay(self, obs: Tree, action: Tensor, successor: Tree, reward: Tensor, live: Tensor) -> Tensor:
        element = self.element(successor)
        state = {name: x for name, x in self.memory.items() if name != "set_value"}
        gain = self.function.gain(state, element)
        after = where_rows(live, self.function.insert(state, element), state)
        assert isinstance(after, dict)
        self.memory |= after
        self.memory["set_value"] = self.memory["set_value"] + torch.where(live, gain, torch.zeros_like(gain))
        if self.paid == "modular":
            gain = self.function.gain(self.function.initial(self.num_envs), element)
        return self.scale * gain

    def log(self, done: Tensor) -> dict[str, Any]:
        return {"rollout/set_value": self.memory["set_value"].masked_fill(~done, float("nan")).nanmean()}
