"""Action distributions as pure functions on parameter dicts.

No ``torch.distributions`` objects: their construction and argument checks cost more than the maths at the batch sizes
of control. Parameters are small dicts ``{"mean", "log_std"}`` or ``{"logits"}`` that the buffer stores as
``old_mean`` ...; noise is an argument, so sampling is a pure function and compiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CATEGORICAL", "GAUSSIAN", "SQUASHED", "Distribution"]

Params = Mapping[str, Tensor]
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Distribution(Protocol):
    """Functions of parameters ``[..., A]`` (or logits ``[..., n]``); all reductions are over the last axis."""

    names: tuple[str, ...]
    noise: Literal["normal", "uniform"]

    def sample(self, params: Params, noise: Tensor) -> Tensor:
        """The action as stored in the buffer."""
        ...

    def mode(self, params: Params) -> Tensor:
        """The deterministic action, in the same coordinates as ``sample``."""
        ...

    def log_prob(self, params: Params, action: Tensor) -> Tensor: ...
    def entropy(self, params: Params, action: Tensor) -> Tensor: ...
    def kl(self, new: Params, old: Params) -> Tensor:
        """``KL(new || old)`` in closed form."""
        ...


class _Singleton:
    """Copies and pickles as the module's one object: policies compare with ``is``, and a deep copy of a policy (the
    bank makes them) would otherwise stop clipping its actions, or look for a ``log_std`` it does not have."""

    def __reduce__(self) -> str:
        return type(self).__name__.upper()


class Gaussian(_Singleton):
    """Diagonal Gaussian. ``sample`` is unbounded; the policy clips a copy for the environment and stores this one."""

    names: tuple[str, ...] = ("mean", "log_std")
    noise: Literal["normal", "uniform"] = "normal"

    def sample(self, params: Params, noise: Tensor) -> Tensor:
        return torch.addcmul(params["mean"], params["log_std"].exp(), noise)

    def mode(self, params: Params) -> Tensor:
        return params["mean"]

    def log_prob(self, params: Params, action: Tensor) -> Tensor:
        z = (action - params["mean"]) * (-params["log_std"]).exp()
        return (-0.5 * z * z - params["log_std"] - _HALF_LOG_2PI).sum(-1)

    def entropy(self, params: Params, action: Tensor) -> Tensor:
        return (params["log_std"] + (0.5 + _HALF_LOG_2PI)).sum(-1)

    def kl(self, new: Params, old: Params) -> Tensor:
        """MDPO's penalty (mdpo sheet, section 3); new first: 0.0881436 for N(.3, .8^2) against N(0, 1)."""
        shift = (new["mean"] - old["mean"]) * (-old["log_std"]).exp()
        log_ratio = new["log_std"] - old["log_std"]
        return (0.5 * ((2.0 * log_ratio).exp() + shift * shift - 1.0) - log_ratio).sum(-1)


class Squashed(Gaussian):
    """``a = tanh(u)``, ``u`` Gaussian. The buffer stores ``u`` (the inverse of tanh is lossy near the bounds).

    ``entropy`` has no closed form: ``-log_prob`` of the stored action stands in, unbiased at the behaviour policy
    (SB3 does the same). The KL is the Gaussian one: a bijection leaves it unchanged.
    """

    def log_prob(self, params: Params, action: Tensor) -> Tensor:
        # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), finite for every u
        correction = 2.0 * (math.log(2.0) - action - F.softplus(-2.0 * action))
        return super().log_prob(params, action) - correction.sum(-1)

    def entropy(self, params: Params, action: Tensor) -> Tensor:
        return -self.log_prob(params, action)


class Categorical(_Singleton):
    """Softmax over ``logits [..., n]``; actions are int64 ``[...]``; noise is one uniform number per action."""

    names: tuple[str, ...] = ("logits",)
    noise: Literal["normal", "uniform"] = "uniform"

    def sample(self, params: Params, noise: Tensor) -> Tensor:
        cumulative = params["logits"].softmax(-1).cumsum(-1)
        # the last cumulative sum may round below 1: without the clamp a noise above it would index past the end
        return (noise.unsqueeze(-1) >= cumulative).sum(-1).clamp_max(cumulative.shape[-1] - 1)

    def mode(self, params: Params) -> Tensor:
        return params["logits"].argmax(-1)

    def log_prob(self, params: Params, action: Tensor) -> Tensor:
        return params["logits"].log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self, params: Params, action: Tensor) -> Tensor:
        log_p = params["logits"].log_softmax(-1)
        return -_p_times(log_p, log_p).sum(-1)

    def kl(self, new: Params, old: Params) -> Tensor:
        log_p = new["logits"].log_softmax(-1)
        return _p_times(log_p, log_p - old["logits"].log_softmax(-1)).sum(-1)


def _p_times(log_p: Tensor, x: Tensor) -> Tensor:
    """``p * x`` with 0 where p is 0: masked actions have ``log_p = -inf``, and ``0 * inf`` would be NaN, in the value
    and (if only the product were masked) in the gradient."""
    return log_p.exp() * x.masked_fill(log_p == -torch.inf, 0.0)


GAUSSIAN: Distribution = Gaussian()
SQUASHED: Distribution = Squashed()
CATEGORICAL: Distribution = Categorical()
