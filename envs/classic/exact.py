"""Tasks whose expected return is known in closed form, for any policy of the suite.

A task that mixes in :class:`Exact` writes its return as a differentiable function of the action distribution at its
states; gradients and Hessian products come from automatic differentiation in float64, through the policy's own network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from ccrl.data import Data

__all__ = ["Exact", "Params", "as_theta", "flat_parameters"]

Params = Callable[[Tensor], Mapping[str, Tensor]]
"""Parameters ``[B, ...]`` of the action distribution at observations ``[B, O]``."""


def flat_parameters(policy: nn.Module) -> Tensor:
    """All parameters in one float64 vector ``[n]``, in the order of ``policy.parameters()``."""
    return torch.cat([p.detach().double().reshape(-1) for p in policy.parameters()])


class Exact:
    """Exact return, gradient, Hessian products and Fisher matrix of a policy at parameters ``theta [n]``.

    ``theta=None`` takes the policy's present parameters. Everything is float64, on the CPU.
    """

    single_action_space: Any
    gamma: float
    """Discount of the task's objective ``E sum_t gamma^t r_t``."""

    def objective(self, params: Params) -> Tensor:
        """The expected return, 0-d, as a differentiable function of the action distribution."""
        raise NotImplementedError

    def visits(self, params: Params) -> tuple[Tensor, Tensor]:
        """Observations ``[S, O]`` and how often ``[S]`` an episode visits them, on average and without discount."""
        raise NotImplementedError

    def exact_return(self, policy: nn.Module, theta: Tensor | None = None) -> Tensor:
        """``J(theta)``, 0-d."""
        return self._return(policy, as_theta(policy, theta))

    def exact_gradient(self, policy: nn.Module, theta: Tensor | None = None) -> Tensor:
        """``grad J``, ``[n]``: the direction of ascent."""
        gradient: Tensor = torch.func.grad(lambda x: self._return(policy, x))(as_theta(policy, theta))
        return gradient

    def exact_hvp(self, policy: nn.Module, theta: Tensor | None, v: Tensor) -> Tensor:
        """``hess J v``, ``[n]``."""
        gradient = torch.func.grad(lambda x: self._return(policy, x))
        product: Tensor = torch.func.jvp(gradient, (as_theta(policy, theta),), (v.double(),))[1]
        return product

    def exact_fisher(self, policy: Any, theta: Tensor | None = None) -> Tensor:
        """Fisher matrix of a whole path, ``E[u u^T]`` with ``u = sum_t grad log pi(a_t|x_t)``, ``[n, n]``.

        Scores of different steps are uncorrelated: it is the sum over steps, the Hessian of the visited KL.
        """
        theta = as_theta(policy, theta)
        with torch.no_grad():
            obs, weights = self.visits(lambda x: self._params(policy, theta, x))
            old = self._params(policy, theta, obs)
        kl = lambda x: (weights * policy.distribution.kl(self._params(policy, x, obs), old)).sum()  # noqa: E731
        fisher: Tensor = torch.func.hessian(kl)(theta)
        return fisher

    def _return(self, policy: nn.Module, theta: Tensor) -> Tensor:
        return self.objective(lambda obs: self._params(policy, theta, obs))

    def _params(self, policy: nn.Module, theta: Tensor, obs: Tensor) -> Mapping[str, Tensor]:
        named = dict(policy.named_parameters())
        pieces = torch.split(theta, [p.numel() for p in named.values()])
        state = {k: piece.view(p.shape) for (k, p), piece in zip(named.items(), pieces)}
        state |= {k: b.to(theta) if b.is_floating_point() else b for k, b in policy.named_buffers()}
        n, space = obs.shape[0], self.single_action_space
        discrete = isinstance(space, spaces.Discrete)
        action = torch.zeros(1, n, *space.shape, dtype=torch.int64 if discrete else theta.dtype)
        batch = Data({"obs": obs.to(theta).unsqueeze(0), "action": action, "valid": torch.ones(1, n)})
        out: dict[str, Tensor] = torch.func.functional_call(policy, state, (batch, frozenset({"dist"})))
        return {k: v.squeeze(0) for k, v in out.items()}


def as_theta(policy: nn.Module, theta: Tensor | None) -> Tensor:
    """``theta`` checked and in float64; the policy's own parameters if it is None."""
    if theta is None:
        return flat_parameters(policy)
    n = sum(p.numel() for p in policy.parameters())
    if theta.shape != (n,):
        raise ValueError(f"expected theta of shape ({n},), got {tuple(theta.shape)}")
    return theta.detach().double()
