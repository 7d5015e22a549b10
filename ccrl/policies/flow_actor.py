"""A flow as an actor in control: an action is what some denoising steps make of noise, given the observation.

Every step is a Gaussian transition of ``ccrl.diffusion.flow``, so the chain has a density, and PPO can treat denoising
steps as steps of a Markov decision process inside the environment's (Ren et al. 2024, arXiv 2409.00588).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ccrl.batched_env import Tree
from ccrl.data import Data, Field
from ccrl.diffusion.flow import FlowSolver, flow_grid, gaussian_log_prob, make_schedule, mean_step
from ccrl.diffusion.networks import VelocityMLP
from ccrl.policies.actions import to_box
from ccrl.policies.mlp import MLPPolicy

__all__ = ["FlowActor"]


class FlowActor(MLPPolicy):
    """``actor.*`` is the velocity of actions in [-1, 1] per dimension, given what the actor observes; observations,
    critics and their names are ``MLPPolicy``'s.

    Besides ``log_prob`` ``[T', B]`` of whole chains, ``evaluate`` computes ``step_log_prob`` ``[T', B, K]`` of their
    transitions. The chain ``[K + 1, A]`` and its means ``[K, A]`` are raw columns.

    :param steps: K; :param solver: with noise in every step; :param noise: its amount.
    :raises ValueError: for actions that are no bounded vector, or a solver whose last step has no noise.
    """

    factors: Tensor
    fixed: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        steps: int = 8,
        solver: FlowSolver = "flow_sde",
        noise: float = 0.5,
        hidden: Sequence[int] = (128, 128),
        **settings: Any,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or not action_space.is_bounded():
            raise ValueError(f"action space: expected a Box vector with finite bounds, got {action_space}")
        super().__init__(observation_space, action_space, hidden=hidden, **settings)
        s = make_schedule(flow_grid(steps), solver, noise)
        if not bool((s.std > 0.0).all()):
            raise ValueError(f"solver: expected noise in every step, got {solver!r}, whose last step has none")
        self.steps = steps
        self.register_buffer("factors", torch.stack([s.time, s.x, s.v, s.std]).float(), persistent=False)
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        velocity = VelocityMLP(self.n_out, self._width("actor"), hidden)
        if hasattr(self.actor, "encoders"):
            velocity.encoders = self.actor.encoders
        self.actor: Any = velocity

    def fix_normaliser(self, obs: Tensor) -> None:
        """Take the statistics of ``obs`` ``[M, ...]`` and keep them: what was learned on them must go on to fit."""
        self.fixed.fill_(False)
        self.update_normaliser(obs.unsqueeze(0), torch.ones(1, len(obs), device=obs.device))
        self.fixed.fill_(True)

    @torch.no_grad()
    def update_normaliser(self, obs: Tree, valid: Tensor) -> None:
        if not bool(self.fixed):
            super().update_normaliser(obs, valid)

    def unit_action(self, action: Tensor) -> Tensor:
        """From the Box to [-1, 1]."""
        return 2.0 * (action - self.low) / (self.high - self.low) - 1.0

    # -- the policy protocol ------------------------------------------------------------------------------------------

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return torch.randn(n, self.steps + 1, self.n_out, generator=generator, device=device)

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``action`` ``[N, A]``, the end of ``chain`` ``[N, K + 1, A]``, and ``means`` ``[N, K, A]``; ``noise=None``
        starts at 0 and takes every mean."""
        seen = self.features(obs, "actor")
        time, by_x, by_v, std = self.factors.unbind(0)
        x = seen.new_zeros(seen.shape[0], self.n_out) if noise is None else noise[:, 0]
        chain, means = [x], []
        for k in range(self.steps):
            mean = mean_step(x, self.actor(x, time[k : k + 1], seen), by_x[k : k + 1], by_v[k : k + 1])
            x = mean if noise is None else mean + std[k] * noise[:, k + 1]
            chain.append(x)
            means.append(mean)
        return {"action": x, "chain": torch.stack(chain, 1), "means": torch.stack(means, 1)}

    def to_env(self, action: Tensor) -> Tensor:
        return to_box(self.low + (self.high - self.low) * 0.5 * (action + 1.0), self.low, self.high, False)

    def behaviour_fields(self) -> tuple[Field, ...]:
        chain = Field("old_chain", (self.steps + 1, self.n_out))
        return (Field("log_prob"), chain, Field("old_means", (self.steps, self.n_out)))

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {"log_prob": self.chain_log_prob(columns["old_chain"], columns["old_means"]).sum(-1)}

    def chain_log_prob(self, chain: Tensor, means: Tensor) -> Tensor:
        """``[..., K]`` of chains ``[..., K + 1, A]`` whose transitions have ``means`` ``[..., K, A]``."""
        std = self.factors[3].expand(means.shape[:-1])
        return gaussian_log_prob(chain[..., 1:, :], means, std, "sum")

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        lead = batch.shape
        out: dict[str, Tensor] = {}  # Dynamo does not trace a call of dict[str, Tensor]
        if want & {"log_prob", "step_log_prob"}:
            chain = batch["old_chain"].reshape(-1, self.steps + 1, self.n_out).transpose(0, 1)
            time, by_x, by_v, _ = (row.unsqueeze(1) for row in self.factors)
            velocity = self.actor(chain[:-1], time, self._latents(batch, "actor"))
            means = mean_step(chain[:-1], velocity, by_x, by_v).transpose(0, 1)
            steps = self.chain_log_prob(chain.transpose(0, 1), means)
            out |= {"step_log_prob": steps, "log_prob": steps.sum(-1)}
        if heads := [head for head in self.heads if head in want]:
            out |= self.critic.forward(self._latents(batch, "critic"), heads)
        return {name: value.reshape(*lead, *value.shape[1:]) for name, value in out.items() if name in want}

    def outputs(self) -> frozenset[str]:
        return frozenset({"log_prob", "step_log_prob", *self.heads})
