"""DBQPG and UAPG: deep Bayesian quadrature for policy gradients (Akella et al. 2021, arXiv 2006.15637).

A Gaussian process on the action value, with a deep kernel on states and a Fisher kernel on scores, over the N
transitions of a rollout with targets A (GAE, or returns). With scores ``U [n, N]``, ``G = U U^T / N`` and

    k = c1 k_s(x, x') + c2 u^T G^-1 u',     W = (c1 K_s + c2 K_F + sigma^2 I)^-1,

    gradient  L = c2 U W A,                 covariance  S = c2 G - c2^2 U W U^T.

Without the state kernel L is the Monte-Carlo gradient ``U A / N`` times ``c2 N / (c2 N + sigma^2)``. ``K_F = N V V^T``
with the leading right singular vectors of U, from products with U and U^T alone. L is followed by Adam (vanilla), by
``(F + damping)^-1 L`` (natural) or by the trust region's line search (TRPO).

UAPG shapes the step by its uncertainty, through the leading eigenpairs (h_i, v_i) of S or of the inverse covariance of
the natural gradient, ``(G^-1 S G^-1)^-1 = (G + c2 U (c1 K_s + sigma^2 I)^-1 U^T) / c2``:

    vanilla           L    <- L - sum_i (1 - sqrt(h_min / h_i)) v_i v_i^T L
    natural, TRPO     step <- step + sum_i (min(sqrt(h_i / h_min), eps) - 1) v_i v_i^T step

Slots: fit = deep kernel, value head; prepare = values, GAE; gradient = posterior; direction = vanilla, natural, TRPO.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.dbqpg.quadrature import GradientSystem, StateGram
from agents.dbqpg.uncertainty import shrink, stretch
from agents.on_policy import OnPolicyConfig, check_eager, check_features, check_unused
from ccrl.batched_env import Tree
from ccrl.collect import Request
from ccrl.data import Data, tree_map
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.directions import line_search, natural_step, trust_region_step
from ccrl.estimators.scores import Scores
from ccrl.estimators.stages import Gae, Standardise, Values
from ccrl.gp.lowrank import Eigen, Product, randomised_eigh, randomised_right_svd
from ccrl.gp.posterior import Covariance
from ccrl.gp.solve import MAX_TOLERANCE
from ccrl.learn import Learner
from ccrl.packages import require
from ccrl.policies import MLPPolicy
from ccrl.settings import Above, Count, Nonnegative, Positive, Range, Unit
from ccrl.updaters import FlatUpdater, GradientEstimate, Stats

__all__ = ["DBQPG", "DBQPGConfig", "DBQPGEstimator"]


@dataclass(frozen=True)
class DBQPGConfig(OnPolicyConfig):
    """The released code's settings at a fifth of its batch."""

    num_envs: Count = 6
    """The number of parallel environments."""
    n_steps: Count = 500
    """Every iteration takes this many steps in each environment (the paper: 15,000 in all)."""
    gamma: Unit = 0.995
    """Rewards are discounted by this factor per step."""
    gae_lambda: Unit = 0.97
    """Lambda of generalised advantage estimation: 0 trusts the critic, 1 the returns."""
    normalise_obs: bool = True
    """Observations are normalised by running statistics."""
    clip_norm: Positive = 5.0
    """Normalised observations are clipped to plus or minus this number."""
    update: Literal["vanilla", "natural", "trpo"] = "trpo"
    """The step follows the gradient by Adam (vanilla), the natural gradient, or a trust region (trpo)."""
    uncertainty: bool = False
    """UAPG: the covariance of the gradient shapes the step."""
    targets: Literal["gae", "returns"] = "gae"
    """Targets are standardised GAE (gae) or standardised returns, bootstrapped where the rollout cuts an episode
    (returns)."""
    learning_rate: Positive = 2.1e-3
    """natural and vanilla: this is the step size (of vanilla Adam's; the paper's on Swimmer: 7e-4). TRPO has none."""
    state_scale: Nonnegative = 1.0
    """c1: the state kernel has this amplitude."""
    fisher_scale: Positive = 5e-5
    """c2: the Fisher kernel has this amplitude. Times N it weighs against the noise."""
    rank: Count = 30
    """The Fisher kernel, and UAPG's decompositions, have this rank."""
    stretch_limit: Annotated[float, Range(1)] = 3.0
    """eps: UAPG lengthens a direction at most by this factor."""
    solver: Literal["auto", "exact", "cg", "low_rank"] = "auto"
    """The solve is exact, iterative (cg) or of low rank; auto is low_rank where its error is below 1e-4, else exact
    up to 4,000 points, else cg."""
    cg_tolerance: Annotated[float, Above(0, MAX_TOLERANCE)] = 1e-6
    """cg: the relative residual may be this large."""
    kernel_hidden: tuple[Count, ...] = (64, 48)
    """These are the widths of the deep kernel's layers, which the value head shares."""
    kernel_features: Count = 10
    """The additive state kernel has this many features."""
    kernel_lr: Positive = 1e-4
    """This is Adam's step size for kernel and value head, which take one step per iteration."""
    likelihood_points: Count = 1000
    """The marginal likelihood has this many transitions, drawn anew at every iteration."""
    min_noise: Positive = 1e-4
    """The learnt noise variance does not fall below this number."""
    max_kl: Positive = 0.01
    """update=trpo: the policy moves at most this far, in KL."""
    damping: Nonnegative = 0.1
    """update=natural or trpo: this is added to the diagonal of the Fisher matrix."""
    cg_iterations: Count = 50
    """update=natural or trpo: the step takes this many conjugate-gradient iterations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unused(self, "targets are standardised", "normalise_reward")
        check_eager(self)
        if self.update != "vanilla":
            check_unused(self, f"update={self.update} takes its steps without Adam", "adam_eps")
        if self.update == "vanilla":
            check_unused(self, "update=vanilla follows Adam", "damping", "cg_iterations")
        if self.update != "trpo":
            check_unused(self, f"update={self.update} has no trust region", "max_kl")
        else:
            check_unused(self, "update=trpo takes the length of its steps from max_kl", "learning_rate")
        if not self.uncertainty or self.update == "vanilla":
            check_unused(self, "only uncertainty with update=natural or trpo lengthens a step", "stretch_limit")
        if self.targets == "returns":
            check_unused(self, "targets=returns have no lambda", "gae_lambda")
        if self.solver in ("exact", "low_rank"):
            check_unused(self, f"solver={self.solver} iterates nothing", "cg_tolerance")
        if not self.normalise_obs:
            check_unused(self, "it clips normalised observations, normalise_obs is off", "clip_norm")


class DBQPGEstimator(Estimator):
    """Deep kernel, value head, and the posterior of the gradient at the updater's parameters."""

    def __init__(self, config: DBQPGConfig, policy: MLPPolicy, flat: Tensor) -> None:
        super().__init__()
        from agents.dbqpg.kernel import DeepKernel

        self.config = config
        self._policy, self._flat = [policy], flat  # in a list: a module of its own would be saved twice
        first = policy.actor.net[0]
        assert isinstance(first, nn.Linear)
        self.deep = DeepKernel(first.in_features, config.kernel_hidden, config.kernel_features, config.min_noise)
        self._values = Values(lambda obs: self.deep.values(self._inputs(obs)))
        lam = config.gae_lambda if config.targets == "gae" else 1.0
        self._gae = Gae(config.gamma, lam, config.time_limit)  # type: ignore[arg-type]
        self._standardise = Standardise("target", eps=1e-8)
        self.system: GradientSystem
        """Of the last gradient, for directions that need more than its mean; with ``scores`` and ``weight [T, N]``."""
        self.scores: Scores
        self.weight: Tensor

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [Request(steps=self.config.n_steps)]

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        c = self.config
        with torch.no_grad():
            data = have["on"] = self._whitened(have["on"], ctx)
            targets = self._targets(data)
        rows = _flatten(self._kept(data))
        return self.deep.fit(
            self._inputs(tree_map(rows, data["obs"])), rows(data["whitened"]), rows(targets["target"]).double(),
            rows(targets["return"]).double(), state_scale=c.state_scale, fisher_scale=c.fisher_scale,
            points=c.likelihood_points, generator=ctx.generator, lr=c.kernel_lr,
        )  # fmt: skip

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        return have | {"on": self._targets(self._whitened(have["on"], ctx))}

    @torch.no_grad()
    def gradient(self, theta: Tensor, data: Data, ctx: Context) -> GradientEstimate:
        c, kept = self.config, self._kept(data)
        rows = _flatten(kept)
        self.scores = ctx.scores(theta.double(), data, "step")
        up, down = _products(self.scores, kept, data.shape)
        phi = self.deep.features(self._inputs(tree_map(rows, data["obs"])))
        count = kept.shape[0]
        self.system = GradientSystem(
            up, down, StateGram(self.deep.kernel, phi), rows(data["whitened"]) / math.sqrt(count), c1=c.state_scale,
            c2=c.fisher_scale, noise=float(self.deep.noise), solver=c.solver, tolerance=c.cg_tolerance,
        )  # fmt: skip
        weights = self.system.weights(rows(data["target"]).double())
        self.weight = _scatter(weights, kept, data.shape)
        mean = self.scores.vjp(self.weight)
        covariance = Covariance(mean.shape[0], self._covariance(self.system), mean)
        return GradientEstimate(mean, {"gradient_norm": mean.norm()}, covariance)

    @staticmethod
    def _covariance(system: GradientSystem) -> Product:
        return lambda v: system.covariance(v.unsqueeze(-1)).squeeze(-1) if v.dim() == 1 else system.covariance(v)

    def _inputs(self, obs: Tree) -> Tensor:
        return self._policy[0].features(obs, "actor").double()

    def _targets(self, data: Data) -> Data:
        """``target``: standardised advantages, or returns bootstrapped where the rollout cuts an episode."""
        data = self._gae(self._values(data))
        column = "advantage" if self.config.targets == "gae" else "return"
        return self._standardise(data.derive(target=data[column]))

    def _whitened(self, data: Data, ctx: Context) -> Data:
        """``whitened [T, N, r]``: scores whose inner products are the Fisher kernel, ``sqrt(N) V``."""
        if "whitened" in data:
            return data
        kept = self._kept(data)
        scores = ctx.scores(self._flat.double(), data, "step")
        up, down = _products(scores, kept, data.shape)
        right = randomised_right_svd(up, down, kept.shape[0], self.config.rank, ctx.generator, like=scores.theta)
        # singular values of rounding size have arbitrary vectors
        real = right.values > 1e-10 * right.values.max()
        vectors = math.sqrt(kept.shape[0]) * right.vectors * real
        return data.derive(whitened=_scatter(vectors, kept, data.shape))

    @staticmethod
    def _kept(data: Data) -> Tensor:
        return (data["valid"].reshape(-1) > 0).nonzero().squeeze(-1)


