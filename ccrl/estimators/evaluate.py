"""A method's loss on numbers of the caller: what a paper prints, without a model, a task or an agent.

    found = loss_of(GRPO, None, log_prob, old_log_prob, mask, reward=reward, group=group)
    found.loss, found.gradient        # a number, and its derivative by every log-probability

The numbers go through the recipe's own stages and terms, as one optimiser step on the whole rollout.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context
from ccrl.estimators.recipe import Method, Parts
from ccrl.estimators.terms import Outputs, surrogate

__all__ = ["Loss", "loss_of"]

_OWN = ("reward", "group", "max_length", "progress", "state")


class Loss(NamedTuple):
    """What ``loss_of`` finds."""

    advantage: Tensor | None
    """``[T, N]``; 0 in sequences that the method leaves out; None for a method without advantages (DPO, REAL)."""
    loss: Tensor
    """0-d: what the optimiser makes smaller."""
    gradient: Tensor
    """``[T, N]``: its derivative by ``log_prob``."""
    stats: dict[str, Tensor]
    """0-d each: every term before its weight, and the statistics that training logs."""


def loss_of(
    method: Method,
    config: Any,
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    reward: Tensor | None = None,
    group: Tensor | None = None,
    *,
    max_length: int | None = None,
    progress: float = 0.0,
    state: Mapping[str, Any] | None = None,
    seed: int = 0,
    **columns: Any,
) -> Loss:
    """The loss of ``method`` on ``N`` sequences of at most ``T`` steps, its gradient and what lies between.

    >>> loss_of(GRPO, GRPOConfig(clip_high=0.28), new, old, mask, reward=r, group=g).gradient

    :param config: a ``method.Config``; None: its defaults.
    :param log_prob: ``[T, N]``: of every chosen token (or action) under the policy that is trained. Time comes first.
    :param old_log_prob: ``[T, N]``: under the policy that sampled.
    :param mask: ``[T, N]``, 1 where there is a token.
    :param reward: ``[N]`` of the whole sequences; None: the sum of ``reward_components``, or zeros.
    :param group: ``[N]``: equal numbers are completions of one prompt; None: all of one prompt.
    :param max_length: the length cap, which some losses divide by; None: ``T``.
    :param progress: share of the training that is over, for methods with a schedule.
    :param state: what the recipe has learned so far, by the names of its buffers, as ``{"dual": 2.0}``.
    :param columns: what else the method reads: ``ref_log_prob`` ``[T, N]`` with a reference, ``entropy`` ``[T, N]``,
        ``reward_components`` ``[N, C]``, ``tempered_log_prob`` ``[T, N]`` (at the temperature that it asks for), ...
        Forward outputs other than ``log_prob`` are constants: the gradient is that by ``log_prob`` alone.
    :raises TypeError: for another method or config.
    :raises ValueError: for shapes that do not fit, a mask of other numbers than 0 and 1, a misspelt argument, and a
        column that the method reads and nobody gave.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: expected a Method, as agents.GRPO is, got {type(method).__name__}")
    log_prob, old_log_prob, mask = (torch.as_tensor(given) for given in (log_prob, old_log_prob, mask))
    reward, group = (None if given is None else torch.as_tensor(given) for given in (reward, group))
    for name in columns:  # an array that nobody reads would leave the reward at 0
        if near := difflib.get_close_matches(name, _OWN, n=1, cutoff=0.85):
            raise ValueError(f"{name}: expected another name, or the argument {near[0]}; write {near[0]}=")
    if log_prob.dim() != 2:
        raise ValueError(f"log_prob: expected [T, N], got {_shape(log_prob)}")
    steps, count = log_prob.shape
    dtype, device = log_prob.dtype, log_prob.device
    for name, value in {"old_log_prob": old_log_prob, "mask": mask}.items():
        if value.shape != log_prob.shape:
            raise ValueError(f"{name}: expected the shape of log_prob {_shape(log_prob)}, got {_shape(value)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"mask: expected 1 where there is a token and 0 elsewhere, got {mask.unique().tolist()}")
    for name, given in {"reward": reward, "group": group}.items():
        if given is not None and given.shape != (count,):
            turned = "; time comes first: is log_prob [N, T]?" if given.shape == (steps,) else ""
            raise ValueError(f"{name}: expected [N] = ({count},), got {_shape(given)}{turned}")
    config = method.Config() if config is None else config
    if not isinstance(config, method.Config):
        raise TypeError(f"config: expected {method.Config.__name__} or None, got {type(config).__name__}")
    data = _rollout(old_log_prob, mask, reward, group, columns)
    policy = _Given()
    recipe = method.Recipe(config, Parts(
        policy, None, _request(data), max_length or steps, _components(data), lambda context: policy,  # type: ignore[arg-type]
    ))  # fmt: skip
    recipe.to(device)
    if state:
        _restore(recipe, state)
    context = Context(
        torch.Generator(device).manual_seed(seed), _Absent("bank"), _Absent("scores"),  # type: ignore[arg-type]
        clock=torch.tensor(progress, dtype=torch.float64, device=device),
    )  # fmt: skip
    leaf = log_prob.detach().clone().requires_grad_()
    try:
        on = recipe.prepare({"on": data}, context)["on"]
        phases = recipe.phases()
        if len(phases) != 1:
            raise ValueError(f"expected a method with one phase, got {[phase.name for phase in phases]}")
        batch = on.epoch(Batching(phases[0].batching.unit, "full"), None)[0]
        rows = batch["row"]
        outputs: dict[str, Tensor] = {"log_prob": leaf[:, rows]}
        for name in frozenset[str]().union(*(term.want for term in phases[0].terms)) - {"log_prob"}:
            outputs[name] = _given(batch, name)
        loss, stats = surrogate(phases[0].terms, outputs, batch)
    except KeyError as error:
        raise ValueError(f"{method.name} reads a column that was not given: {error.args[0]}") from error
    gradient: Tensor | None = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    advantage = None
    if "advantage" in on:
        advantage = torch.zeros(steps, count, dtype=dtype, device=device)
        advantage[:, on["row"]] = on["advantage"].to(dtype)
    found = {name: value.detach() for name, value in stats.items()}
    return Loss(advantage, loss.detach(), torch.zeros_like(leaf) if gradient is None else gradient, found)


class _Given(nn.Module):
    """In place of a policy: what it would compute are columns."""

    temperature = 1.0

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        return {name: _given(batch, "reference" if name == "log_prob" else name) for name in want}

    def log_prob(self, batch: Data, temperature: float) -> Tensor:
        return _given(batch, "tempered_log_prob")


class _Absent:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise ValueError(f"loss_of: the method uses the agent's {self._name}.{attribute}, and there is no agent")


def _given(batch: Data, name: str) -> Tensor:
    if name not in batch:
        name = {"reference": "ref_log_prob"}.get(name, name)
        raise ValueError(f"loss_of: the method reads {name!r} of a policy; pass {name}= of shape [T, N]")
    return batch[name]


def _rollout(
    old: Tensor, mask: Tensor, reward: Tensor | None, group: Tensor | None, columns: Mapping[str, Any]
) -> Data:
    steps, count = old.shape
    valid = mask.to(old.dtype)
    device = old.device
    if reward is None:
        parts = columns.get("reward_components")
        reward = torch.zeros(count, device=device) if parts is None else torch.as_tensor(parts, device=device).sum(1)
    outcome = reward.to(old.dtype)
    length = valid.sum(0).long()
    later = valid.flip(0).cumsum(0).flip(0)
    last = ((later == 1) & (valid > 0)).to(old.dtype)
    found: dict[str, Tensor] = {
        "valid": valid, "present": valid, "log_prob": old, "reward": outcome * last, "episode_reward": outcome,
        "carry": (later > 0).to(old.dtype) * (1.0 - last), "length": length, "row": torch.arange(count, device=device),
        "group": torch.zeros(count, dtype=torch.int64, device=device) if group is None else group.long(),
        "demonstration": torch.zeros(count, dtype=old.dtype, device=device),
        "reward_components": outcome.unsqueeze(1),
    }  # fmt: skip
    sequence = {"episode_reward", "length", "row", "group", "demonstration", "reward_components"}
    for name, value in columns.items():
        value = torch.as_tensor(value, device=device)
        if name not in sequence and value.shape[:2] == (steps, count):
            found["reference" if name == "ref_log_prob" else name] = value
            sequence.discard(name)
        elif value.shape[:1] == (count,):
            found[name] = value
            sequence.add(name)
        else:
            raise ValueError(f"{name}: expected [T, N, ...] = ({steps}, {count}) or [N, ...], got {_shape(value)}")
    return Data(found, sequence=frozenset(sequence))


def _request(data: Data) -> Request:
    return Request(counts=torch.unique(data["group"], return_counts=True)[1])


def _components(data: Data) -> tuple[str, ...]:
    return tuple(f"component_{i}" for i in range(data["reward_components"].shape[1]))


def _restore(recipe: nn.Module, state: Mapping[str, Any]) -> None:
    buffers = dict(recipe.named_buffers())
    for name, value in state.items():
        if name not in buffers:
            raise ValueError(f"state: expected some of {sorted(buffers)}, got {name!r}")
        buffers[name].copy_(torch.as_tensor(value))


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
