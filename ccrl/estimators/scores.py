"""Per-sample scores ``grad log pi`` at given parameters, as products that never form the matrix of scores.

With ``U [n, M]`` the scores of ``M`` samples: ``vjp`` is ``U w``, ``jvp`` is ``U^T v``; ``hvp`` and ``fvp`` are
Hessian-vector products of the objective and of the KL, all functions of one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ccrl.columns import columns_read
from ccrl.data import Data, masked, tree_map
from ccrl.estimators.updates import owned_parameters
from ccrl.policies.distributions import Distribution

__all__ = ["Scores"]

SampleLevel = Literal["step", "trajectory"]


class Scores:
    """Scores of ``log pi_theta(a|o)`` at a flat vector ``theta [n]``, in the order of ``module.parameters()``.

    A sample is a step (weights ``[T, N]``) or a column (``[N]``; its log-probability is the sum over valid steps, so
    columns should be whole episodes). Invalid rows contribute exactly 0; parameters that do not enter ``log_prob``
    (critics) have zero scores. Everything is computed in the dtype of ``theta``: a float64 vector gives float64 scores
    of a float32 policy.

    :param module: has ``forward(batch, want)`` with the outputs ``log_prob`` and, for ``fvp``, ``dist`` and an
        attribute ``distribution``.
    :param data: rows ``[T, N]`` as collected; only the columns that ``log_prob`` reads are used.
    :param prefixes: ``theta`` holds only the parameters whose names start with one of them; the others stay.
    :raises ValueError: if ``theta`` has another size or ``level`` is unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        theta: Tensor,
        data: Data,
        level: SampleLevel = "step",
        *,
        prefixes: Sequence[str] | None = None,
    ) -> None:
        if level not in ("step", "trajectory"):
            raise ValueError(f"Scores: expected level 'step' or 'trajectory', got {level!r}")
        owned = owned_parameters(module, prefixes)
        self._names, self._shapes = tuple(owned), [p.shape for p in owned.values()]
        self._sizes = [p.numel() for p in owned.values()]
        if theta.shape != (sum(self._sizes),):
            raise ValueError(f"Scores: expected theta of shape ({sum(self._sizes)},), got {tuple(theta.shape)}")
        self.module, self.theta, self.level = module, theta.detach(), level
        cast = partial(_cast, dtype=theta.dtype)
        others = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._fixed = {k: cast(v.detach()) for k, v in others.items() if k not in owned}
        with torch.no_grad():
            columns = columns_read(lambda b: module.forward(b, frozenset({"log_prob"})), data)
        names = sorted({*columns, "valid"})
        clean = partial(_clean, valid=data["valid"])
        self._data = Data(
            {
                c: tree_map(cast, data[c] if c in data.sequence | data.scalars else tree_map(clean, data[c]))
                for c in names
            },
            sequence=data.sequence,
            scalars=data.scalars & set(names),
        )
        self._valid = self._data["valid"]

    @property
    def count(self) -> Tensor:
        """Samples with at least one valid row, 0-d."""
        valid = self._valid if self.level == "step" else self._valid.amax(0)
        return (valid > 0).sum()

    # -- products -----------------------------------------------------------------------------------------------------

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log-probabilities of the samples at another vector: ``[T, N]`` or ``[N]``; differentiable."""
        return self._of(theta, self._data)

    def vjp(self, w: Tensor) -> Tensor:
        """``U w``, ``[n]``: the scores summed with weights ``[T, N]`` or ``[N]``."""
        self._check("w", w, self._samples())
        return self._gradient(lambda theta: (self._of(theta, self._data) * w.to(theta.dtype)).sum())

    def jvp(self, v: Tensor) -> Tensor:
        """``U^T v``, ``[T, N]`` or ``[N]``: every sample's directional derivative along ``v [n]``."""
        self._check("v", v, self.theta.shape)
        return self._forward(self.log_prob, v)

    def hvp(self, weight: Tensor, v: Tensor) -> Tensor:
        """Unbiased estimate of the Hessian of the expected return times ``v``, ``[n]`` (HARPG; see docs/harpg.md).

        The mean over samples of ``hess Phi v + grad Phi <score, v>`` with ``Phi = sum_t weight_t log pi_t`` and
        ``weight [T, N]`` held constant; the second term is there because the sampling depends on ``theta`` too.
        """
        self._check("weight", weight, self._valid.shape)
        self._check("v", v, self.theta.shape)
        share = torch.where(self._valid > 0, weight.to(self.theta.dtype), 0.0) / self.count.clamp_min(1)

        def phi(theta: Tensor, factor: Tensor | float) -> Tensor:
            return (masked(self._step_log_prob(theta, self._data), self._valid) * share * factor).sum()

        curvature = self._forward(lambda theta: torch.func.grad(phi)(theta, 1.0), v)
        along = self.jvp(v)  # [T, N] or [N]: both broadcast over the rows of their sample
        return curvature + self._gradient(lambda theta: phi(theta, along))

    def fvp(self, v: Tensor) -> Tensor:
        """Fisher matrix times ``v``, ``[n]``: the Hessian at ``theta`` of the mean closed-form KL over valid steps."""
        self._check("v", v, self.theta.shape)
        distribution: Distribution = self.module.distribution  # type: ignore[assignment]
        with torch.no_grad():
            old = self._call(self.theta, self._data, "dist")
        share = (self._valid > 0).to(self.theta.dtype) / (self._valid > 0).sum().clamp_min(1)

        def kl(theta: Tensor) -> Tensor:
            return (masked(distribution.kl(self._call(theta, self._data, "dist"), old), share) * share).sum()

        return self._forward(torch.func.grad(kl), v)

    def dense(self, chunk: int = 512) -> Tensor:
        """``U [n, M]`` itself, for small policies; ``M`` is ``T * N`` (time-major) or ``N``. ``chunk`` samples at a
        time bound the memory of the intermediate per-sample weights."""
        data = self._data
        samples = {c: tree_map(partial(self._cut, c), data[c]) for c in data if c not in data.scalars}
        whole = {c: data[c] for c in data.scalars}

        def one(theta: Tensor, sample: dict[str, Any]) -> Tensor:
            batch = Data(sample | whole, sequence=data.sequence, scalars=data.scalars)
            return masked(self._step_log_prob(theta, batch), batch["valid"]).sum()

        rows: Tensor = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0), chunk_size=chunk)(self.theta, samples)
        return rows.T

    def _cut(self, name: str, x: Tensor) -> Tensor:
        """A column with the samples first, each a batch of its own: ``[M, 1, 1, ...]`` steps, ``[N, T, 1, ...]``."""
        if self.level == "trajectory":
            return x.unsqueeze(1) if name in self._data.sequence else x.transpose(0, 1).unsqueeze(2)
        if name in self._data.sequence:
            x = x.expand(self._data.shape[0], *x.shape)
            return x.reshape(-1, 1, *x.shape[2:])
        return x.reshape(-1, 1, 1, *x.shape[2:])

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _samples(self) -> torch.Size:
        return self._valid.shape if self.level == "step" else self._valid.shape[1:]

    def _of(self, theta: Tensor, batch: Data) -> Tensor:
        log_prob = masked(self._step_log_prob(theta, batch), batch["valid"])
        return log_prob if self.level == "step" else log_prob.sum(0)

    def _step_log_prob(self, theta: Tensor, batch: Data) -> Tensor:
        return self._call(theta, batch, "log_prob")["log_prob"]

    def _call(self, theta: Tensor, batch: Data, want: str) -> dict[str, Tensor]:
        # split, not narrow: the backward of many slices of one vector is quadratic
        pieces = [x.view(s) for x, s in zip(torch.split(theta, self._sizes), self._shapes)]
        state = {**self._fixed, **dict(zip(self._names, pieces))}
        out: dict[str, Tensor] = torch.func.functional_call(self.module, state, (batch, frozenset({want})))
        return out

    def _gradient(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        # ordinary autograd: faster than torch.func.grad in eager mode, and activation checkpointing works under it
        theta = self.theta.clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(fn(theta), theta)
        return grad

    def _forward(self, fn: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        # forward mode exists only for the plain attention kernel
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            tangent: Tensor = torch.func.jvp(fn, (self.theta,), (v.to(self.theta.dtype),))[1]
        return tangent.detach()

    def _check(self, name: str, value: Tensor, shape: torch.Size) -> None:
        if value.shape != shape:
            raise ValueError(
                f"Scores ({self.level}): expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}"
            )


def _clean(x: Tensor, valid: Tensor) -> Tensor:
    """Numbers on invalid rows must at least be finite: a zero gradient times infinity is NaN in the weights. Finite
    ones stay, they may be context that valid rows depend on."""
    if not x.is_floating_point():
        return x
    keep = (valid > 0).reshape(*valid.shape, *(1,) * (x.dim() - 2)) | x.isfinite()
    return torch.where(keep, x, torch.zeros_like(x))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