def _flatten(kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The kept rows ``[K, ...]`` of a column ``[T, N, ...]``."""
    return lambda x: x.reshape(-1, *x.shape[2:])[kept]


def _scatter(x: Tensor, kept: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values of the kept rows ``[K, ...]`` in the layout of the rollout ``[T, N, ...]``."""
    out = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    out[kept] = x
    return out.reshape(*shape, *x.shape[1:])


def _products(scores: Scores, kept: Tensor, shape: tuple[int, int]) -> tuple[Product, Product]:
    """``U w`` and ``U^T v`` on matrices, over the kept rows."""

    def up(w: Tensor) -> Tensor:
        return torch.stack([scores.vjp(_scatter(column, kept, shape)) for column in w.unbind(1)], 1)

    def down(v: Tensor) -> Tensor:
        return torch.stack([scores.jvp(column).reshape(-1)[kept] for column in v.unbind(1)], 1)

    return up, down


class DBQPGDirection:
    """Vanilla, natural and trust-region steps, with or without UAPG's shaping."""

    def __init__(self, config: DBQPGConfig, estimator: DBQPGEstimator, updater: FlatUpdater) -> None:
        self.config, self.estimator, self.updater = config, estimator, updater

    def points(self, theta: Tensor, ctx: Context) -> dict[str, Tensor]:
        return {"on": theta}

    @torch.no_grad()
    def step(
        self, theta: Tensor, gradient: Callable[[str], GradientEstimate], have: dict[str, Data], ctx: Context
    ) -> Tensor:
        c = self.config
        estimate = gradient("on")
        mean, system = estimate.mean, self.estimator.system
        if c.update == "vanilla":
            if c.uncertainty:
                mean = shrink(mean, self._leading(system.covariance, mean, ctx))
            self.updater.apply(GradientEstimate(-mean.to(theta.dtype)))
            return theta
        fisher = self.estimator.scores.fvp
        step = natural_step(fisher, mean, damping=c.damping, iterations=c.cg_iterations)
        if c.uncertainty:
            step = stretch(step, self._leading(system.natural_precision, mean, ctx), c.stretch_limit)
        if c.update == "natural":
            # along mean(w_t grad log pi) = L / (c2 N), the scale that the published step sizes belong to
            scale = self.updater.lr / (c.fisher_scale * system.gram.size)
            return theta + (scale * step).to(theta.dtype)
        step = trust_region_step(fisher, step, damping=c.damping, max_kl=c.max_kl)
        found, share = line_search(theta, step.to(theta.dtype), self._surrogate(have["on"], ctx), max_kl=c.max_kl)
        estimate.stats["line_search"] = torch.tensor(share)
        return found

    def _leading(self, product: Product, like: Tensor, ctx: Context) -> Eigen:
        return randomised_eigh(product, like.shape[0], self.config.rank, ctx.generator, like=like)

    def _surrogate(self, data: Data, ctx: Context) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Improvement ``sum_t w_t (ratio_t - 1)`` and mean KL(old || new) of a candidate."""
        distribution, weight, valid = self.estimator._policy[0].distribution, self.estimator.weight, data["valid"]
        old = {name: data[f"old_{name}"] for name in distribution.names}

        def evaluate(candidate: Tensor) -> tuple[Tensor, Tensor]:
            policy: Any = ctx.bank.policy(candidate)
            out = policy.evaluate(data, frozenset({"log_prob", "dist"}))
            ratio = (out["log_prob"] - data["log_prob"]).exp()
            improvement = torch.where(valid > 0, weight * (ratio - 1.0), 0.0).sum()
            kl = torch.where(valid > 0, distribution.kl(old, out), 0.0).sum() / valid.sum()
            return improvement, kl

        return evaluate


class DBQPG(Agent):
    """Deep Bayesian quadrature policy gradients; with ``uncertainty`` UAPG."""

    name = "dbqpg"
    paper = "Akella et al. 2021, arXiv 2006.15637"
    Config = DBQPGConfig

    def build(self) -> Learner:
        require("gpytorch", "gp")  # here, not at the first gradient
        c: DBQPGConfig = self.config
        policy = self.make_policy({})
        check_features(policy, "the deep kernel reads what the actor sees")
        updater = FlatUpdater(policy, lr=c.learning_rate, eps=c.adam_eps)
        estimator = DBQPGEstimator(c, policy, updater.flat)
        return self.rollouts(policy, estimator, {"policy": updater}, DBQPGDirection(c, estimator, updater))

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "fit": "deep kernel (marginal likelihood) and value head",
            "prepare": "values, GAE, standardise",
            "gradient": "Bayesian quadrature: posterior mean and covariance",
            "direction": "Adam, natural or trust region; UAPG rescaling",
        }
