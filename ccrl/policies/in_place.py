"""Acting through a whole rollout: the kernels of an ``MLPPolicy`` with ``out=`` in the buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.policies.distributions import CATEGORICAL, GAUSSIAN, SQUASHED, FactoredCategorical
from ccrl.policies.encoders import FastTanh, Perceptron
from ccrl.policies.mlp import LOG_STD_RANGE, MLPPolicy
from ccrl.policies.normaliser import RunningNorm

__all__ = ["InPlaceActor"]

FROM_STEPS = 8
"""Rollouts of fewer steps are acted as usual: what is made once per rollout would cost more than it saves."""
ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Tanh: torch.tanh_,
    FastTanh: torch.tanh_,
    nn.ReLU: torch.relu_,
    nn.ELU: lambda x: nn.functional.elu(x, inplace=True),
    nn.SiLU: lambda x: nn.functional.silu(x, inplace=True),
}
METHODS = ("act", "_act", "params", "_params", "_named_params", "to_env", "features")


class InPlaceActor:
    """``policy.act`` and ``policy.to_env`` for the steps of one rollout, to the last bit.

    Views, weights' transposes and scratch tensors are made once for the rollout; a step then makes none but the actions
    that the environment gets, which may keep them.

    :param obs: an observation ``[N, ...]`` of the rollout.
    :param noise: ``[T, N, ...]``, what ``draw_noise`` returned for the rollout.
    :param actions: the rows ``[N, ...]`` that take the stored actions.
    :param columns: ``mean``, ``log_std`` or ``logits`` -> column ``[T, N, A]`` that takes it.
    """

    def __init__(
        self, policy: MLPPolicy, obs: Tree, noise: Tensor, actions: Sequence[Tensor], columns: Mapping[str, Tensor]
    ) -> None:
        self.policy, self.noise, self.actions = policy, noise.unbind(), actions
        steps, n = noise.shape[:2]
        like = columns[policy.distribution.names[0]]
        self.layers, shared = list[tuple[Tensor, Tensor, Any]](), list[Tensor]()
        net = [*policy.actor.net]
        for i, layer in enumerate(net):
            if isinstance(layer, nn.Linear):
                after = ACTIVATIONS[type(net[i + 1])] if i + 1 < len(net) else None
                self.layers.append((layer.bias, layer.weight.t(), after))
                shared.append(like.new_empty(n, layer.out_features))
        self.hidden, self.last = shared[:-1], shared[-1]
        self.rows = {name: column.unbind() for name, column in columns.items()}
        self.free = policy._log_std_init is None  # the scale is a parameter, or there is none
        self.outputs = self.rows["logits" if "logits" in columns else "mean"] if self.free else (self.last,) * steps
        if "log_std" in columns and self.free:
            log_std = policy.actor.log_std.expand(n, policy.n_out)
            columns["log_std"].copy_(log_std)
            self.std = log_std.exp()
        self.direct = isinstance(obs, Tensor) and obs.dim() == 2 and obs.dtype == like.dtype and _reads_it(policy)
        """The network reads the observation as it is, or normalised."""
        self.norm: Any = policy.norm[policy._norm_names["obs"]] if self.direct and policy.normalise_obs else None
        self.seen = like.new_empty(obs.shape) if self.norm is not None and isinstance(obs, Tensor) else None

    @classmethod
    def of(
        cls, policy: Any, obs: Tree, noise: Tensor, actions: Sequence[Tensor], columns: Mapping[str, Tensor]
    ) -> InPlaceActor | None:
        """One for ``policy``, or None where it is not a plain perceptron policy: another class, methods of its own,
        hooks, layers of another kind or type, autocast."""
        if len(noise) < FROM_STEPS or not isinstance(policy, MLPPolicy):
            return None
        own = any(getattr(type(policy), m) is not getattr(MLPPolicy, m) or m in vars(policy) for m in METHODS)
        known = isinstance(policy.distribution, FactoredCategorical) or any(
            policy.distribution is d for d in (GAUSSIAN, SQUASHED, CATEGORICAL)
        )
        if own or not known or columns.keys() != set(policy.distribution.names):
            return None
        net, device = policy.actor.net, noise.device.type
        plain = type(net) is Perceptron and all(_is_plain(x) for x in (policy, net, *net)) and _alternates(net)
        types = {x.dtype for x in (*policy.actor.net.parameters(), *columns.values())}
        if not plain or len(types) > 1 or torch.is_autocast_enabled(device):
            return None
        return cls(policy, obs, noise, actions, columns)

    def __call__(self, t: int, obs: Tree) -> Tensor:
        """Store action ``t`` and its parameters; what the environment executes."""
        x, *hidden = self._features(obs), *self.hidden
        for (bias, weight, after), y in zip(self.layers, (*hidden, self.outputs[t])):
            torch.addmm(bias, x, weight, out=y)
            x = y if after is None else after(y)
        policy, noise, action = self.policy, self.noise[t], self.actions[t]
        if "logits" in self.rows:
            drawn = policy.distribution.sample({"logits": x}, noise)
            action.copy_(drawn)
            return drawn
        mean, std = x, self.std if self.free else None
        if std is None:
            mean, log_std = x.chunk(2, -1)
            scale = self.rows["log_std"][t]
            assert policy._log_std_init is not None
            torch.add(log_std, policy._log_std_init, out=scale).clamp_(*LOG_STD_RANGE)
            self.rows["mean"][t].copy_(mean)
            std = scale.exp()
        torch.addcmul(mean, std, noise, out=action)
        return policy.to_env(action)

    def _features(self, obs: Tree) -> Tensor:
        if not self.direct or not isinstance(obs, Tensor):
            return self.policy.features(obs, "actor")
        if self.seen is None:
            return obs
        torch.sub(obs, self.norm.shift, out=self.seen)
        return self.seen.mul_(self.norm.scale).clamp_(-self.norm.clip, self.norm.clip)


def _alternates(net: nn.Sequential) -> bool:
    """Linear layers with an activation between each two."""
    return len(net) % 2 == 1 and all(
        type(x) is nn.Linear and x.bias is not None if i % 2 == 0 else type(x) in ACTIVATIONS for i, x in enumerate(net)
    )


def _is_plain(module: nn.Module) -> bool:
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _reads_it(policy: MLPPolicy) -> bool:
    """The actor sees one vector, which at most the normaliser changes."""
    norms = list(policy.norm.values())
    return (
        policy._groups["actor"] == ["obs"]
        and not policy._encoded.get("actor")
        and policy._sizes["obs"] > 0
        and all(type(x) is RunningNorm and _is_plain(x) for x in norms)
    )
