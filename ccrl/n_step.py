"""n-step returns at insertion: what a ring stores is whole, so no draw ever crosses an episode's end or the ring's."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.buffer import space_like
from ccrl.data import Data, Field, tree_leaves, tree_map

__all__ = ["NStepReturns"]


class NStepReturns:
    """Turns rollouts ``[T, N, ...]`` into rows of the ring that span up to ``n`` steps.

    A row starts at every step ``t`` and ends with the first terminated or truncated step, or after ``n``:

        reward = sum_{j < k} gamma^j r_{t+j},   next_obs, terminated, truncated, alive: of step t + k - 1,
        power = gamma^{k-1},   so that the value of ``next_obs`` counts ``power * gamma * alive``

    Rows that are not complete at a rollout's end wait for the next rollout (``state_dict`` saves them).

    :param n: steps, at least 1.
    :param gamma: discount factor.
    :param num_envs: environments of the rollouts.
    :raises ValueError: less than one step.
    """

    fields = (Field("power"),)

    def __init__(
        self,
        n: int,
        gamma: float,
        num_envs: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if n < 1:
            raise ValueError(f"NStepReturns: expected n >= 1, got {n}")
        self.n, self.gamma = n, gamma
        lead = (n, num_envs)
        self._obs = space_like(observation_space, lead, torch.device(device))
        self._action = space_like(action_space, lead, torch.device(device))
        self._reward = torch.zeros(lead, device=device)
        self._age = torch.zeros(lead, dtype=torch.int64, device=device)
        """Rewards summed so far; 0: the slot is free."""
        self._oldest = 0

    @torch.no_grad()
    def __call__(self, data: Data) -> Data:
        """The rows that are complete after this rollout, ``[T * n, N, ...]`` with ``valid``, oldest first."""
        following = data.next_obs()
        rows: list[dict[str, Tree]] = []
        for t in range(data.shape[0]):
            rows.append(self._step(data, tree_map(lambda x, t=t: x[t], following), t))  # type: ignore[misc]
        return _joined(rows)

    def _step(self, data: Data, following: Tree, t: int) -> dict[str, Tree]:
        slot = self._oldest
        valid = data["valid"][t] > 0
        for kept, tree in ((self._obs, data["obs"]), (self._action, data["action"])):
            for target, source in zip(tree_leaves(kept), tree_leaves(tree, kept)):
                target[slot].copy_(source[t])
        self._reward[slot].zero_()
        if "t" in data:  # fresh episodes, as after a resume without the environment's state: nothing goes on into them
            self._age.masked_fill_(valid & (data["t"][t] == 0), 0)
        active = (self._age > 0) & valid
        active[slot] = valid
        power = self.gamma ** self._age.to(self._reward.dtype)
        self._reward.add_(torch.where(active, power * data["reward"][t], 0.0))
        self._age.add_(active)
        self._oldest = (slot + 1) % self.n
        ended = data["terminated"][t] | data["truncated"][t]
        whole = active & ((self._age == self.n) | ended)
        order = torch.arange(self._oldest, self._oldest + self.n, device=self._age.device) % self.n
        out = self._rows(order, whole, power)
        lead = (self.n,)
        out["next_obs"] = tree_map(lambda x: x.expand(*lead, *x.shape), following)
        out |= {k: data[k][t].expand(*lead, -1) for k in ("terminated", "truncated", "alive")}
        self._age.masked_fill_(whole, 0)
        return out

    def _rows(self, order: Tensor, whole: Tensor, power: Tensor) -> dict[str, Tree]:
        """Copies of the slots in ``order``."""

        def take(x: Tensor) -> Tensor:
            return x.index_select(0, order)

        return {
            "obs": tree_map(take, self._obs), "action": tree_map(take, self._action), "reward": take(self._reward),
            "power": take(power), "valid": take(whole).to(self._reward.dtype),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The rows that wait."""
        trees = {"obs": self._obs, "action": self._action, "reward": self._reward, "age": self._age}
        return {k: tree_map(torch.clone, v) for k, v in trees.items()} | {"oldest": self._oldest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {"obs": self._obs, "action": self._action, "reward": self._reward, "age": self._age}
        if state["reward"].shape != self._reward.shape:
            return  # another number of environments: their episodes are fresh
        for name, tree in own.items():
            for target, source in zip(tree_leaves(tree), tree_leaves(state[name], tree)):
                target.copy_(source)
        self._oldest = int(state["oldest"])


def _joined(rows: list[dict[str, Tree]]) -> Data:
    first = rows[0]
    columns: dict[str, Tree] = {}
    for name, tree in first.items():
        if isinstance(tree, dict):
            columns[name] = {k: torch.cat([_leaf(r[name], k) for r in rows]) for k in tree}
        else:
            columns[name] = torch.cat([_leaf(r[name], None) for r in rows])
    return Data(columns)


def _leaf(tree: Tree, key: str | None) -> Tensor:
    return tree if isinstance(tree, Tensor) else tree[str(key)]
