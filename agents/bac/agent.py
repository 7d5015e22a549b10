"""BAC: Bayesian actor-critic (Ghavamzadeh, Engel 2007; Ghavamzadeh, Engel, Valko 2016, JMLR 17(66)).

A Gaussian-process critic on ``Q(z)``, ``z = (x, a)``, makes the posterior of the policy gradient closed form. With the
state-action scores ``u(z) = grad log pi(a|x)`` and their Fisher matrix ``G``,

    k(z, z') = c_x k_x(x, x') + c_F u(z)^T G^-1 u(z'),      r_t = Q(z_t) - gamma Q(z_{t+1}) + noise  (GPTD)

    mean = c_F U alpha,     cov = c_F G - c_F^2 U C U^T,     theta <- theta + beta_j mean   (or G^-1 mean)

``Q^(z) = k(z)^T alpha`` and ``C`` are those of ``ccrl.gp.gptd``; the state kernel integrates to 0 against the scores
and only helps to tell good states from good actions. Data are on-policy for one ``theta``, so the critic starts anew at
every update.

Slots: plan = M episodes; prepare = chain with bootstrap pairs; gradient = posterior; direction = ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.bac.chain import chain_rows
from agents.base import Agent
from agents.bpg import EpisodicConfig
from agents.on_policy import check_features, check_unused
from ccrl.batched_env import Tree
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.directions import Ascent
from ccrl.gp.fisher import BatchFisher, Fisher
from ccrl.gp.gptd import Chain, QPosterior, gptd, recursive_gptd
from ccrl.gp.posterior import Covariance, Posterior
from ccrl.gp.solve import LowRank, pivoted_cholesky
from ccrl.learn import Learner
from ccrl.packages import require
from ccrl.policies import GibbsPolicy, MLPPolicy, RBFGrid
from ccrl.settings import Count, Nonnegative, Positive
from ccrl.updaters import FlatUpdater, GradientEstimate

__all__ = ["BAC", "BACConfig", "BACEstimator"]

EXACT_UP_TO = 4000
"""Points up to which ``solver="auto"`` factorises the kernel matrix."""
PRECONDITIONER_RANK = 300
"""Largest rank of the factor that preconditions the conjugate gradients."""
MISSED = 1e-2
"""Trace of the kernel that the factor may miss, over the noise variance: it bounds the condition number less 1."""
GRID_WIDTH = 1.3
"""Width of the grid policy's bumps, in distances between neighbours."""


