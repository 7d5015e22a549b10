"""An actor and action-value critics on observations of any kind: the networks of SAC, TD3 and CrossQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.data import Data
from ccrl.policies.distributions import SQUASHED
from ccrl.policies.mlp import MLPPolicy
from ccrl.policies.q import TwinQ

__all__ = ["ActorQ", "DeterministicActorQ"]


class ActorQ(MLPPolicy):
    """A squashed Gaussian actor of state-dependent scale, ``n_critics`` critics as one batched product, a temperature.

    Parameters are named ``actor.*``, ``critic.*`` and ``log_alpha``. The critics see actions in [-1, 1].

    Besides what ``MLPPolicy`` evaluates, each ``[T', B, ...]``: ``q`` ``[.., n]`` of the stored actions; ``new_q``
    ``[.., n]``, ``new_q1`` (the first critic's) and ``new_log_prob`` of ``new_action`` (as stored), drawn from the
    policy with the column ``noise`` and differentiable in its parameters ``new_mean``, ``new_log_std``; ``log_alpha``.

    :raises ValueError: for other actions than a Box with finite bounds, each low below its high.
    """

    critic: Any
    own = frozenset({"q", "new_q", "new_q1", "new_log_prob", "new_action", "new_mean", "new_log_std", "log_alpha"})
    needs_noise = True

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        n_critics: int = 2,
        activation: str = "relu",
        squash: bool = True,
        state_dependent_std: bool = True,
        orthogonal: bool = False,
        heads: Mapping[str, Sequence[int]] | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(action_space, gym.spaces.Box) or not (action_space.low < action_space.high).all():
            raise ValueError(f"action space: expected a Box whose bounds leave a range, got {action_space}")
        if not action_space.is_bounded():
            raise ValueError(f"action space: expected finite bounds, got {action_space}; rescale the actions")
        self.n_critics = n_critics
        super().__init__(
            observation_space, action_space, heads={"q": ()} if heads is None else heads, activation=activation,
            squash=squash, state_dependent_std=state_dependent_std, orthogonal=orthogonal, **settings,
        )  # fmt: skip
        self.log_alpha = nn.Parameter(torch.zeros(1))

    def _make_critic(
        self,
        width: int,
        hidden: Sequence[int],
        activation: str,
        heads: Mapping[str, Sequence[int]],
        gains: Callable[[int, float], list[float] | None],
    ) -> nn.Module:
        return TwinQ(width, self.n_out, hidden=hidden, activation=activation, n=self.n_critics)

    @property
    def alpha(self) -> Tensor:
        """The temperature, 0-d, without gradient."""
        return self.log_alpha.detach().exp().squeeze(0)

    def critic_action(self, action: Tensor) -> Tensor:
        """Stored actions as the critics see them, in [-1, 1]."""
        if self.distribution is SQUASHED:
            return action.tanh()
        low, high = (bound.to(action.dtype) for bound in (self.low, self.high))
        return (action - low) * (2.0 / (high - low)) - 1.0

    def q(self, obs: Tree, action: Tensor) -> Tensor:
        """``[n, B]`` of stored actions ``[B, A]``."""
        values: Tensor = self.critic(self.features(obs, "critic"), self.critic_action(action))
        return values

    def draw(self, obs: Tree, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions ``[B, A]`` as stored and their log-probabilities ``[B]`` (in [-1, 1] units), differentiable."""
        return self._draw(self.params(obs), noise)

    def _trained_params(self, latent: Tensor) -> dict[str, Tensor]:
        """Distribution parameters as the actor's loss reads them (batch statistics, where there are any)."""
        return self._params(latent)

    def _draw(self, params: dict[str, Tensor], noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.distribution.rsample(params, noise)  # type: ignore[attr-defined, no-any-return]

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        lead = batch.shape
        out: dict[str, Tensor] = {}
        if rest := want - self.own:
            out |= super().evaluate(batch, rest)
        found: dict[str, Tensor] = {}
        critic = self._latents(batch, "critic") if want & {"q", "new_q", "new_q1"} else None
        if "q" in want:
            found["q"] = self.critic(critic, self.critic_action(batch["action"].flatten(0, 1))).t()
        if want & self.own - {"q", "log_alpha"}:
            params = self._trained_params(self._latents(batch, "actor"))
            found |= {f"new_{k}": v for k, v in params.items()}
            noise = batch["noise"].flatten(0, 1) if self.needs_noise else None
            found["new_action"], found["new_log_prob"] = self._draw(params, noise)
            seen = self.critic_action(found["new_action"])
            if "new_q" in want:
                found["new_q"] = self.critic(critic, seen).t()
            if "new_q1" in want:
                found["new_q1"] = self.critic(critic, seen, 1).squeeze(0)
        if "log_alpha" in want:
            out["log_alpha"] = self.log_alpha.expand(lead)
        return out | {k: v.reshape(*lead, *v.shape[1:]) for k, v in found.items() if k in want}

    def outputs(self) -> frozenset[str]:
        return (super().outputs() | self.own) - set(self.heads) | {"q"}


class DeterministicActorQ(ActorQ):
    """A deterministic actor ``mid + half tanh(net)`` (Fujimoto et al. 2018): actions are stored as executed, and
    exploration adds normal noise of ``exploration`` times half the action range, clipped to the bounds."""

    exploration: float = 0.1
    own = frozenset({"q", "new_q", "new_q1", "new_action"})
    needs_noise = False

    def __init__(
        self, observation_space: gym.Space[Any], action_space: gym.Space[Any], *, exploration: float = 0.1,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.exploration = exploration
        super().__init__(observation_space, action_space, squash=False, state_dependent_std=False, **settings)
        del self.log_alpha, self.actor.log_std

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (bound.to(like.dtype) for bound in (self.low, self.high))
        return 0.5 * (low + high), 0.5 * (high - low)

    def _named_params(self, out: Tensor) -> dict[str, Tensor]:
        middle, half = self._bounds(out)
        return {"mean": middle + half * out.tanh()}

    def _act(self, params: dict[str, Tensor], noise: Tensor | None) -> dict[str, Tensor]:
        return {"action": params["mean"] if noise is None else self.perturbed(params["mean"], self.exploration * noise)}

    def perturbed(self, action: Tensor, noise: Tensor) -> Tensor:
        """``action + half * noise``, clipped to the bounds."""
        middle, half = self._bounds(action)
        return (action + half * noise).clamp(middle - half, middle + half)

    def _draw(self, params: dict[str, Tensor], noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return params["mean"], torch.zeros_like(params["mean"][..., 0])

    def behaviour_fields(self) -> tuple[Any, ...]:
        return ()

    def outputs(self) -> frozenset[str]:
        return self.own
