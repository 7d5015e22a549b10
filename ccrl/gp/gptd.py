"""Gaussian-process temporal differences (Engel, Mannor, Meir 2005): a posterior over ``Q`` from rewards.

``r = H (Q + eps)``, ``eps ~ N(0, sigma^2 I)``: a row ``[1, -gamma]`` per transition, ``[1]`` for the last of a
terminated episode. A truncated episode ends with a point that has no reward of its own (the true successor with an
action of the policy), so its last row is ``[1, -gamma]`` too. The posterior is ``Q^(z) = k(z)^T alpha`` with covariance
``k(z, z') - k(z)^T C k(z')``::

    alpha = H^T (H K H^T + sigma^2 H H^T)^-1 r,    C = H^T (H K H^T + sigma^2 H H^T)^-1 H

If every episode terminates, ``H`` is invertible: ``C = M^-1`` and ``alpha = M^-1 g`` with ``M = K + sigma^2 I`` and the
discounted returns ``g``. Else ``H`` has a null space ``D``, a column per truncated episode (``H D = 0``, powers of
gamma back from its last point), and ``C`` is that of a regression on ``g`` with a free value at each cut::

    alpha = C g,    C = M^-1 - M^-1 D (D^T M^-1 D)^-1 D^T M^-1                    (docs/bac.md has the derivation)

so that conjugate gradients always solve with ``M``, whose preconditioners are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ccrl.gp.solve import CG, Cholesky, Solver
from ccrl.gp.sparsify import Column, Dictionary
from ccrl.returns import discounted_sum

__all__ = ["Chain", "QPosterior", "gptd", "recursive_gptd"]


@dataclass(frozen=True)
class Chain:
    """The points of several episodes in order, ``[N]``; episodes stand one after the other."""

    reward: Tensor
    """Of the step taken from every point; whatever stands where there is none is not read."""
    rewarded: Tensor
    """bool: False for the points that only close truncated episodes."""
    follows: Tensor
    """bool: the next point is this one's successor."""
    gamma: float

    def __post_init__(self) -> None:
        shapes = {tuple(x.shape) for x in (self.reward, self.rewarded, self.follows)}
        if len(shapes) != 1 or self.reward.dim() != 1:
            raise ValueError(f"Chain: expected three columns [N], got shapes {sorted(shapes)}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"Chain: expected gamma in [0, 1], got {self.gamma}")
        if len(self.reward) and bool(self.follows[-1]):
            raise ValueError("Chain: the last point has no successor, expected follows[-1] = False")
        if bool((self.follows & ~self.rewarded).any()):
            raise ValueError("Chain: a point without reward closes its episode, expected follows = False there")

    @property
    def terminated(self) -> bool:
        """Whether every episode terminates, so that ``H`` is square."""
        return bool(self.rewarded.all())

    def apply(self, x: Tensor) -> Tensor:
        """``H x``: ``[R, ...]`` from ``[N, ...]``, a row per reward."""
        after = torch.cat([x[1:], torch.zeros_like(x[:1])])
        return (x - self._discounted(after))[self.rewarded]

    def adjoint(self, y: Tensor) -> Tensor:
        """``H^T y``: ``[N, ...]`` from ``[R, ...]``."""
        x = y.new_zeros(len(self.reward), *y.shape[1:])
        x[self.rewarded] = y
        x[1:] -= self._discounted(x)[:-1]
        return x

    def _discounted(self, x: Tensor) -> Tensor:
        """``gamma x`` where a successor follows, else 0."""
        # where, not a product of gamma and the flags: that one would be float32
        return torch.where(self.follows.view(-1, *(1,) * (x.dim() - 1)), self.gamma * x, 0.0)

    def returns(self) -> Tensor:
        """Discounted rewards to go ``g [N]``, 0 at points without reward: a solution of ``H g = r``."""
        reward = torch.where(self.rewarded, self.reward, 0.0)
        return discounted_sum(reward, self.gamma, self.follows.to(reward))

    def null_space(self) -> Tensor:
        """``D [N, E]`` with ``H D = 0``, a column per truncated episode: ``gamma^i``, i steps before its last point."""
        ends = (~self.rewarded).nonzero().squeeze(-1)
        columns = self.reward.new_zeros(len(self.reward), len(ends))
        columns[ends, torch.arange(len(ends), device=ends.device)] = 1.0
        return discounted_sum(columns, self.gamma, self.follows.to(columns).unsqueeze(-1).expand_as(columns))


@dataclass(frozen=True)
class QPosterior:
    """``Q^(z) = k(z)^T alpha``, ``cov = k - k^T C k``, with kernels on the points ``index``."""

    index: Tensor
    """Points of the chain that carry the posterior, ``[m]`` (all of them unless sparse)."""
    alpha: Tensor
    """``[m]``."""
    precision: Callable[[Tensor], Tensor]
    """``C v`` for ``v [m]`` or ``[m, k]``."""


def gptd(
    kernel: Tensor | Callable[[Tensor], Tensor],
    chain: Chain,
    noise: float,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    preconditioner: Solver | None = None,
) -> QPosterior:
    """The batch posterior: exact by Cholesky for a matrix ``[N, N]``, by conjugate gradients for a product ``K x``.

    :param noise: ``sigma^2``.
    :param tolerance, max_iterations: conjugate gradients: relative residual, and iterations before they give up.
    :param preconditioner: conjugate gradients: an approximation of ``K + sigma^2 I`` to solve with.
    :raises ValueError: a noise variance that is not positive, a matrix of another size than the chain's.
    :raises FloatingPointError: solves that fail (``ccrl.gp.solve``).
    """
    if not noise > 0.0:
        raise ValueError(f"gptd: expected a noise variance > 0, got {noise}")
    n = len(chain.reward)
    everything = torch.arange(n, device=chain.reward.device)
    if not isinstance(kernel, Tensor):
        product = kernel
        solver: Solver = CG(
            lambda x: product(x) + noise * x,
            tolerance=tolerance, max_iterations=max_iterations, preconditioner=preconditioner,
        )  # fmt: skip
        precision = solver.solve if chain.terminated else _without(chain.null_space(), solver)
        return QPosterior(everything, precision(chain.returns()), precision)
    if kernel.shape != (n, n):
        raise ValueError(f"gptd: expected a kernel matrix [{n}, {n}], got {tuple(kernel.shape)}")
    matrix = kernel + torch.diag_embed(noise * kernel.new_ones(n))
    if chain.terminated:
        solver = Cholesky(matrix)
        return QPosterior(everything, solver.solve(chain.returns()), solver.solve)
    solver = Cholesky(chain.apply(chain.apply(matrix).T))  # H (K + sigma^2 I) H^T
    alpha = chain.adjoint(solver.solve(chain.reward[chain.rewarded]))
    return QPosterior(everything, alpha, lambda v: chain.adjoint(solver.solve(chain.apply(v))))


def _without(null: Tensor, solver: Solver) -> Callable[[Tensor], Tensor]:
    """``v -> C v`` with ``C = M^-1 - M^-1 D (D^T M^-1 D)^-1 D^T M^-1``, for ``D`` and a solver of ``M``."""
    solved = solver.solve(null)
    inner = Cholesky(null.T @ solved)

    def precision(v: Tensor) -> Tensor:
        x = solver.solve(v)
        return x - solved @ inner.solve(null.T @ x)

    return precision


class _Recursion:
    """State of the sparse posterior between transitions: ``alpha [m]``, ``C [m, m]`` and the episode's ``c, d, s``."""

    def __init__(self, dictionary: Dictionary, gamma: float, noise: float) -> None:
        self.dictionary, self.gamma, self.noise = dictionary, gamma, noise
        like = dictionary.diagonal
        self.alpha, self.matrix = like.new_zeros(0), like.new_zeros(0, 0)

    def begin(self, i: int) -> None:
        """The first point of an episode."""
        self.a = self._represent(i)
        self.k = self.dictionary.kernels(i)
        self.c, self.d, self.decay = torch.zeros_like(self.alpha), self.alpha.new_zeros(()), self.alpha.new_zeros(())

    def step(self, i: int, j: int, reward: Tensor) -> None:
        """From point ``i`` with its reward to point ``j``."""
        gamma, noise = self.gamma, self.noise
        a, c, k = self.a, self.c, self.k
        a_next, joins = self.dictionary.test(j)
        k_next = self.dictionary.kernels(j)
        dk = k - gamma * k_next
        coef = self.decay
        d = coef * self.d + reward - dk @ self.alpha
        if joins:
            dkk = a @ (k - 2.0 * gamma * k_next) + gamma**2 * self.dictionary.diagonal[j]
            c_dk = self.matrix @ dk
            s = (1.0 + gamma**2) * noise + dkk - dk @ c_dk + 2.0 * coef * (c @ dk) - gamma * noise * coef
            self.dictionary.add(j, a_next)
            self._grow()
            h = torch.cat([a, a.new_full((1,), -gamma)])
            self.c = _pad(coef * c - c_dk, 1) + h
            self.a = _pad(torch.zeros_like(a_next), 1, 1.0)
        else:
            self.c = coef * c + a - gamma * a_next - self.matrix @ dk
            s = (1.0 + gamma**2) * noise + dk @ (self.c + coef * c) - gamma * noise * coef
            self.a = a_next
        self._update(d, s)
        self.k = self.dictionary.kernels(j)

    def terminate(self, reward: Tensor) -> None:
        """The last reward of an episode that terminates."""
        coef, c = self.decay, self.c
        self.c = coef * c + self.a - self.matrix @ self.k
        s = self.noise + self.k @ (self.c + coef * c) - self.gamma * self.noise * coef
        self._update(coef * self.d + reward - self.k @ self.alpha, s)

    def _represent(self, i: int) -> Tensor:
        a, joins = self.dictionary.test(i)
        if joins:
            self.dictionary.add(i, a)
            self._grow()
            return _pad(torch.zeros_like(a), 1, 1.0)
        return a

    def _grow(self) -> None:
        self.alpha = _pad(self.alpha, 1)
        self.matrix = torch.nn.functional.pad(self.matrix, (0, 1, 0, 1))

    def _update(self, d: Tensor, s: Tensor) -> None:
        self.alpha = self.alpha + self.c * (d / s)
        self.matrix.addr_(self.c, self.c / s)
        self.d, self.decay = d, self.gamma * self.noise / s


def recursive_gptd(column: Column, diagonal: Tensor, chain: Chain, noise: float, nu: float) -> QPosterior:
    """The sparse posterior, one transition at a time: ``O(N m^2)``; equal to the batch one as ``nu`` goes to 0.

    :param column, diagonal, nu: the kernel and the threshold of the dictionary (``ccrl.gp.sparsify``).
    """
    if not noise > 0.0:
        raise ValueError(f"recursive_gptd: expected a noise variance > 0, got {noise}")
    dictionary = Dictionary(column, diagonal, nu)
    state = _Recursion(dictionary, chain.gamma, noise)
    reward, fresh = chain.reward.to(diagonal), True
    rewarded, follows = chain.rewarded.tolist(), chain.follows.tolist()
    for i in range(len(rewarded)):
        if fresh:
            state.begin(i)
        if follows[i]:
            state.step(i, i + 1, reward[i])
        elif rewarded[i]:
            state.terminate(reward[i])
        fresh = not follows[i]
    index = torch.tensor(dictionary.index, dtype=torch.int64, device=diagonal.device)
    return QPosterior(index, state.alpha, lambda v: state.matrix @ v)


def _pad(x: Tensor, count: int, value: float = 0.0) -> Tensor:
    return torch.cat([x, x.new_full((count,), value)])
