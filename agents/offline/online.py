"""From offline to online: an agent trained on a data set goes on in the environment, as a new run of TD3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from agents.offline.base import OfflineAgent
from agents.offline.policy import OfflinePolicy
from agents.td3 import TD3

__all__ = ["go_online"]


def go_online(agent: OfflineAgent, env: Any, *, keep_data: bool = True, **settings: Any) -> TD3:
    """TD3 (Fujimoto et al. 2018) that starts from an offline agent's actor and, where it has plain ones, critics.

    Both are carried over exactly: offline networks see standardised observations, which is written into their first
    layers, and TD3's own see raw ones. A stochastic actor goes on with its mean. The clock starts at 0; checkpoints are
    TD3's. Critics with layer normalisation (ReBRAC), of rewards in other units (``reward`` is not raw) and those of
    agents without critics (BC) start anew.

    :param agent: a trained ``td3_bc``, ``iql``, ``rebrac``, ``bc`` or ``pgd``.
    :param env: an id or an environment with the agent's spaces.
    :param keep_data: the replay memory begins with the data set's rows, where the agent has them.
    :param settings: of TD3; ``hidden`` and ``activation`` are the agent's, ``learning_starts`` is 0, ``gamma`` and the
        seed the agent's unless given.
    :raises ValueError: a policy of another kind, Dict observations, another environment's spaces, other networks
        (widths, activation, normalised observations), or a memory smaller than the data.
    """
    policy = agent.policy
    if not isinstance(policy, OfflinePolicy) or policy.keys:
        raise ValueError(
            f"go_online: expected an offline agent with a policy of its own on vector observations, got {agent.name}; "
            "of cdsa take the base"
        )
    hidden = tuple(agent.config.hidden)
    for name in ("hidden", "critic_hidden"):
        if tuple(settings.get(name) or hidden) != hidden:
            raise ValueError(f"go_online: expected {name}={hidden} as {agent.name} has, got {settings[name]}; drop it")
    for name, wanted in (("activation", "relu"), ("normalise_obs", False)):
        if settings.get(name, wanted) != wanted:
            raise ValueError(
                f"go_online: expected {name}={wanted!r}, got {settings[name]!r}: the networks of {agent.name} would be "
                "other functions; drop it"
            )
    start: dict[str, Any] = {
        "hidden": hidden, "learning_starts": 0, "gamma": getattr(agent.config, "gamma", 0.99), "seed": agent.seed,
    }  # fmt: skip
    online = TD3(env, **(start | settings))
    space, actions = online.env.single_observation_space, online.env.single_action_space
    sizes = math.prod(space.shape or ()), math.prod(actions.shape or ())
    if sizes != (policy.width, policy.n_out):
        raise ValueError(
            f"go_online: expected observations and actions of {policy.width} and {policy.n_out} numbers as "
            f"{agent.name} has, got {sizes[0]} and {sizes[1]}; give the agent's own environment"
        )
    _carry_over(policy, online.policy, critics=getattr(agent.config, "reward", "raw") == "raw")
    # the targets were made from the networks of before
    online.learner.cycle.start(online.ctx.bank)  # type: ignore[attr-defined]
    if keep_data and agent.data is not None:
        columns = agent.data.columns()
        rows = {
            k: torch.as_tensor(columns[k]) for k in ("obs", "action", "reward", "next_obs", "terminated", "truncated")
        }
        rows |= {"alive": (~rows["terminated"]).float(), "power": torch.ones_like(rows["reward"])}  # single steps
        ring: Any = online.learner.ring  # type: ignore[attr-defined]
        ring.replace({k: rows[k] for k in ring.names})
    return online


@torch.no_grad()
def _carry_over(source: OfflinePolicy, target: nn.Module, critics: bool) -> None:
    found = dict(source.named_parameters())
    plain = critics and "critic.net.last_weight" in found and not any("layer_norms" in k for k in found)
    mean, std, width = source.obs_mean, source.obs_std, source.width
    for name, parameter in target.named_parameters():
        if name.startswith("actor.") or plain:
            parameter.copy_(found[name])
    # W (s - mean) / std + b = (W / std) s + (b - (W / std) mean)
    actor: Any = target.actor
    first = actor.net[0]
    first.weight.div_(std)
    first.bias.sub_(first.weight @ mean)
    if plain:
        critic: Any = target.critic
        weight, bias = critic.net.weights[0], critic.net.biases[0]
        weight[:, :width].div_(std.unsqueeze(-1))
        bias.sub_(mean.unsqueeze(0) @ weight[:, :width])