@dataclass(frozen=True)
class BACConfig(EpisodicConfig):
    """The mountain-car experiment: 5 episodes of at most 200 steps per update."""

    num_envs: Count = 5
    """M: every update plays this many fresh episodes, one environment each."""
    learning_rate: Positive = 0.025
    """beta: steps are this long times the gradient."""
    policy: Literal["mlp", "grid"] = "mlp"
    """The policy is a perceptron with the hidden layers given (mlp; none: linear), or a softmax that is linear in
    Gaussian bumps on a grid over the bounded state (grid)."""
    grid: Count = 4
    """policy=grid: there are this many bumps per dimension of the state."""
    noise: Positive = 9.0
    """sigma^2: the model of a reward has this noise variance."""
    solver: Literal["auto", "exact", "cg", "sparse"] = "auto"
    """The solve is exact (Cholesky), iterative (cg: conjugate gradients), or a recursion on a dictionary (sparse);
    auto is exact up to 4,000 points and cg above."""
    nu: Positive = 0.1
    """solver=sparse: a point enters the dictionary above this threshold, in the unit of the kernel. Above the Fisher
    kernel's size (n / N with fisher=sum) it keeps states and forgets what actions mean."""
    state_scale: Positive = 1.0
    """c_x: the state kernel has this amplitude."""
    fisher_scale: Positive = 1.0
    """c_F: the Fisher kernel has this amplitude."""
    lengthscale: Positive = 1.0
    """The Gaussian state kernel has this length scale, on states scaled to [0, 1] where their bounds are finite."""
    fisher: Literal["sum", "mean"] = "sum"
    """The Fisher matrix of the batch's scores is their sum (the authors' code; a Fisher kernel of about n / N) or
    their mean."""
    damping: Nonnegative = 1e-6
    """This is added to the diagonal of the Fisher matrix."""
    discounted: bool = False
    """The scores of step t are weighted with gamma^t in the Fisher matrix (the derivation; code counts visits)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy == "grid":
            check_unused(self, "the grid scales the bounded state itself", "normalise_obs")
            why = "policy=grid is linear in its bumps, over discrete actions, and starts at 0"
            check_unused(self, why, "hidden", "activation", "orthogonal", "squash", "log_std_init")
        else:
            check_unused(self, "policy=mlp has no grid", "grid")
        if self.solver != "sparse":
            check_unused(self, f"solver={self.solver} keeps every point, sparse has a dictionary", "nu")


class StateScale(nn.Module):
    """State features ``[K, d]`` in float64: bounded coordinates scaled to [0, 1] (those of one value are 0), Discrete
    states one-hot."""

    low: Tensor
    width: Tensor

    def __init__(self, space: Any, policy: MLPPolicy | GibbsPolicy) -> None:
        super().__init__()
        if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            check_features(policy, f"the state kernel reads what the actor sees of {space}")
        self._policy = [policy]  # in a list: a module of its own would be saved twice
        low = torch.as_tensor(getattr(space, "low", [0.0]), dtype=torch.float64).flatten()
        high = torch.as_tensor(getattr(space, "high", [1.0]), dtype=torch.float64).flatten()
        bounded = low.isfinite() & high.isfinite() & (high - low < 1e6)
        self.register_buffer("low", torch.where(bounded, low, 0.0), persistent=False)
        self.register_buffer("width", torch.where(bounded & (high > low), high - low, 1.0), persistent=False)

    def forward(self, obs: Tree) -> Tensor:
        if isinstance(obs, dict) or not obs.is_floating_point():
            return self._policy[0].features(obs, "actor").double()
        return (obs.reshape(obs.shape[0], -1).double() - self.low) / self.width


class BACEstimator(Estimator):
    """Posterior of the policy gradient from the transitions of M episodes.

    :param states: observations ``[K, ...]`` -> features ``[K, d]`` of the state kernel.
    :param kernel: a GPyTorch kernel on them; None: Gaussian of the config's length scale.
    :param fisher: estimate of the state-action Fisher matrix; None: of the batch, as the config says.
    """

    def __init__(
        self, config: BACConfig, policy: Any, states: Any, kernel: Any = None, fisher: Fisher | None = None
    ) -> None:
        super().__init__()
        from ccrl.gp.kernels import rbf

        self.config, self.states = config, states
        self.kernel = rbf(config.lengthscale) if kernel is None else kernel
        self.fisher = BatchFisher(config.fisher, config.damping) if fisher is None else fisher  # type: ignore[arg-type]
        self._policy = [policy]  # in a list: a module of its own would be saved twice

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(episodes=self.config.num_envs, horizon=self.config.n_steps)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        chain = chain_rows(have["on"], self._policy[0], ctx.generator, self.config.time_limit)  # type: ignore[arg-type]
        return have | {"on": chain}

    @torch.no_grad()
    def gradient(self, theta: Tensor, data: Data, ctx: Context) -> GradientEstimate:
        c = self.config
        scores = ctx.scores(theta.double(), data, "step").dense()  # [n, K]
        rewarded = data["rewarded"][0]
        weight = c.gamma ** data["t"][0][rewarded].double() if c.discounted else None
        fisher = self.fisher.estimate(scores[:, rewarded], weight)
        chain = Chain(data["reward"][0].double(), rewarded, data["follows"][0], c.gamma)
        obs = data["obs"]
        states = self.states({k: v[0] for k, v in obs.items()} if isinstance(obs, dict) else obs[0])
        critic = self._critic(states, scores, fisher.inverse, chain)
        used = scores[:, critic.index]

        def product(v: Tensor) -> Tensor:
            return c.fisher_scale * (fisher.matrix @ v) - c.fisher_scale**2 * (used @ critic.precision(used.T @ v))

        mean = c.fisher_scale * (used @ critic.alpha)
        posterior = Posterior(mean, Covariance(mean.shape[0], product, mean))
        if c.natural:
            posterior = posterior.natural(fisher.inverse)
        stats = {
            "gradient_norm": posterior.mean.norm(),
            "gradient_std": posterior.covariance.trace().clamp_min(0).sqrt(),
            "dictionary": torch.tensor(float(critic.index.shape[0])),
        }
        return GradientEstimate(posterior.mean, stats, posterior.covariance)

    def _critic(self, states: Tensor, scores: Tensor, inverse: Tensor, chain: Chain) -> QPosterior:
        from ccrl.gp.kernels import StateFisherKernel

        c = self.config
        kernel = StateFisherKernel(
            self.kernel, states.shape[1], inverse, state_scale=c.state_scale, fisher_scale=c.fisher_scale
        )
        points = torch.cat([states, scores.T], 1)
        if c.solver == "sparse":
            column = lambda i: kernel(points, points[i : i + 1]).to_dense()[:, 0]  # noqa: E731
            return recursive_gptd(column, kernel(points, diag=True), chain, c.noise, c.nu)
        matrix: Tensor = kernel(points).to_dense()
        if c.solver == "exact" or (c.solver == "auto" and len(points) <= EXACT_UP_TO):
            return gptd(matrix, chain, c.noise)
        diagonal = matrix.diagonal()
        enough = c.noise * MISSED / float(diagonal.sum())
        root = pivoted_cholesky(lambda i: matrix[:, i], diagonal, PRECONDITIONER_RANK, enough)
        return gptd(lambda x: matrix @ x, chain, c.noise, preconditioner=LowRank(root, c.noise))


class BAC(Agent):
    """Bayesian actor-critic."""

    name = "bac"
    paper = "Ghavamzadeh, Engel, Valko 2016, JMLR 17(66)"
    Config = BACConfig
    episodic = True

    def build(self) -> Learner:
        require("gpytorch", "gp")
        c: BACConfig = self.config
        space = self.env.single_observation_space
        policy: Any = self.make_grid_policy() if c.policy == "grid" else self.make_policy({})
        updater = FlatUpdater(policy, lr=c.learning_rate)
        estimator = BACEstimator(c, policy, StateScale(space, policy))
        return self.rollouts(policy, estimator, {"policy": updater}, Ascent(updater.lr, c.lr_decay))

    def make_grid_policy(self) -> GibbsPolicy:
        """The softmax policy on the grid that the config describes.

        :raises ValueError: for other actions than Discrete and other observations than a finite Box of one axis, and
            next to a policy of the caller's own.
        """
        space, per_axis = self.env.single_observation_space, self.config.grid
        if self.own_policy is not None:
            raise ValueError("policy: expected policy='mlp' next to a policy of your own, got 'grid'; drop one")
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
            raise ValueError(f"policy=grid: expected a Box observation of one axis with finite bounds, got {space}")
        features = RBFGrid(space.low.tolist(), space.high.tolist(), per_axis, GRID_WIDTH / per_axis)
        return GibbsPolicy(space, self.env.single_action_space, features=features)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "plan": "M fresh episodes",
            "prepare": "chain of transitions with bootstrap pairs",
            "gradient": "GPTD critic: posterior mean and covariance",
            "direction": "ascent, or natural",
        }
