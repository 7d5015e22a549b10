"""Policies with a memory: a GRU or LSTM between the features and the networks of actor and critic."""

from __future__ import annotations

from typing import Any, Literal, Self

import gymnasium as gym
import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import Data, Field, Unit, tree_map
from ccrl.policies.memory import Memory
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.observations import Role

__all__ = ["RecurrentPolicy"]


class RecurrentPolicy(MLPPolicy):
    """``MLPPolicy`` with a recurrent layer of its own for the actor and for the critic.

    The state ``[N, S]`` holds both (the actor's first). Rollouts store the one before their first row, column
    ``policy_state`` ``[N, S]``, and which rows begin an episode, column ``first`` ``[T, N]``; updates run over whole
    columns from that state, with the parameters of the moment. States therefore come from the parameters at their
    collection, and gradients end where a rollout begins: ``n_steps`` is the length of backpropagation through time.

    :param recurrent: the layer, ``gru`` or ``lstm``.
    :param recurrent_size: its units.
    """

    unit: Unit = "sequence"
    compiles = False  # the loop over time would be unrolled into the graph: minutes of compilation

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        recurrent: Literal["gru", "lstm"] = "gru",
        recurrent_size: int = 64,
        **settings: Any,
    ) -> None:
        self._recurrent = (recurrent, recurrent_size)
        super().__init__(observation_space, action_space, **settings)
        self._split = [self.actor.memory.state_size, *([self.critic.memory.state_size] if self.heads else [])]

    def without_critic(self) -> Self:
        own = super().without_critic()
        own._split = own._split[:1]
        return own

    def _make_memory(self, role: Role, orthogonal: bool) -> Memory:
        kind, size = self._recurrent
        return Memory(kind, self._width(role), size, orthogonal)

    def initial_state(self, n: int) -> Tensor:
        like = next(self.actor.parameters())
        return torch.zeros(n, sum(self._split), dtype=like.dtype, device=like.device)

    def behaviour_fields(self) -> tuple[Field, ...]:
        dtype = next(self.actor.parameters()).dtype
        return (*super().behaviour_fields(), Field("policy_state", (sum(self._split),), dtype, per="sequence"))

    def params(self, obs: Tree) -> dict[str, Tensor]:
        raise ValueError("a recurrent policy has no action distribution without its state; use act or evaluate")

    def values(self, obs: Tree, head: str = "value") -> Tensor:
        raise ValueError("a recurrent critic has no values without its state; use state_values or evaluate")

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """As ``MLPPolicy.act``, and ``state`` ``[B, S]`` after this step; ``state=None`` begins an episode."""
        rows = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
        state = self.initial_state(rows) if state is None else state
        if first is not None:
            state = state.masked_fill(first.unsqueeze(-1), 0.0)
        parts = torch.split(state, self._split, -1)
        latent, after = self.actor.memory.step(self.features(obs, "actor"), parts[0])
        states = [after]
        if self.heads:
            states.append(self.critic.memory.step(self.features(obs, "critic"), parts[1])[1])
        return {**self._act(self._params(latent), noise), "state": torch.cat(states, -1)}

    def state_values(self, data: Data, head: str = "value") -> tuple[Tensor, Tensor]:
        after = data.successors
        first = torch.cat([data["first"], torch.zeros_like(data["first"][:1])])
        out, states = self._run("critic", after.stream, data["policy_state"], first)
        value = self._head(out.flatten(0, 1), head).view(out.shape[:2])
        slot = after.slot.flatten()
        places = (slot >= 0).nonzero().squeeze(-1)
        final: Tensor | None = None
        if len(places):
            # the final observation continues its episode: from the state after the step that ended it
            before = states[:-1].flatten(0, 1).index_select(0, places)
            rows, chosen = self.features(after.rows, "critic"), slot[places]
            values = self._head(self.critic.memory.step(rows.index_select(0, chosen), before)[0], head)
            final = values.new_zeros(rows.shape[0]).index_copy(0, chosen, values)
        return value[:-1], after.patch(value[1:], value[:-1], final)

    def _head(self, latent: Tensor, head: str) -> Tensor:
        return self.critic.forward(latent, (head,))[head]

    def _latents(self, batch: Data, role: Role) -> Tensor:
        if "policy_state" not in batch.sequence:
            raise ValueError(
                "a recurrent policy is evaluated on whole columns of a rollout; cut them with Batching(unit='sequence')"
            )
        return self._run(role, batch["obs"], batch["policy_state"], batch["first"])[0].flatten(0, 1)

    def _run(self, role: Role, obs: Tree, state: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and states ``[T, B, ...]`` of a role over observations ``[T, B, ...]``."""
        flat: Tree = tree_map(lambda x: x.reshape(-1, *x.shape[2:]), obs)
        x = self.features(flat, role)
        x = x.reshape(*first.shape, x.shape[-1])
        parts = torch.split(state, self._split, -1)
        memory = self.actor.memory if role == "actor" else self.critic.memory
        return memory.forward(x, parts[0 if role == "actor" else 1], first)
